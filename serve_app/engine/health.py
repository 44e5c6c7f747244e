"""Whether a replica's engine can generate, asked by Serve, the load publisher and the metrics."""

from __future__ import annotations

import logging
from collections.abc import Callable

from serve_app.core.progress import ProgressWatch
from serve_app.engine.api import Engine, EngineDead

logger = logging.getLogger("headrace.engine")


class EngineHealth:
    """An engine is healthy if it says so and its steps go on while requests are in it.

    ``check`` is to be called several times per ``stalled_after_s``, which the load publisher
    does by itself.
    """

    def __init__(self, engine: Engine, stalled_after_s: float, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._watch = ProgressWatch(stalled_after_s)
        self._clock = clock
        self._told = False

    @property
    def waited_s(self) -> float:
        """For how long requests have been in the engine without a step, seconds."""
        return self._watch.waited_s

    async def check(self) -> None:
        """Return if the engine can generate.

        Raises:
            EngineDead: it says that it cannot, or it has made no step for too long.
        """
        await self._engine.check_health()
        self._watch.look(self._engine.progress(), self._clock())
        stalled, waited_s = self._watch.stalled, self._watch.waited_s
        if stalled != self._told:
            self._told = stalled
            if stalled:
                logger.error("engine stalled", extra={"waited_s": round(waited_s, 1)})
            else:
                logger.warning("engine goes on")
        if stalled:
            raise EngineDead(
                f"the engine has made no step for {waited_s:.0f} s with requests in it "
                "(stalled_after_s)"
            )
