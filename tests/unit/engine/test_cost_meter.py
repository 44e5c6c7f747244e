"""The cost of every request in the simulated engine, against the life of its replica."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import SimSettings
from serve_app.core import cost_meter
from serve_app.core.attribution import Account, Use
from serve_app.core.cost_meter import CostMeter, EngineCosts
from serve_app.core.engine_model import EngineModel, EngineParams, Phase, Sequence, StepRun
from serve_app.core.model_steps import ModelSteps
from serve_app.core.types import Outcome, PoolName, ReplicaId, TenantId
from serve_app.engine.api import Endpoint, Final, GenerateCall, GenerateItem, Metered
from serve_app.engine.sim import SimEngine
from tests.generate_calls import generate_call
from tests.properties import examples
from tests.steady_clock import SteadyClock

UNATTRIBUTED_RATIO_MAX = 0.001
SMALL = EngineParams(max_num_seqs=6, token_budget=64, kv_blocks=24, block_tokens=4)


class Replica:
    """An engine model in a time of its own, metered as the simulated engine does it."""

    def __init__(self, params: EngineParams) -> None:
        self.meter = CostMeter(0.0, params.block_tokens)
        self.steps = ModelSteps(self.meter, lambda model_s: model_s, lambda sequence: sequence.name)
        self.model = EngineModel(params, on_run=self._stepped, on_freed=self.steps.freed)
        self.present: list[tuple[Account, Sequence]] = []
        self.accounts: list[Account] = []
        self.runs: list[StepRun] = []
        self.now_s = 0.0
        self.idle_s = 0.0
        self.meter.ready(0.0)

    def _stepped(self, run: StepRun) -> None:
        self.runs.append(run)
        self.steps.stepped(run)

    def add(self, prompt: int, output: int, priority: int, family: int, tenant: str) -> None:
        if prompt + output > self.model.capacity_tokens:
            return
        self.meter.occupied(self.now_s)
        account = self.meter.open(tenant)
        hashes = tuple(family * 1000 + index for index in range(10 if family else 0))
        sequence = self.model.add(
            account,
            self.now_s,
            prompt_tokens=prompt,
            output_tokens=output,
            priority=priority,
            hashes=hashes,
        )
        self.accounts.append(account)
        self.present.append((account, sequence))

    def abort(self, index: int) -> None:
        if index < len(self.present):
            account, sequence = self.present.pop(index)
            self.model.abort(sequence, self.now_s)
            self.meter.close(account, Outcome.CANCELLED)

    def advance(self, until_s: float) -> None:
        """Run on; ``idle_s`` is counted from the model's own word, step by step."""
        while not math.isinf(step_s := self.model.next_step_s()) and step_s <= until_s:
            self.go_to(step_s)
        if not self.model.busy:
            self.idle_s += until_s - self.now_s
        self.go_to(until_s)

    def finish(self) -> EngineCosts:
        while self.model.busy:
            self.advance(self.model.next_step_s())
        return self.meter.read(self.now_s)

    def go_to(self, now_s: float) -> None:
        self.now_s = now_s
        self.model.advance(now_s)
        for account, sequence in self.present:
            if sequence.phase is Phase.ENDED:
                self.meter.close(account, Outcome.COMPLETED)
        self.present = [each for each in self.present if each[1].phase is not Phase.ENDED]
        if not self.model.busy:
            self.meter.vacant()


def check(replica: Replica, costs: EngineCosts) -> None:
    use = costs.use
    uses = use.uses
    assert sum(uses.values()) == use.lifetime_ns == round(replica.now_s * 1e9)
    assert uses[Use.UNATTRIBUTED] <= UNATTRIBUTED_RATIO_MAX * use.lifetime_ns
    assert uses[Use.IDLE] == pytest.approx(replica.idle_s * 1e9, abs=2 * len(replica.runs) + 2)
    assert uses[Use.OPEN] == 0
    steps_ns = sum(run.duration_s for run in replica.runs) * 1e9
    paid_ns = sum(each.engine_ns for each in replica.accounts)
    assert paid_ns == pytest.approx(steps_ns, abs=2 * len(replica.runs) + 2)
    requests = (Use.USEFUL, Use.CANCELLED, Use.PREEMPTED, Use.FAILED)
    assert sum(uses[each] for each in requests) == paid_ns
    assert use.late_ns == sum(each.late_ns for each in replica.accounts)
    held_ns = sum(each.kv_block_ns for each in replica.accounts)
    assert sum(costs.kv_block_s.values()) == pytest.approx(held_ns / 1e9)
    check_who_paid(replica)


