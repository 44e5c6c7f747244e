"""A router's contact with Control: two tasks that keep it, and those who wait for its answers.

Limits and money have one each. What is said and what answers mean is theirs; that Control
may be away, in whatever way, is here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar, cast

PATIENCE_S = 1.0
AWAY_PAUSE_S = 0.25

Answer = TypeVar("Answer")
Lack = TypeVar("Lack")
Got = TypeVar("Got")


class Contact:
    """One per link of a router. ``away`` says that Control did not answer lately."""

    def __init__(self, what: str, logger: logging.Logger, clock: Callable[[], float]) -> None:
        """``what`` cannot be had while Control is away, in the log's words."""
        self._what = what
        self._logger = logger
        self._clock = clock
        self._kick = asyncio.Event()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.away = False

    def start(self, *loops: Coroutine[Any, Any, None]) -> None:
        """Run these on the running loop until ``stop``."""
        self._tasks = [asyncio.create_task(each) for each in loops]

    async def stop(self) -> None:
        """End what was started. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    def kick(self) -> None:
        """There is something to say to Control."""
        self._kick.set()

    async def kicked(self, within_s: float | None) -> bool:
        """Wait until there is something to say; tell if there is within that time."""
        try:
            async with asyncio.timeout(within_s):
                await self._kick.wait()
        except TimeoutError:
            return False
        finally:
            self._kick.clear()
        return True

    def wake(self) -> None:
        """Have everybody who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def ask(self, call: Awaitable[Answer], timeout_s: float) -> Answer | None:
        """Return Control's answer; None after a pause if there was none: it is away then."""
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # away in whatever way
            self._lost(error)
        await asyncio.sleep(AWAY_PAUSE_S)
        return None

    async def fetch(
        self,
        lacking: Lack,
        attempt: Callable[[], Lack | Got],
        kind: type[Lack],
        want: Callable[[Lack], bool],
    ) -> Got | None:
        """Get what is lacking, then try again; None if Control cannot be asked now.

        ``want`` notes what to ask for, and returns False where that is of no use. What
        ``attempt`` returns is lacking still if it is of this ``kind``.
        """
        give_up_at_s = self._clock() + PATIENCE_S
        while not self.away and want(lacking):
            self.kick()
            try:
                async with asyncio.timeout(give_up_at_s - self._clock()):
                    await self._changed.wait()
            except TimeoutError:
                return None
            answer = attempt()
            if not isinstance(answer, kind):
                return cast("Got", answer)
            lacking = answer
        return None

    def _lost(self, error: Exception) -> None:
        """Have nobody wait for a Control that is away."""
        if not self.away:
            kind = type(error).__name__
            self._logger.warning("%s cannot be asked for: %s: %.200s", self._what, kind, error)
        self.away = True
        self.wake()
