"""Work that a process does over and over beside everything else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable


class Periodic:
    """One task on the running loop; what the work raises is logged and it goes on."""

    def __init__(
        self,
        work: Callable[[], Awaitable[object]],
        period_s: float,
        logger: logging.Logger,
        failed: str,
    ) -> None:
        """``failed`` is what the log says when ``work`` raises; it is done again in a period."""
        self._work = work
        self._period_s = period_s
        self._logger = logger
        self._failed = failed
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, at once."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End; work under way is interrupted. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self._work()
            except Exception:
                self._logger.exception(self._failed)
            await asyncio.sleep(self._period_s)
