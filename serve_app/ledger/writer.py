"""The ledger's one writer: whatever arrives while a commit runs goes into the next one."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Callable, Iterable
from typing import Final

from serve_app.ledger.usage import Committed, UsageLedger
from serve_app.usage import LedgerRecord, decode

logger = logging.getLogger("headrace.ledger")

BATCH_RECORDS: Final = 2000


class LedgerWriter:
    """Commits records for many senders, in groups. On one event loop."""

    def __init__(
        self, ledger: UsageLedger, on_commit: Callable[[Committed], None] = lambda _: None
    ) -> None:
        """``on_commit`` is told of every commit, on the event loop."""
        self._ledger = ledger
        self._on_commit = on_commit
        self._waiting: list[tuple[list[LedgerRecord], asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def write(self, payloads: Iterable[bytes]) -> None:
        """Return when every record in ``payloads`` is committed, by this call or before.

        Raises:
            StoreUnavailable: the database failed; nothing may be let go.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((list(_records(payloads)), done))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._commit_on())
        await done

    async def close(self) -> None:
        """Return when what was given has been committed or has failed."""
        if self._task is not None:
            await self._task

    async def _commit_on(self) -> None:
        while self._waiting:
            records: list[LedgerRecord] = []
            group: list[asyncio.Future[None]] = []
            while self._waiting and (not group or len(records) < BATCH_RECORDS):
                some, done = self._waiting.pop(0)
                records += some
                group.append(done)
            await self._commit(records, group)

    async def _commit(self, records: list[LedgerRecord], group: list[asyncio.Future[None]]) -> None:
        try:
            committed = await asyncio.to_thread(self._ledger.commit, records)
        except Exception as error:  # noqa: BLE001  # each sender hears of it, and sends again
            for done in group:
                if not done.done():
                    done.set_exception(error)
            return
        self._on_commit(committed)
        for done in group:
            if not done.done():
                done.set_result(None)


def _records(payloads: Iterable[bytes]) -> Iterable[LedgerRecord]:
    for payload in payloads:
        try:
            yield decode(payload)
        except ValueError as error:
            # Its checksum was right, so no repetition will ever make it readable. It must
            # not hold up all others; the log keeps it.
            kept = base64.b64encode(payload).decode()
            logger.error("a usage record cannot be read: %s", error, extra={"record": kept})
