"""From journals to the ledger: in batches, again and again until it has committed them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

from serve_app.journal.abandoned import Abandoned, abandoned, journals
from serve_app.journal.frames import Entry
from serve_app.journal.journal import Journal

logger = logging.getLogger("headrace.journal")

# Returns once the payloads are committed; whatever it raises means that they are not.
Sink = Callable[[list[bytes]], Awaitable[None]]

BATCH_RECORDS: Final = 1000
GATHER_S: Final = 0.25
SINK_TIMEOUT_S: Final = 30.0
RETRY_S: Final = 1.0
SWEEP_PERIOD_S: Final = 5.0


class Shipper:
    """Sends a process's own journal on, one batch at a time."""

    def __init__(self, journal: Journal, sink: Sink, *, gather_s: float = GATHER_S) -> None:
        """``gather_s`` is how long records may gather before they are sent together."""
        self._journal = journal
        self._sink = sink
        self._gather_s = gather_s
        self._task: asyncio.Task[None] | None = None
        self._is_away = False

    def start(self) -> None:
        """Begin on the running loop."""
        self._task = asyncio.create_task(self._ship_on())

    async def stop(self, timeout_s: float) -> None:
        """End; what is left is sent if that takes no longer than ``timeout_s``."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        try:
            async with asyncio.timeout(timeout_s):
                while self._journal.backlog:
                    await self._ship()
        except Exception as error:  # noqa: BLE001  # the journal stays for whoever finds it
            logger.warning("%d usage records stay journalled: %s", self._journal.backlog, error)

    async def _ship_on(self) -> None:
        while True:
            await self._journal.unacknowledged(1)
            if self._journal.backlog < BATCH_RECORDS:
                await asyncio.sleep(self._gather_s)
            try:
                await self._ship()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  # away in whatever way
                if not self._is_away:
                    logger.warning("the ledger is away: %s: %.200s", type(error).__name__, error)
                self._is_away = True
                await asyncio.sleep(RETRY_S)
            else:
                self._is_away = False

    async def _ship(self) -> None:
        entries = await self._journal.unacknowledged(BATCH_RECORDS)
        async with asyncio.timeout(SINK_TIMEOUT_S):
            await self._sink([entry.payload for entry in entries])
        self._journal.acknowledge(entries[-1].sequence)


class Sweeper:
    """Looks for journals below a folder that their processes left, and sends those on."""

    def __init__(self, root: Path, sink: Sink, *, period_s: float = SWEEP_PERIOD_S) -> None:
        self._root = root
        self._sink = sink
        self._period_s = period_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin on the running loop."""
        self._task = asyncio.create_task(self._sweep_on())

    async def stop(self) -> None:
        """End; a journal that is being sent is left for whoever looks next."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def sweep(self) -> int:
        """Send every journal on that was left; return how many records there were.

        One that cannot be read or sent stays as it is, and the next one is sent.
        """
        total = 0
        for path in await asyncio.to_thread(journals, self._root):
            try:
                with abandoned(path) as found:
                    if found is not None:
                        total += await self._send(found)
            except Exception as error:  # noqa: BLE001  # the next round tries again
                why = f"{type(error).__name__}: {error}"
                logger.warning("journal %s stays where it is: %.200s", path.name, why)
        return total

    async def _send(self, found: Abandoned) -> int:
        count = 0
        batches: Iterator[list[Entry]] = found.batches()
        while batch := await asyncio.to_thread(next, batches, None):
            for start in range(0, len(batch), BATCH_RECORDS):
                some = batch[start : start + BATCH_RECORDS]
                async with asyncio.timeout(SINK_TIMEOUT_S):
                    await self._sink([entry.payload for entry in some])
                count += len(some)
        await asyncio.to_thread(found.discard)
        what = {"journal": found.name, "records": count, "problems": found.problems}
        logger.info("a journal that was left behind is in the ledger", extra=what)
        return count

    async def _sweep_on(self) -> None:
        while True:
            try:
                await self.sweep()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  # the next round tries again
                logger.warning("journals left behind cannot be looked for: %.200s", error)
            await asyncio.sleep(self._period_s)
