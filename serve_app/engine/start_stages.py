"""The stages of an engine's start: timed, said in the log as each begins; the first generation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Final as Constant

import orjson

from serve_app.core.types import PoolName, PriorityClass, RequestId
from serve_app.engine.api import Endpoint, EngineDead, Final, GenerateCall, GenerateItem, Refusal

logger = logging.getLogger("headrace.engine")

# A first generation may compile what later ones use.
WARM_UP_TIMEOUT_S: Constant = 900.0


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


async def warm_up(
    generate: Callable[[GenerateCall], AsyncGenerator[GenerateItem, None]],
    timeout_s: float = WARM_UP_TIMEOUT_S,
) -> None:
    """Prefill and decode for nobody: what cannot do that is not ready.

    Raises:
        EngineDead: no token came, or none in time.
    """
    call = GenerateCall(
        request_id=RequestId("warm-up"),
        endpoint=Endpoint.COMPLETIONS,
        body=orjson.dumps({"prompt": "The capital of", "max_tokens": 2, "temperature": 0}),
        stream=False,
        tenant="",
        cache_salt="warm-up",
        priority_class=PriorityClass.CRITICAL,
    )
    made_tokens = 0
    try:
        async with asyncio.timeout(timeout_s), aclosing(generate(call)) as items:
            async for item in items:
                if isinstance(item, Refusal):
                    raise EngineDead(f"the engine cannot generate: {item.message}")
                if isinstance(item, Final):
                    made_tokens = item.usage.completion_tokens
    except TimeoutError as error:
        raise EngineDead(f"the engine's first token did not come in {timeout_s:.0f} s") from error
    if not made_tokens:
        raise EngineDead("the engine's first generation ended without a token")
