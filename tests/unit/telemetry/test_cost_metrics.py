"""An engine's costs as metrics: they add up to its life and only where they are measured."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from prometheus_client import CollectorRegistry

from serve_app.core.attribution import ReplicaUse, StepCoefficients, Use
from serve_app.core.types import TenantId
from serve_app.telemetry.exposition import render_families
from serve_app.telemetry.metrics import EngineMetrics


@dataclass(frozen=True)
class Costs:
    use: ReplicaUse
    fit_error_ratio: float = 0.02
    kv_block_s: dict[TenantId, float] = field(default_factory=dict)
    coefficients: StepCoefficients = field(default_factory=StepCoefficients)


def costs(*, open_ns: int, useful_ns: int, idle_ns: int, kv_block_s: float = 0.0) -> Costs:
    uses = dict.fromkeys(Use, 0)
    uses |= {Use.OPEN: open_ns, Use.USEFUL: useful_ns, Use.IDLE: idle_ns}
    use = ReplicaUse(sum(uses.values()), uses, late_ns=0, provisional_ns=useful_ns // 2)
    return Costs(use, kv_block_s={TenantId("acme"): kv_block_s})


def test_the_uses_add_up_to_the_replicas_life() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    for each in (
        costs(open_ns=4 * 10**9, useful_ns=0, idle_ns=10**9, kv_block_s=3.0),
        costs(open_ns=10**9, useful_ns=5 * 10**9, idle_ns=2 * 10**9, kv_block_s=8.0),
    ):
        metrics.engine_costs(each)
        counted_s = sum(
            value("headrace_engine_time_seconds_total", {"use": use.value}) or 0.0
            for use in Use
            if use is not Use.OPEN
        )
        open_s = value("headrace_engine_open_seconds")
        assert open_s is not None
        assert counted_s + open_s == pytest.approx(each.use.lifetime_ns / 1e9)
    assert value("headrace_engine_time_seconds_total", {"use": "useful"}) == 5.0
    assert value("headrace_engine_time_seconds_total", {"use": "unattributed"}) == 0.0
    assert value("headrace_engine_time_seconds_total", {"use": "open"}) is None
    assert value("headrace_engine_provisional_seconds_total") == 2.5
    assert value("headrace_engine_step_fit_error_ratio") == 0.02
    assert value("headrace_engine_kv_block_seconds_total") == 8.0


def test_an_engine_that_does_not_measure_shows_no_zeros() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    metrics.engine_costs(None)
    assert not any("engine_time" in name for name in render_families(metrics.registry, {}))
    metrics.engine_costs(costs(open_ns=0, useful_ns=1, idle_ns=1))
    assert any("engine_time" in name for name in render_families(metrics.registry, {}))


def test_figures_that_default_coefficients_made_are_marked_until_they_are_fitted() -> None:
    metrics = EngineMetrics(CollectorRegistry())
    value = metrics.registry.get_sample_value
    figures = costs(open_ns=0, useful_ns=1, idle_ns=1)
    metrics.engine_costs(figures)
    assert value("headrace_engine_coefficients_provisional") == 1.0
    fitted = StepCoefficients(1, 1, 1, 1, provisional=False)
    metrics.engine_costs(replace(figures, coefficients=fitted))
    assert value("headrace_engine_coefficients_provisional") == 0.0
