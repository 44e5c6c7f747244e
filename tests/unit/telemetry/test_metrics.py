"""What the declared metrics promise, and what recording changes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry

from serve_app.core.types import (
    Outcome,
    PoolName,
    PriorityClass,
    ReplicaId,
    ReplicaView,
    Usage,
)
from serve_app.telemetry.exposition import merge, render_families
from serve_app.telemetry.metrics import EngineMetrics, ProcessMetrics, RouterMetrics

POOL = PoolName("chat")


@dataclass(frozen=True)
class Started:
    kv_tokens_capacity: int = 1000
    slots: int = 8
    start_s: float = 3.5
    stages_s: dict[str, float] = field(default_factory=lambda: {"load": 3.0, "warm_up": 0.5})


@dataclass(frozen=True)
class Ended:
    usage: Usage
    outcome: Outcome


def view(preemptions_total: int = 0) -> ReplicaView:
    return ReplicaView(
        replica=ReplicaId("r"),
        pool=POOL,
        sequence=1,
        slots=8,
        running=3,
        waiting=2,
        kv_usage_ratio=0.25,
        kv_tokens_capacity=1000,
        preemptions_total=preemptions_total,
        in_flight_tokens=(10, 20, 30),
    )


@pytest.mark.parametrize("kind", [RouterMetrics, EngineMetrics])
def test_every_metric_has_the_prefix_a_base_unit_and_help(kind: type[ProcessMetrics]) -> None:
    registry = CollectorRegistry()
    kind(registry)

    for metric in registry.collect():
        assert metric.name.startswith("headrace_")
        assert metric.documentation.endswith(".")
        assert not re.search(r"_(ms|milliseconds|percent|kb|mb)\b", metric.name)
        if metric.type == "histogram":
            assert metric.name.endswith("_seconds")


@pytest.mark.parametrize("kind", [RouterMetrics, EngineMetrics])
def test_no_metric_is_labelled_by_tenant_user_key_or_request(kind: type[ProcessMetrics]) -> None:
    forbidden = {"tenant", "user", "key", "key_id", "request_id", "model_name", "path"}
    # Bounded by TENANTS_SHOWN per pool: see the test of it below.
    noisiest = {"headrace_fairness_debt", "headrace_tenant_output_error_ratio"}
    registry = CollectorRegistry()
    kind(registry)

    for metric in registry._collector_to_names:
        labels = set(getattr(metric, "_labelnames", ()))
        allowed = {"tenant"} if getattr(metric, "_name", "") in noisiest else set()
        assert not forbidden & (labels - allowed)


def test_a_router_shows_no_engine_and_an_engine_no_router() -> None:
    router, engine = CollectorRegistry(), CollectorRegistry()
    RouterMetrics(router)
    EngineMetrics(engine)

    assert b"headrace_engine_" not in merge([render_families(router, {})])
    assert b"headrace_requests_total" not in merge([render_families(engine, {})])


def test_classes_without_a_queue_show_zero_and_a_removed_pool_disappears() -> None:
    metrics = RouterMetrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    metrics.pool_load(POOL, queued={PriorityClass.SHEDDABLE: 4}, in_flight=2, replicas=1)

    depth = [
        value("headrace_queue_depth", {"pool": POOL, "class": name})
        for name in ("critical", "standard", "sheddable")
    ]
    assert depth == [0, 0, 4]
    assert value("headrace_in_flight", {"pool": POOL}) == 2

    metrics.pool_load(POOL, queued={}, in_flight=0, replicas=1)
    assert value("headrace_queue_depth", {"pool": POOL, "class": "sheddable"}) == 0

    metrics.forget_pool(POOL)
    assert value("headrace_in_flight", {"pool": POOL}) is None
    assert value("headrace_queue_depth", {"pool": POOL, "class": "critical"}) is None


def test_preemptions_count_up_over_snapshots_and_over_a_restart() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    for total in (2, 2, 5, 1):
        metrics.engine_load(view(preemptions_total=total))

    assert metrics.registry.get_sample_value("headrace_engine_preemptions_total") == 6


def test_a_snapshot_sets_the_engines_gauges() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    assert value("headrace_replica_up") == 0
    metrics.engine_started(Started())
    metrics.engine_load(view())

    assert value("headrace_replica_up") == 1
    assert value("headrace_start_seconds", {"stage": "total"}) == 3.5
    assert value("headrace_start_seconds", {"stage": "load"}) == 3.0
    assert value("headrace_engine_running") == 3
    assert value("headrace_engine_waiting") == 2
    assert value("headrace_engine_kv_usage_ratio") == 0.25
    assert value("headrace_engine_in_flight_tokens", {"class": "sheddable"}) == 30


def test_output_of_a_request_that_did_not_complete_is_waste() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    usage = Usage(prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=7)
    for outcome in Outcome:
        metrics.engine_metered(Ended(usage, outcome))

    value = metrics.registry.get_sample_value
    tokens = {
        kind: value("headrace_engine_tokens_total", {"kind": kind})
        for kind in ("input", "cached_input", "output", "wasted")
    }
    assert tokens == {"input": 30, "cached_input": 12, "output": 7, "wasted": 14}
    assert value("headrace_engine_requests_total", {"outcome": "cancelled"}) == 1