def check_who_paid(replica: Replica) -> None:
    """Nobody pays for a step that it was not in, and who was in it alone pays for all of it."""
    least_s = dict.fromkeys(replica.accounts, 0.0)
    most_s = dict.fromkeys(replica.accounts, 0.0)
    for run in replica.runs:
        inside = {sequence.name for sequence, _ in (*run.decodes, *run.prefills)}
        for account in replica.accounts:
            if account in inside:
                most_s[account] += run.duration_s
                least_s[account] += run.duration_s if len(inside) == 1 else 0.0
    slack_ns = 2 * len(replica.runs)
    for account in replica.accounts:
        paid_ns = account.engine_ns
        assert least_s[account] * 1e9 - slack_ns <= paid_ns <= most_s[account] * 1e9 + slack_ns


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.integers(1, 60),
            st.integers(1, 40),
            st.integers(0, 2),
            st.integers(0, 2),
            st.sampled_from(["acme", "globex"]),
        ),
        st.tuples(st.just("abort"), st.integers(0, 3)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.000_3, 0.004, 0.05, 0.9])),
    ),
    min_size=3,
    max_size=40,
)


@examples(120)
@given(OPERATIONS)
def test_requests_and_idle_time_are_the_life_of_the_replica(operations: list[tuple]) -> None:
    replica = Replica(SMALL)
    for operation, *arguments in operations:
        if operation == "add":
            replica.add(*arguments)
        elif operation == "abort":
            replica.abort(*arguments)
        else:
            replica.advance(replica.now_s + arguments[0])
    check(replica, replica.finish())


def test_a_busy_hour_with_cancellations_preemptions_prefix_hits_and_idle_stretches() -> None:
    replica = Replica(replace(SMALL, max_num_seqs=16, kv_blocks=64))
    source = random.Random(6)
    for _ in range(120):
        for _ in range(source.randrange(8)):
            tenant = source.choice(["acme", "globex"])
            prompt, output = source.randrange(1, 90), source.randrange(1, 60)
            replica.add(prompt, output, source.randrange(3), source.randrange(3), tenant)
        replica.advance(replica.now_s + source.choice([0.01, 0.1, 0.3, 2.0]))
        if source.random() < 0.4:
            replica.abort(source.randrange(6))
    costs = replica.finish()
    check(replica, costs)
    uses = costs.use.uses
    assert replica.model.preemptions_total > 20
    assert replica.model.prefix_hit_tokens > 1000
    for use in (Use.USEFUL, Use.CANCELLED, Use.PREEMPTED, Use.IDLE):
        assert uses[use] > 0.001 * costs.use.lifetime_ns
    assert not costs.coefficients.provisional
    assert costs.fit_error_ratio < 0.05
    assert set(costs.kv_block_s) == {"acme", "globex"}


def one_run(params: EngineParams, *prompts: int, output: int = 1) -> Replica:
    replica = Replica(params)
    for prompt in prompts:
        replica.add(prompt, output, 1, 0, "acme")
    replica.finish()
    return replica


def test_a_long_prompt_pays_for_its_tokens_and_a_short_one_hardly() -> None:
    long, short = one_run(EngineParams(), 8000, 10).accounts
    assert long.engine_ns > 50 * short.engine_ns


def test_several_sequences_of_a_request_are_one_request() -> None:
    replica = Replica(EngineParams(overhead_s=1.0))
    replica.meter.occupied(0.0)
    four, one = replica.meter.open("acme"), replica.meter.open("acme")
    for account in (four, four, four, four, one):
        replica.model.add(account, 0.0, prompt_tokens=1, output_tokens=1)
    replica.finish()
    # Nearly all of the step is the part that a request shares as one of two, not of five.
    assert four.engine_ns == pytest.approx(one.engine_ns, rel=0.05)


