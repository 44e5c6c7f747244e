"""What Serve's controller is answered: Control's newest decision, and never an exception."""

from __future__ import annotations

import time
from collections import namedtuple
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.autoscaling import DECIDED_AT, NEWS_MAX_AGE_S, WANTED, replicas, statistics
from tests.properties import examples

Value = namedtuple("Value", "timestamp value")  # as Serve's TimeStampedValue
NOW_S = 1_000_000.0


def context(
    *told: tuple[str, float, float],
    target: int = 2,
    waiting: float = 0.0,
    running: float = 0.0,
    living: tuple[str, ...] | None = None,
) -> Any:
    """A context in which replicas told (name, wanted, decided at) last."""
    metrics: dict[str, dict[str, list[Value]]] = {WANTED: {}, DECIDED_AT: {}}
    for name, wanted, decided_at_s in told:
        metrics[WANTED][name] = [Value(0.0, 99.0), Value(1.0, wanted)]
        metrics[DECIDED_AT][name] = [Value(0.0, NOW_S), Value(1.0, decided_at_s)]
    return SimpleNamespace(
        raw_metrics=metrics,
        running_replicas=[name for name, _, _ in told] if living is None else list(living),
        target_num_replicas=target,
        total_num_requests=waiting + running,
        total_queued_requests=waiting,
        current_time=NOW_S,
    )


def test_the_latest_decision_counts() -> None:
    assert replicas(context(("a", 3, NOW_S - 2), ("b", 5, NOW_S - 1))) == (5, {})
    assert replicas(context(("a", 3, NOW_S - 1), ("b", 5, NOW_S - 2))) == (3, {})
    assert replicas(context(("a", 0, NOW_S))) == (0, {})


def test_without_fresh_news_the_size_stays() -> None:
    assert replicas(context()) == (2, {})
    assert replicas(context(("a", 7, NOW_S - NEWS_MAX_AGE_S - 1))) == (2, {})
    assert replicas(context(("a", 7, NOW_S), living=("b",))) == (2, {}), "a replica that is gone"
    told = statistics(None, 0.0)
    assert replicas(context(("a", told[WANTED], told[DECIDED_AT]))) == (2, {})


def test_a_pool_without_replicas_wakes_for_a_call_that_waits() -> None:
    assert replicas(context(target=0)) == (0, {})
    assert replicas(context(target=0, waiting=0.03)) == (1, {})
    assert replicas(context(target=3, waiting=50.0)) == (3, {}), "calls do not size a living pool"


def test_calls_still_open_on_a_replica_that_leaves_wake_nothing() -> None:
    assert replicas(context(target=0, running=1.0)) == (0, {})


anything = (
    st.none()
    | st.integers()
    | st.floats()
    | st.sampled_from([nan, inf, -inf])
    | st.text(max_size=5)
    | st.lists(st.integers(), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=3)
)
series = st.none() | st.lists(anything | st.builds(Value, anything, anything), max_size=3)


@examples(300)
@given(
    metrics=anything
    | st.fixed_dictionaries(
        {
            WANTED: anything | st.dictionaries(st.sampled_from("ab"), series),
            DECIDED_AT: anything | st.dictionaries(st.sampled_from("ab"), series),
        }
    ),
    running=anything | st.just(["a", "b"]),
    target=anything,
    waiting=anything,
    now_s=anything,
)
def test_it_never_raises_inside_the_controller(
    metrics: object, running: object, target: object, waiting: object, now_s: object
) -> None:
    size, state = replicas(
        SimpleNamespace(
            raw_metrics=metrics,
            running_replicas=running,
            target_num_replicas=target,
            total_queued_requests=waiting,
            current_time=now_s,
        )
    )
    assert isinstance(size, int)
    assert size >= 0
    assert state == {}


@pytest.mark.ray
def test_it_reads_what_serve_really_hands_over() -> None:
    common = pytest.importorskip("ray.serve._private.common")
    config = pytest.importorskip("ray.serve.config")
    deployment = common.DeploymentID(name="Engine", app_name="pool-chat")
    replica = common.ReplicaID("r1", deployment)
    now_s = time.time()
    metrics = {
        name: {replica: [common.TimeStampedValue(now_s, value)]}
        for name, value in statistics(4, now_s).items()
    }
    told = config.AutoscalingContext(
        deployment_id=deployment,
        deployment_name="Engine",
        app_name="pool-chat",
        current_num_replicas=1,
        target_num_replicas=1,
        running_replicas=[replica],
        total_num_requests=lambda: 0.0,
        total_queued_requests=lambda: 0.0,
        aggregated_metrics=dict,
        raw_metrics=lambda: metrics,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now_s,
        config=None,
    )
    assert replicas(told) == (4, {})
