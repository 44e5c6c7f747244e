"""The policies' gauges: bounded in tenants, gone with their pool."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from serve_app.core.figures import pool_figures
from serve_app.core.policy import PoolPolicy
from serve_app.core.pool import Pool
from serve_app.core.routing import RoutingSettings, make_routing
from serve_app.core.types import PoolName, TenantId
from serve_app.telemetry.policy_metrics import TENANTS_SHOWN, PolicyMetrics, TenantFigures

POOL = PoolName("chat")


class NoToss:
    """A random source that a round robin never asks."""

    def random(self) -> float:
        raise AssertionError


def shown(registry: CollectorRegistry, name: str) -> dict[str, float]:
    """Return a metric's samples by tenant, or under "" where it has none."""
    return {
        sample.labels.get("tenant", ""): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == name
    }


def test_tenants_shown_are_few_and_replaced_each_time() -> None:
    registry = CollectorRegistry()
    metrics = PolicyMetrics(registry)
    routing = make_routing("round_robin", RoutingSettings(), NoToss())
    figures = pool_figures(Pool(POOL, PoolPolicy(), routing, 0.0), 0.0)
    crowd = [TenantFigures(TenantId(f"t{n}"), 100.0 - n, 0.5) for n in range(1000)]
    metrics.pool(POOL, figures, prompt_error_ratio=0.25, tenants=crowd)
    assert len(shown(registry, "headrace_fairness_debt")) == TENANTS_SHOWN
    assert shown(registry, "headrace_fairness_debt")["t0"] == 100.0

    metrics.pool(POOL, figures, prompt_error_ratio=0.25, tenants=crowd[500:502])
    assert shown(registry, "headrace_fairness_debt").keys() == {"t500", "t501"}
    assert shown(registry, "headrace_tenant_output_error_ratio").keys() == {"t500", "t501"}
    assert shown(registry, "headrace_prompt_estimate_error_ratio") == {"": 0.25}

    metrics.forget_pool(POOL)
    assert shown(registry, "headrace_fairness_debt") == {}
    assert shown(registry, "headrace_brownout_rung") == {}