def test_what_a_preemption_throws_away_is_its_cost_and_not_the_requests_own() -> None:
    params = EngineParams(
        kv_blocks=10, block_tokens=4, prefix_caching=False, overhead_s=0.0, weights_s=0.0
    )
    replica = one_run(params, 16, 16, output=9)
    first, second = replica.accounts
    assert replica.model.preemptions_total == 1
    assert first.recomputed_ns == 0
    (rerun,) = [run for run in replica.runs[1:] if run.prefills]
    # It had computed 20 of its 21 tokens; the last is new, and so is its token.
    assert rerun.prefills[0][1] - 1 == rerun.prefills[0][0].lost_tokens
    assert 0.9 * rerun.duration_s < second.recomputed_ns / 1e9 < rerun.duration_s


def test_steps_taken_together_cost_each_request_what_they_cost_one_by_one() -> None:
    together, single = (Replica(EngineParams()) for _ in range(2))
    for replica in (together, single):
        replica.add(3000, 200, 1, 0, "acme")
        replica.add(10, 200, 1, 0, "globex")
    together.now_s = together.model.next_step_s()
    together.model.advance(together.now_s)
    together.model.advance(60.0)
    together.meter.read(60.0)
    single.finish()
    assert len(together.runs) < len(single.runs) / 20
    for one, other in zip(together.accounts, single.accounts, strict=True):
        assert one.engine_ns == pytest.approx(other.engine_ns, rel=0.001)
        assert one.kv_block_ns == pytest.approx(other.kv_block_ns, rel=0.001)


def test_asking_after_every_step_changes_nothing_and_teaches_the_same() -> None:
    params = EngineParams(overhead_s=0.001, weights_s=0.0, context_s_per_token=1e-4)
    asked, left_alone = Replica(params), Replica(params)
    for replica in (asked, left_alone):
        replica.add(10, 700, 1, 0, "acme")
        replica.add(300, 700, 1, 0, "globex")
    while asked.model.busy:
        asked.go_to(asked.model.next_step_s() + 1e-7)
        costs = asked.meter.read(asked.now_s)
    left_alone.finish()
    assert costs.coefficients.kv_token_ps == pytest.approx(10**8, rel=0.01)
    assert max(run.passed for run in asked.runs) > 100
    for one, other in zip(asked.accounts, left_alone.accounts, strict=True):
        assert one.kv_block_ns == pytest.approx(other.kv_block_ns, rel=1e-4)


def test_blocks_are_held_as_long_as_the_steps_last() -> None:
    replica = one_run(replace(SMALL, block_tokens=4), 7)
    (account,) = replica.accounts
    assert account.kv_block_ns == 2 * account.engine_ns
    assert replica.meter.read(replica.now_s).kv_block_s == {
        "acme": pytest.approx(2 * account.engine_ns / 1e9)
    }


