"""A process's usage records: journalled here, sent on to the ledger, and let go then."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from serve_app.errors import JournalUnavailable
from serve_app.journal import Journal, JournalSize, Shipper, Sink, Sweeper
from serve_app.usage import LedgerRecord, UsageRecord, encode

logger = logging.getLogger("headrace.usage")

STOP_TIMEOUT_S: Final = 5.0
# How long a response waits for the ledger where the disk takes nothing.
LEDGER_TIMEOUT_S: Final = 5.0
# Records that nobody waits for share a sync.
NOTE_GATHER_S: Final = 0.02
FLUSH_LOOK_S: Final = 0.05
DEFAULT_FOLDER: Final = Path(".headrace/journal")
# Set by `headrace up`, which knows the database: two services of one folder are two.
FOLDER_VARIABLE: Final = "HEADRACE_JOURNAL"


class Settings(Protocol):
    """Where and how large; see config.JournalSettings."""

    @property
    def folder(self) -> str | None: ...
    @property
    def segment_bytes(self) -> int: ...
    @property
    def segments(self) -> int: ...


def journal_folder(settings: Settings) -> Path:
    """Return the folder of this node's journals: what is set, the environment's, the default."""
    return Path(settings.folder or os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER)


class UsageLog:
    """One per process that witnesses usage. On its event loop only."""

    def __init__(
        self,
        settings: Settings,
        name: str,
        sink: Sink,
        on_lost: Callable[[Sequence[bytes]], None] = lambda payloads: None,
    ) -> None:
        """Keep a journal called ``name`` where it is set; ``sink`` commits to the ledger.

        ``on_lost`` is told what was noted and could not be written.

        Raises:
            JournalUnavailable: no journal can be kept there.
        """
        root = journal_folder(settings)
        size = JournalSize(settings.segment_bytes, settings.segments)
        self._journal = Journal(root, name, size)
        self._sink = sink
        self._on_lost = on_lost
        self._shipper = Shipper(self._journal, sink)
        self._sweeper = Sweeper(root, sink)
        self._noted: list[bytes] = []
        self._last: asyncio.Future[int] | None = None

    @property
    def backlog(self) -> int:
        """How many records are on this disk and not yet in the ledger."""
        return self._journal.backlog

    def start(self) -> None:
        """Begin to send records on, and those of journals that others left here."""
        self._shipper.start()
        self._sweeper.start()

    async def stop(self) -> None:
        """End. What the ledger does not take in a few seconds stays on the disk."""
        await self._sweeper.stop()
        self._submit_noted()
        if self._last is not None:
            # In order: with the last of them, all are on the disk.
            await asyncio.wait([self._last])
        await self._shipper.stop(STOP_TIMEOUT_S)
        await self._journal.close()

    async def flush(self, timeout_s: float) -> int:
        """Have what was noted written and sent on; return how many records the ledger lacks.

        For a process whose disk is about to go. Returns after ``timeout_s`` at the latest.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                self._submit_noted()
                if self._last is not None:
                    await asyncio.wait([self._last])
                while self.backlog:  # noqa: ASYNC110  # once in a process's life, for moments
                    await asyncio.sleep(FLUSH_LOOK_S)
        return self.backlog

    def check(self) -> None:
        """Return if what begins now can be written down when it ends; never blocks.

        Raises:
            JournalUnavailable: there is room for what is under way only.
        """
        self._journal.check()

    async def append(self, record: UsageRecord) -> None:
        """Return when a record is durable: on this disk, or else in the ledger.

        Raises:
            JournalUnavailable: it is neither, or the ledger did not say so in five seconds.
        """
        payload = encode(record)
        try:
            await self._journal.append(payload)
        except JournalUnavailable:
            try:
                async with asyncio.timeout(LEDGER_TIMEOUT_S):
                    await self._sink([payload])
            except Exception as error:
                raise JournalUnavailable(f"neither journal nor ledger: {error!r}") from error

    def note(self, record: LedgerRecord) -> None:
        """Have a record written soon; nobody waits for it."""
        if not self._noted:
            asyncio.get_running_loop().call_later(NOTE_GATHER_S, self._submit_noted)
        self._noted.append(encode(record))

    def _submit_noted(self) -> None:
        noted, self._noted = self._noted, []
        for payload in noted:
            self._last = self._journal.submit(payload)
            self._last.add_done_callback(partial(self._written, payload))

    def _written(self, payload: bytes, written: asyncio.Future[int]) -> None:
        if not written.cancelled() and (error := written.exception()) is not None:
            logger.error("a usage record is lost: %s", error)
            self._on_lost([payload])
