"""A replica whose node is taken away, around the simulated engine in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from serve_app.config import SimSettings
from serve_app.core.types import Outcome, PoolName, ReplicaId
from serve_app.engine.api import EngineDead, Final, Frame, GenerateCall, Metered
from serve_app.engine.drain import Drain
from serve_app.engine.sim import SimEngine
from tests.generate_calls import generate_call
from tests.virtual_time import run

# One token of one request takes so long: overhead and weights.
TOKEN_S = 0.01
SETTINGS = SimSettings(
    overhead_s=0.0,
    weights_s=TOKEN_S,
    prefill_s_per_token=0.0,
    context_s_per_token=0.0,
    batch_s_per_request=0.0,
)


@dataclass
class Replica:
    """An engine, its drain, and all that either said, with the time since the start."""

    engine: SimEngine
    drain: Drain
    clock: Callable[[], float]
    begun_s: float
    metered: list[Metered] = field(default_factory=list)
    told: list[tuple[float, bool, float, str]] = field(default_factory=list)
    settled: list[tuple[float, float]] = field(default_factory=list)

    def now_s(self) -> float:
        return self.clock() - self.begun_s

    async def ask(self, name: str, tokens: int) -> tuple[str, int, float]:
        """Return how a stream ended, with how many tokens and when."""
        got = 0
        try:
            async for item in self.engine.generate(call(name, tokens)):
                if isinstance(item, Frame):
                    got += len(item.token_ids)
                elif isinstance(item, Final):
                    return "done", got, self.now_s()
        except EngineDead as error:
            return str(error), got, self.now_s()
        raise AssertionError("it was refused")


def call(name: str, tokens: int) -> GenerateCall:
    return generate_call(name, {"prompt": "hi", "max_tokens": tokens, "stream": True})


def with_replica(test: Callable[[Replica], Coroutine[Any, Any, None]]) -> None:
    """Run a test around a replica in virtual time."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        engine = SimEngine(SETTINGS, PoolName("p"), ReplicaId("r"), clock)
        await engine.start()

        async def tell(notice_s: float, why: str) -> None:
            said = (replica.now_s(), engine.snapshot().draining, notice_s, why)
            replica.told.append(said)

        async def settle(timeout_s: float) -> int:
            replica.settled.append((replica.now_s(), timeout_s))
            return 0

        drain = Drain(engine, tell=tell, settle=settle, clock=clock)
        replica = Replica(engine, drain, clock, clock())
        engine.on_metered(replica.metered.append)
        await test(replica)
        await drain.stop()
        await engine.stop()

    run(main())


def test_at_a_notice_work_that_fits_ends_and_the_rest_is_cut_off_in_time() -> None:
    async def test(replica: Replica) -> None:
        short = asyncio.create_task(replica.ask("short", 500))
        long = asyncio.create_task(replica.ask("long", 100_000))
        await asyncio.sleep(1.0)
        replica.drain.begin(30.0, "node")
        await asyncio.sleep(0.001)
        assert replica.told == [(pytest.approx(1.0, abs=0.01), True, 30.0, "node")]
        assert await short == ("done", 500, pytest.approx(5.0, abs=0.1))
        assert replica.settled == []
        # A tenth of the notice is for accounts.
        how, tokens, ended_s = await long
        assert how == "the replica's time was over"
        assert ended_s == pytest.approx(1.0 + 27.0, abs=0.1)
        assert tokens == pytest.approx(ended_s / TOKEN_S, abs=5)
        await asyncio.sleep(0)
        assert [(m.request_id, m.outcome) for m in replica.metered] == [
            ("short", Outcome.COMPLETED),
            ("long", Outcome.FAILED),
        ]
        assert replica.metered[-1].usage.completion_tokens >= tokens
        await asyncio.sleep(0.1)
        [(settled_s, left_s)] = replica.settled
        assert settled_s == pytest.approx(28.0, abs=0.1)
        assert left_s == pytest.approx(3.0, abs=0.1)

    with_replica(test)


def test_what_comes_after_the_notice_is_sent_elsewhere() -> None:
    async def test(replica: Replica) -> None:
        replica.drain.begin(30.0, "node")
        await asyncio.sleep(0.001)
        assert (await replica.ask("late", 5))[:2] == ("the engine is draining", 0)
        assert replica.metered == []

    with_replica(test)


def test_a_drain_goes_on_though_nobody_could_be_told() -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        engine = SimEngine(SETTINGS, PoolName("p"), ReplicaId("r"), clock)
        await engine.start()
        settled: list[float] = []

        async def tell(notice_s: float, why: str) -> None:
            raise OSError("no socket")

        async def settle(timeout_s: float) -> int:
            settled.append(timeout_s)
            return 0

        drain = Drain(engine, tell=tell, settle=settle, clock=clock)
        drain.begin(30.0, "test")
        while not settled:  # noqa: ASYNC110  # virtual time
            await asyncio.sleep(1.0)
        await drain.stop()
        await engine.stop()

    run(main())


def test_an_idle_replica_is_done_at_once() -> None:
    async def test(replica: Replica) -> None:
        assert not replica.drain.begun
        replica.drain.begin(30.0, "node")
        assert replica.drain.begun
        await asyncio.sleep(0.1)
        [(settled_s, left_s)] = replica.settled
        assert (settled_s, left_s) == (pytest.approx(0.0, abs=0.01), pytest.approx(30.0, abs=0.01))

    with_replica(test)


@pytest.mark.parametrize(("later_s", "ends_s"), [(100.0, 27.0), (40.0, 27.0), (10.0, 5.0 + 9.0)])
def test_the_earliest_of_several_notices_counts(later_s: float, ends_s: float) -> None:
    async def test(replica: Replica) -> None:
        long = asyncio.create_task(replica.ask("long", 100_000))
        await asyncio.sleep(0)
        replica.drain.begin(30.0, "node")
        await asyncio.sleep(5.0)
        replica.drain.begin(later_s, "aws")
        _, _, ended_s = await long
        assert ended_s == pytest.approx(ends_s, abs=0.1)
        await asyncio.sleep(0.1)
        assert len(replica.settled) == 1

    with_replica(test)


def test_a_notice_that_came_too_late_cuts_at_once() -> None:
    async def test(replica: Replica) -> None:
        long = asyncio.create_task(replica.ask("long", 100_000))
        await asyncio.sleep(1.0)
        replica.drain.begin(-4.0, "file")
        how, _, ended_s = await long
        assert (how, ended_s) == ("the replica's time was over", pytest.approx(1.0, abs=0.1))
        await asyncio.sleep(0.1)
        [(_, left_s)] = replica.settled
        assert left_s == 0.0

    with_replica(test)