class Watch:
    """The same engine step by step, with every block of everybody looked at in every one."""

    def __init__(self, params: EngineParams) -> None:
        self.params = params
        self.model = EngineModel(params)
        self.sequences: list[Sequence] = []
        self.held_s: list[float] = []
        self.pool_s = 0.0
        self.now_s = 0.0
        self.waited = 0  # steps in which somebody held blocks and had no part

    def add(self, prompt: int, output: int, priority: int, family: int, tenant: str) -> None:
        if prompt + output > self.model.capacity_tokens:
            return
        hashes = tuple(family * 1000 + index for index in range(10 if family else 0))
        tokens = {"prompt_tokens": prompt, "output_tokens": output}
        self.sequences.append(
            self.model.add(tenant, self.now_s, priority=priority, hashes=hashes, **tokens)
        )
        self.held_s.append(0.0)

    def abort(self, index: int) -> None:
        present = [each for each in self.sequences if each.phase is not Phase.ENDED]
        if index < len(present):
            self.model.abort(present[index], self.now_s)

    def advance(self, until_s: float) -> None:
        while not math.isinf(step_s := self.model.next_step_s()):
            self._look(min(step_s, until_s) - self.now_s)
            self.now_s = min(step_s, until_s)
            if step_s > until_s:
                break
            self.model.advance(step_s)
        self.now_s = until_s
        self.model.advance(self.now_s)

    def _look(self, lasts_s: float) -> None:
        size = self.params.block_tokens
        for number, sequence in enumerate(self.sequences):
            tokens = sequence.computed_tokens
            if sequence.phase is Phase.DECODE:
                tokens = sequence.prompt_tokens + self.model.generated(sequence)
            elif sequence.phase in (Phase.WAITING, Phase.ENDED):
                continue
            self.waited += sequence.phase is Phase.STALLED
            self.held_s[number] += -(-tokens // size) * lasts_s
        self.pool_s += (self.model.kv.total - self.model.kv.free()) * lasts_s


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_what_each_held_of_the_kv_cache_is_what_every_step_shows(prefix_caching: bool) -> None:
    # Contexts are long enough that a later step lasts much longer than an earlier one.
    params = replace(
        SMALL,
        max_num_seqs=12,
        kv_blocks=60,
        context_s_per_token=1e-4,
        prefix_caching=prefix_caching,
    )
    replica, watch = Replica(params), Watch(params)
    source = random.Random(11)
    aborted = 0
    for _ in range(400):
        for _ in range(source.randrange(4)):
            tenant = source.choice(["acme", "globex"])
            sizes = source.randrange(1, 100), source.randrange(1, 90)
            arguments = (*sizes, source.randrange(3), source.randrange(3), tenant)
            replica.add(*arguments)
            watch.add(*arguments)
        until_s = replica.now_s + source.choice([0.003, 0.03, 0.3, 2.0])
        # One looks at every step, the other now and then: it has to know of the steps between.
        replica.model.advance(until_s)
        replica.go_to(until_s)
        watch.advance(until_s)
        if source.random() < 0.5 and replica.present:
            index = source.randrange(len(replica.present))
            replica.abort(index)
            watch.abort(index)
            aborted += 1
    replica.model.advance(10**6)
    replica.go_to(10**6)
    watch.advance(10**6)
    costs = replica.meter.read(10**6)
    assert aborted > 50
    assert watch.waited > 5
    assert replica.model.preemptions_total > 50
    assert max(run.steps for run in replica.runs) > 5
    # Nanoseconds are whole: of each run each loses less than one for every block.
    for account, held_s in zip(replica.accounts, watch.held_s, strict=True):
        assert account.kv_block_ns / 1e9 == pytest.approx(held_s, rel=1e-6, abs=1e-6)
    for tenant in ("acme", "globex"):
        whose = [n for n, each in enumerate(watch.sequences) if each.name == tenant]
        held_s = sum(watch.held_s[number] for number in whose)
        assert costs.kv_block_s[TenantId(tenant)] == pytest.approx(held_s, rel=1e-6)
    if not prefix_caching:
        # Nothing is shared: all of it is what the cache itself says is taken.
        assert sum(costs.kv_block_s.values()) == pytest.approx(watch.pool_s, rel=1e-6)


def test_tenants_without_end_share_one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_meter, "TENANTS_MAX", 2)
    replica = Replica(SMALL)
    for number in range(5):
        replica.add(8, 1, 1, 0, f"tenant {number}")
    costs = replica.finish()
    assert set(costs.kv_block_s) == {"tenant 0", "tenant 1", TenantId("")}


# ---- the engine itself -------------------------------------------------------------


def call(name: str, tenant: str, text: str, max_tokens: int) -> GenerateCall:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": max_tokens,
    }
    return generate_call(name, body, endpoint=Endpoint.CHAT, tenant=tenant, cache_salt=tenant)


async def use(items: AsyncGenerator[GenerateItem, None], frames_max: int | None) -> Final | None:
    """Read a stream, up to so many frames; the end of the request if it was reached."""
    try:
        count = 0
        async for item in items:
            if isinstance(item, Final):
                return item
            count += 1
            if count == frames_max:
                return None
    finally:
        await items.aclose()
    return None


