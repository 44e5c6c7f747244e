"""What a router's policies did and how well they predict, as metrics.

Tenants appear here by name, as everywhere else only in the ledger: the few that are
furthest ahead of their fair share, at most TENANTS_SHOWN of a pool at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge

from serve_app.core.figures import PoolFigures
from serve_app.core.types import PoolName, PriorityClass, TenantId

TENANTS_SHOWN = 10


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """One tenant in one pool: its debt in cost units, and how wrong its output was predicted."""

    tenant: TenantId
    debt: float
    output_error_ratio: float


class PolicyMetrics:
    """Gauges set from the core's figures when the registry is rendered, and a few counters."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._declare_pool()
        self._declare_predictions()
        self.fairness_debt = self._gauge(
            "headrace_fairness_debt",
            f"Cost by which a tenant is ahead of its fair share; the {TENANTS_SHOWN} furthest.",
            "tenant",
        )
        self.tenant_output_error_ratio = self._gauge(
            "headrace_tenant_output_error_ratio",
            "Recent error of a tenant's expected output; the tenants of headrace_fairness_debt.",
            "tenant",
        )
        self.degraded_total = Counter(
            "headrace_degraded_total",
            "Requests that a brownout rung degraded, by how: max_tokens, fallback_model.",
            ("pool", "class", "how"),
            registry=registry,
        )
        self.rate_limited_total = Counter(
            "headrace_rate_limited_total",
            "Requests over a limit, by what it counts per (scope) and what it counts (limit).",
            ("scope", "limit"),
            registry=registry,
        )
        self.limit_fetches_total = Counter(
            "headrace_limit_fetches_total",
            "Requests that waited for parts of limits that other routers hold: granted, refused, "
            "or unavailable (Control away).",
            ("result",),
            registry=registry,
        )
        self.budget_refused_total = Counter(
            "headrace_budget_refused_total",
            "Requests that a budget refused, by whose it is (scope) and why: spent, reserved, "
            "unavailable.",
            ("scope", "reason"),
            registry=registry,
        )
        self.prompts_counted_total = Counter(
            "headrace_prompts_counted_total",
            "Prompts whose exact length decided something: counted, or estimated for want of "
            "a tokenizer.",
            ("result",),
            registry=registry,
        )

    def pool(
        self,
        pool: PoolName,
        figures: PoolFigures,
        *,
        prompt_error_ratio: float,
        tenants: Sequence[TenantFigures],
    ) -> None:
        """Set the gauges of one pool; replaces the tenants shown before."""
        self.brownout_rung.labels(pool).set(figures.rung)
        self.saturation_ratio.labels(pool).set(figures.saturation_ratio)
        self.kv_usage_ratio.labels(pool).set(figures.kv_usage_ratio)
        self.kv_prediction_ratio.labels(pool).set(figures.kv_prediction_ratio)
        self.open_breakers.labels(pool).set(figures.replicas_open_breaker)
        self.retry_budget.labels(pool).set(figures.retry_balance)
        self.active_tenants.labels(pool).set(figures.tenants_active)
        self.known_tenants.labels(pool).set(figures.tenants_known)
        self.advised_clients.labels(pool).set(figures.clients_known)
        self.ttft_error_seconds.labels(pool).set(figures.ttft_error_s)
        self.output_error_ratio.labels(pool).set(figures.output_error_ratio)
        self.prompt_error_ratio.labels(pool).set(prompt_error_ratio)
        by_class = zip(
            PriorityClass, figures.in_flight_tokens, figures.service_cost_per_s, strict=True
        )
        for priority_class, tokens, cost_per_s in by_class:
            name = priority_class.name.lower()
            self.in_flight_tokens.labels(pool, name).set(tokens)
            self.service_cost.labels(pool, name).set(cost_per_s)
        self._forget_tenants(pool)
        for each in tenants[:TENANTS_SHOWN]:
            self.fairness_debt.labels(pool, each.tenant).set(each.debt)
            ratio = self.tenant_output_error_ratio.labels(pool, each.tenant)
            ratio.set(each.output_error_ratio)

    def forget_pool(self, pool: PoolName) -> None:
        """Drop the gauges of a pool that is no longer configured."""
        self._forget_tenants(pool)
        for gauge in self._by_pool:
            gauge.remove_by_labels({"pool": pool})

    def _declare_pool(self) -> None:
        self._by_pool: list[Gauge] = []
        self.brownout_rung = self._gauge(
            "headrace_brownout_rung", "Rung of the brownout ladder, 0 (none) to 4."
        )
        self.saturation_ratio = self._gauge(
            "headrace_saturation_ratio", "Mean load of the replicas over their knee."
        )
        self.kv_usage_ratio = self._gauge(
            "headrace_kv_usage_ratio", "Mean used share of the replicas' KV caches, as reported."
        )
        self.kv_prediction_ratio = self._gauge(
            "headrace_kv_prediction_ratio",
            "The same if everything in flight runs to its expected end.",
        )
        self.open_breakers = self._gauge(
            "headrace_open_breakers", "Replicas left alone because they failed in a row."
        )
        self.retry_budget = self._gauge(
            "headrace_retry_budget", "Moves to another replica that the pool may still cause."
        )
        self.active_tenants = self._gauge(
            "headrace_active_tenants", "Tenants with open requests in this router."
        )
        self.known_tenants = self._gauge(
            "headrace_known_tenants", "Entries of the fair queues' tables, over all classes."
        )
        self.advised_clients = self._gauge(
            "headrace_advised_clients", "Keys remembered to watch whether they heed Retry-After."
        )
        self.in_flight_tokens = self._gauge(
            "headrace_in_flight_tokens",
            "Prompt and expected output tokens of this router's requests in engines.",
            "class",
        )
        self.service_cost = self._gauge(
            "headrace_service_cost_per_second",
            "Fairness cost served per second while the class had requests waiting.",
            "class",
        )

    def _declare_predictions(self) -> None:
        self.ttft_error_seconds = self._gauge(
            "headrace_ttft_prediction_error_seconds",
            "Recent mean error of the predicted time to first token.",
        )
        self.output_error_ratio = self._gauge(
            "headrace_output_estimate_error_ratio",
            "Recent error of the expected output over tokens produced.",
        )
        self.prompt_error_ratio = self._gauge(
            "headrace_prompt_estimate_error_ratio",
            "Recent error of the prompts' estimated length over tokens counted.",
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        gauge = Gauge(name, text, ("pool", *labels), registry=self._registry)
        if "tenant" not in labels:
            self._by_pool.append(gauge)
        return gauge

    def _forget_tenants(self, pool: PoolName) -> None:
        for gauge in (self.fairness_debt, self.tenant_output_error_ratio):
            gauge.remove_by_labels({"pool": pool})
