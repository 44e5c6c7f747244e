"""The end of a replica whose node is taken away: nothing new, what runs while there is time.

    notice                                 working_s                  notice_s
      |-- told to every router at once ------|-- the rest is ended ------|
      |   what runs goes on                  |   accounts to the ledger  | the node is gone

What is ended raises EngineDead: a request of which nothing was delivered goes to another
replica, any other stream ends with an error event unless its router can have it continued.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from serve_app.config import working_s

logger = logging.getLogger("headrace.engine")


class Drainable(Protocol):
    """What a drain asks of an engine; see api.Engine."""

    async def drain(self, deadline_s: float) -> int: ...


class Drain:
    """One per replica, idle until ``begin``. On its event loop only."""

    def __init__(
        self,
        engine: Drainable,
        *,
        tell: Callable[[float, str], Awaitable[None]],
        settle: Callable[[float], Awaitable[int]],
        clock: Callable[[], float],
    ) -> None:
        """``tell`` says at once that the replica drains, for how long and why.

        ``settle`` has all accounts sent within so many seconds and returns how many records
        the ledger lacks after that.
        """
        self._engine = engine
        self._tell = tell
        self._settle = settle
        self._clock = clock
        self._ends_at_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether the replica takes nothing new any more."""
        return self._ends_at_s is not None

    def begin(self, notice_s: float, why: str) -> None:
        """Stop taking work; what runs has ``working_s`` of ``notice_s``.

        A later notice counts if it ends earlier.
        """
        ends_at_s = self._clock() + max(0.0, notice_s)
        if self._ends_at_s is not None and ends_at_s >= self._ends_at_s:
            return
        self._ends_at_s = ends_at_s
        if self._task is not None:
            self._task.cancel()
        self._task = asyncio.create_task(self._run(max(0.0, notice_s), why))

    async def stop(self) -> None:
        """End, finished or not. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self, notice_s: float, why: str) -> None:
        began_s = self._clock()
        logger.warning("replica drains", extra={"reason": why, "notice_s": notice_s})
        draining = asyncio.create_task(self._engine.drain(working_s(notice_s)))
        try:
            # It stands in the load from the engine's first turn on.
            await asyncio.sleep(0)
            try:
                await self._tell(notice_s, why)
            except Exception:  # what is known too late is moved by routers; the rest goes on
                logger.exception("routers were not told of a drain")
            cut = await draining
            rest_s = began_s + notice_s - self._clock()
            unsent = await self._settle(max(0.0, rest_s))
        finally:
            draining.cancel()
        took_s = round(self._clock() - began_s, 3)
        told = {"reason": why, "duration_s": took_s, "cut_off": cut, "unsent_records": unsent}
        logger.warning("replica drained", extra=told)