async def test_the_simulated_engine_says_what_each_request_cost_and_where_the_rest_went() -> None:
    settings_ = SimSettings(
        speed=20.0, max_model_len=2048, kv_blocks=150, max_num_seqs=16, start_delay_s=0.01
    )
    engine = SimEngine(settings_, PoolName("pool"), ReplicaId("r0"), SteadyClock())
    metered: list[Metered] = []
    engine.on_metered(metered.append)
    await engine.start()
    for round_ in range(3):
        streams = [
            use(
                engine.generate(
                    call(f"{round_}-{n}", "acme" if n % 2 else "globex", "same start " * 40, 400)
                ),
                frames_max=5 if n % 4 == 3 else None,
            )
            for n in range(12)
        ]
        finals = await asyncio.gather(*streams)
        await asyncio.sleep(0.02)  # an idle stretch
    assert engine.snapshot().preemptions_total > 0
    await engine.drain(5.0)
    await engine.stop()
    costs = engine.costs()
    assert costs is not None
    uses = costs.use.uses
    lifetime_ns = costs.use.lifetime_ns
    assert sum(uses.values()) == lifetime_ns
    assert uses[Use.UNATTRIBUTED] <= UNATTRIBUTED_RATIO_MAX * lifetime_ns
    assert uses[Use.OPEN] == 0
    for each in (Use.START_UP, Use.USEFUL, Use.CANCELLED, Use.PREEMPTED, Use.IDLE):
        assert uses[each] > 0
    assert {each.outcome for each in metered} == {Outcome.COMPLETED, Outcome.CANCELLED}
    recorded_ns = sum(round(each.usage.engine_s * 1e9) for each in metered) + costs.use.late_ns
    requests = (Use.USEFUL, Use.CANCELLED, Use.PREEMPTED)
    assert recorded_ns == sum(uses[each] for each in requests)
    assert any(each is not None and each.usage.engine_s > 0 for each in finals)
    # Of every tenant the records say what the engine does, but for what is less than a unit.
    for tenant, held_s in costs.kv_block_s.items():
        records = [each.usage.kv_block_us for each in metered if each.tenant == tenant]
        assert sum(records) / 1e6 == pytest.approx(held_s, abs=1e-6 * len(records))
        assert all(records)


async def test_time_after_the_last_step_is_idle_even_if_nobody_looked() -> None:
    now_s = 99.5
    settings_ = SimSettings(speed=2.0, max_model_len=2048, weights_s=0.199, overhead_s=0.001)
    engine = SimEngine(settings_, PoolName("pool"), ReplicaId("r0"), lambda: now_s)
    starting = asyncio.ensure_future(engine.start())
    for _ in range(5):
        await asyncio.sleep(0)
    now_s = 100.0  # its warm-up took two steps
    await starting
    for name, comes_s, leaves_s in (("first", 100.0, 100.0), ("second", 105.0, 110.0)):
        now_s = comes_s
        leaves = asyncio.ensure_future(anext(engine.generate(call(name, "acme", "hello", 5))))
        for _ in range(5):  # turns in which the first step is composed
            await asyncio.sleep(0)
        now_s = leaves_s
        leaves.cancel()
        await asyncio.wait([leaves])
    now_s = 110.0
    costs = engine.costs()
    await engine.stop()
    assert costs is not None
    uses = costs.use.uses
    # Steps of 0.2 s of the model's time, 0.1 s: the first left in one, the second after five.
    assert uses[Use.CANCELLED] == pytest.approx(0.6e9, rel=0.01)
    assert uses[Use.IDLE] == 10 * 10**9 - uses[Use.CANCELLED]
    assert uses[Use.UNATTRIBUTED] == 0


async def test_an_engine_without_latency_claims_no_engine_time() -> None:
    settings_ = SimSettings(zero_latency=True, max_model_len=2048)
    engine = SimEngine(settings_, PoolName("pool"), ReplicaId("r0"), time.monotonic)
    await engine.start()
    final = await use(engine.generate(call("a", "acme", "hello", 5)), None)
    await engine.stop()
    assert final is not None
    assert final.usage.engine_s == 0.0
    assert engine.costs() is None
