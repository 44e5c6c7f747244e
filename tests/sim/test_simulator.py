"""The simulator loses nothing, repeats itself, and its faults do what they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from serve_app.core.engine_model import EngineParams
from serve_app.core.policy import PoolPolicy
from serve_app.core.routing import HeavyPool
from serve_app.core.types import Outcome, PoolName, PriorityClass
from serve_app.sim.contenders import CONTENDERS, contend
from serve_app.sim.records import Run
from serve_app.sim.setup import CHAT_POOL, Clients, Fault, FaultKind, PoolSetup, Setup
from serve_app.sim.simulator import Simulator, simulate
from serve_app.sim.summary import summarise
from serve_app.sim.workload import Lengths, Traffic, arrivals

pytestmark = pytest.mark.slow

MIXED = {PriorityClass.CRITICAL: 0.3, PriorityClass.STANDARD: 0.4, PriorityClass.SHEDDABLE: 0.3}


def small(rate_per_s: float, **changes: object) -> tuple[Setup, Traffic]:
    """Two replicas for half a minute: their knee is near 29 requests/s."""
    setup = Setup((PoolSetup(CHAT_POOL, PoolPolicy(), replicas=2),), 30.0, warmup_s=5.0)
    return replace(setup, **changes), Traffic("chat", rate_per_s, ("a", "b"), classes=MIXED)


def fates(run: Run) -> list[tuple[object, ...]]:
    return [
        (each.arrival, each.outcome, each.refusal, each.attempts, each.ttft_s, each.ended_s)
        for each in run.questions
    ]


@pytest.mark.parametrize("contender", sorted(CONTENDERS))
def test_a_seed_repeats_every_fate(contender: str) -> None:
    setup, traffic = small(40.0, clients=Clients(2, patience_s=4.0, obedient_ratio=0.5))
    setup = contend(setup, contender)
    assert fates(simulate(setup, [traffic], 1)) == fates(simulate(setup, [traffic], 1))


@pytest.mark.parametrize("contender", ["headrace", "least-loaded"])
@pytest.mark.parametrize("kind", [None, *FaultKind])
def test_every_question_ends_once_and_nothing_stays_behind(
    contender: str, kind: FaultKind | None
) -> None:
    faults = () if kind is None else (Fault(10.0, kind, duration_s=8.0),)
    setup, traffic = small(
        35.0, faults=faults, clients=Clients(3, patience_s=5.0, obedient_ratio=0.5)
    )
    setup = contend(setup, contender)
    simulator = Simulator(setup, arrivals([traffic], setup.duration_s, 2), 2)
    run = simulator.run()
    assert len(run.questions) > 900
    for each in run.questions:
        assert each.outcome is not None or each.refusal is not None
        assert each.ended_s >= each.arrival.arrival_s
        assert 1 <= each.attempts <= 4
        if each.outcome is Outcome.COMPLETED:
            assert each.ttft_s is not None
            assert 1 <= each.output_tokens <= each.arrival.output_tokens
    assert simulator.open_requests() == 0
    assert simulator.engines_busy() == 0
    assert run.ended_at_s < setup.duration_s + setup.drain_s


def test_an_unloaded_engine_answers_in_the_time_of_its_physics() -> None:
    fixed = Lengths(1000, 0.0, 1, 10_000)
    setup, _ = small(1.0)
    traffic = Traffic("lone", 0.1, prompts=fixed, outputs=replace(fixed, median_tokens=100))
    run = simulate(setup, [traffic], 3)
    engine = EngineParams()
    ttft_s = engine.overhead_s + 1000 * engine.prefill_s_per_token + engine.batch_s_per_request
    context_s = engine.context_s_per_token * (1001 + 1099) / 2
    tpot_s = engine.overhead_s + engine.weights_s + context_s + engine.batch_s_per_request
    assert run.questions
    for each in run.questions:
        assert each.ttft_s == pytest.approx(ttft_s, rel=1e-6)
        assert each.tpot_s == pytest.approx(tpot_s, rel=1e-3)


def test_engines_process_exactly_what_was_answered_when_nothing_is_lost() -> None:
    setup, traffic = small(10.0)
    run = simulate(setup, [traffic], 4)
    assert {each.outcome for each in run.questions} == {Outcome.COMPLETED}
    useful = sum(each.arrival.prompt_tokens + each.output_tokens - 1 for each in run.questions)
    assert run.processed_tokens == useful
    assert summarise(run, setup)["wasted_token_ratio"] == 0


def test_an_overloaded_engine_without_admission_wastes_work_on_clients_that_left() -> None:
    setup, traffic = small(60.0, clients=Clients(3, patience_s=5.0))
    figures = summarise(simulate(contend(setup, "least-loaded"), [traffic], 5), setup)
    assert figures["wasted_token_ratio"] > 0.2
    assert figures["retry_amplification"] > 1.5


def test_clients_ask_again_as_often_as_told_and_no_more() -> None:
    policy = PoolPolicy(max_concurrency_per_replica=1, queue_capacity=0)
    setup, traffic = small(20.0, clients=Clients(2, backoff_s=0.2))
    setup = replace(setup, pools=(replace(setup.pools[0], policy=policy),))
    run = simulate(setup, [traffic], 6)
    refused = [each for each in run.questions if each.outcome is None]
    assert refused
    assert {each.attempts for each in refused} == {3}
    assert run.offered_attempts == sum(each.attempts for each in run.questions)


def test_a_killed_replica_fails_over_what_had_no_token_and_comes_back() -> None:
    setup, traffic = small(25.0, faults=(Fault(10.0, FaultKind.KILL),))
    setup = replace(setup, pools=(replace(setup.pools[0], cold_start_s=10.0),))
    run = simulate(setup, [traffic], 7)
    failed = [each for each in run.questions if each.outcome is Outcome.FAILED]
    assert len(failed) == run.lost_requests > 0
    assert all(each.arrival.arrival_s < 10.0 for each in failed)
    sizes = {int(sample.at_s): sample.replicas for sample in run.samples}
    assert (sizes[9], sizes[15], sizes[22]) == (2, 1, 2)


def test_a_draining_replica_gets_nothing_new_and_finishes_what_it_has() -> None:
    setup, traffic = small(8.0, faults=(Fault(10.0, FaultKind.DRAIN, duration_s=120.0),))
    run = simulate(setup, [traffic], 8)
    assert {each.outcome for each in run.questions} == {Outcome.COMPLETED}
    assert run.lost_requests == 0


def test_a_hung_replica_is_left_by_its_clients_and_replaced() -> None:
    setup, traffic = small(
        8.0,
        faults=(Fault(10.0, FaultKind.HANG, duration_s=5.0),),
        clients=Clients(3, patience_s=1.0),
    )
    setup = replace(setup, pools=(replace(setup.pools[0], cold_start_s=5.0),))
    run = simulate(setup, [traffic], 9)
    outcomes = Counter(each.outcome for each in run.questions)
    assert outcomes[Outcome.COMPLETED] > 0.9 * len(run.questions)
    waited = [each for each in run.questions if each.attempts > 1 and each.ttft_s is not None]
    assert waited
    # What a client spent with the hung replica counts.
    assert all(each.ttft_s > 1.0 for each in waited if not each.refused)


def test_long_contexts_run_in_the_heavy_pool_only() -> None:
    heavy = PoolName("heavy")
    setup, _ = small(1.0)
    setup = replace(
        setup,
        pools=(*setup.pools, PoolSetup(heavy, PoolPolicy(), replicas=1)),
        heavy=HeavyPool(heavy, 20_000),
    )
    long = Traffic("long", 0.5, prompts=Lengths(40_000, 0.1, 30_000, 50_000))
    short = Traffic("short", 5.0)
    simulator = Simulator(setup, arrivals([short, long], 30.0, 10), 10)
    run = simulator.run()
    long_ones = [each for each in run.questions if each.arrival.kind == "long"]
    short_ones = [each for each in run.questions if each.arrival.kind == "short"]
    assert {each.outcome for each in short_ones} == {Outcome.COMPLETED}
    completed = [each for each in long_ones if each.outcome is Outcome.COMPLETED]
    assert completed
    tokens = simulator.processed_tokens_by_pool()
    answered = sum(each.arrival.prompt_tokens + each.output_tokens - 1 for each in completed)
    assert tokens[heavy] == answered
