"""The stages of an engine's start: timed, and said in the log as each begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.core.types import PoolName

logger = logging.getLogger("headrace.engine")


class StartStages:
    """Times the stages of a start, and logs each as it begins."""

    def __init__(self, pool: PoolName, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._clock = clock
        self.durations_s: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, doing: str) -> Iterator[None]:
        logger.info("engine starting", extra={"pool": self._pool, "doing": doing})
        began_s = self._clock()
        yield
        self.durations_s[name] = self._clock() - began_s
