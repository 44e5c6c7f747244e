"""The simulator measures what questions cost, where it is asked to or fairness goes by it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.core.policy import FairnessPolicy
from serve_app.core.types import Outcome
from serve_app.sim.scenarios import chat_mix, default_setup
from serve_app.sim.setup import Setup
from serve_app.sim.simulator import simulate

DURATION_S = 25.0


def small(*, measure_cost: bool = False, by_engine_seconds: bool = False) -> Setup:
    base = default_setup()
    fairness = FairnessPolicy(by_engine_seconds=by_engine_seconds)
    pools = tuple(
        replace(pool, replicas=2, policy=replace(pool.policy, fairness=fairness))
        for pool in base.pools
    )
    return replace(
        base, pools=pools, duration_s=DURATION_S, warmup_s=0.0, measure_cost=measure_cost
    )


def test_nothing_is_measured_unless_it_is_asked_for() -> None:
    run = simulate(small(), chat_mix(8.0), seed=1)
    assert not any(each.engine_s for each in run.questions)


@pytest.mark.parametrize(
    "setup", [small(measure_cost=True), small(by_engine_seconds=True)], ids=["asked", "fairness"]
)
def test_what_questions_cost_is_within_the_replicas_time_and_measuring_changes_nothing(
    setup: Setup,
) -> None:
    run = simulate(setup, chat_mix(8.0), seed=1)
    assert all((each.engine_s > 0) == (each.outcome is Outcome.COMPLETED) for each in run.questions)
    paid_s = sum(each.engine_s for each in run.questions)
    assert 0.5 * run.replica_s < paid_s < run.replica_s
    if not setup.pools[0].policy.fairness.by_engine_seconds:
        plain = simulate(small(), chat_mix(8.0), seed=1)
        assert [each.ended_s for each in run.questions] == [
            each.ended_s for each in plain.questions
        ]
