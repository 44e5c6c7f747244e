"""A replica that answers and no longer generates is found, on the simulated engine, at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from serve_app.config import SimSettings
from serve_app.core.types import PoolName, ReplicaId, Usage
from serve_app.engine.api import (
    EngineDead,
    EngineTimings,
    Final,
    GenerateCall,
    GenerateItem,
    Refusal,
)
from serve_app.engine.health import EngineHealth
from serve_app.engine.sim import SimEngine
from serve_app.engine.start_stages import warm_up
from tests.generate_calls import generate_call

STALLED_AFTER_S = 120.0


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    settings = SimSettings(zero_latency=True, max_model_len=4096)
    engine = SimEngine(settings, PoolName("p"), ReplicaId("r"), lambda: 0.0)
    await engine.start()
    yield engine
    await engine.stop()


def call(name: str = "a") -> GenerateCall:
    return generate_call(name, {"prompt": "hello", "max_tokens": 20})


async def look_for(health: EngineHealth, clock: Clock, seconds: int) -> None:
    for _ in range(seconds):
        clock.now_s += 1
        await health.check()


async def test_a_frozen_engine_with_work_is_unhealthy_after_the_bound_and_well_when_it_goes_on(
    engine: SimEngine, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "headrace.engine")
    health = EngineHealth(engine, STALLED_AFTER_S, clock)
    await look_for(health, clock, 1000)
    engine.freeze()
    await look_for(health, clock, 1000)  # nobody waits: nothing is wrong
    items = engine.generate(call())
    reading = asyncio.ensure_future(anext(items))
    await asyncio.sleep(0)
    await engine.check_health()  # it answers all the same
    await look_for(health, clock, 120)
    with pytest.raises(EngineDead, match=r"no step for 120 s .*stalled_after_s"):
        await look_for(health, clock, 1)
    with pytest.raises(EngineDead):
        await look_for(health, clock, 1)
    engine.thaw()
    assert await reading
    assert [item async for item in items], "the request ends as if nothing had been"
    await look_for(health, clock, 1000)
    assert [each.message for each in caplog.records] == ["engine stalled", "engine goes on"]
    assert health.waited_s == 0.0


async def test_an_engine_that_says_it_is_dead_is_unhealthy_at_once(
    engine: SimEngine, clock: Clock
) -> None:
    health = EngineHealth(engine, STALLED_AFTER_S, clock)
    engine.kill()
    with pytest.raises(EngineDead, match="dead"):
        await health.check()


# The first generation


def generating(*items: GenerateItem | None):
    """A generate that yields these; None hangs."""

    async def generate(_: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        for item in items:
            if item is None:
                await asyncio.Event().wait()
            else:
                yield item

    return generate


def final(tokens: int) -> Final:
    return Final(Usage(3, 0, tokens), EngineTimings(), frames=1)


async def test_a_warm_up_that_generates_makes_ready() -> None:
    await warm_up(generating(final(2)))


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([Refusal(503, "full")], "cannot generate: full"),
        ([final(0)], "without a token"),
        ([], "without a token"),
        ([None], "did not come in 0 s"),
    ],
)
async def test_what_generates_nothing_is_not_ready(
    items: list[GenerateItem | None], why: str
) -> None:
    with pytest.raises(EngineDead, match=why):
        await warm_up(generating(*items), timeout_s=0.001)


async def test_a_started_simulated_engine_has_made_its_first_token_and_metered_nobody() -> None:
    engine = SimEngine(SimSettings(zero_latency=True), PoolName("p"), ReplicaId("r"), lambda: 0.0)
    metered: list[object] = []
    engine.on_metered(metered.append)
    info = await engine.start()
    assert engine.progress().steps == 2
    assert not engine.progress().busy
    assert metered == []
    assert set(info.stages_s) == {"load", "warm_up"}
    await engine.stop()
