"""What the last day truly cost, by pool, as metrics. Users and tenants are in the reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

# Keys of a pool in the report on economics, and what they are called here.
_KINDS = {
    "usd_per_million_input": "input",
    "usd_per_million_output": "output",
    "usd_per_million_total": "total",
    "usd_per_million_total_at_slo": "total_at_slo",
    "usd_per_million_total_never_idle": "total_never_idle",
}


class SpendingMetrics:
    """Control's; set whenever the ledger was looked at."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.cost_usd = Gauge(
            "headrace_cost_usd",
            "What replicas' time of the last 24 whole hours cost, by what it went to; nothing "
            "for a pool none of whose time has a price.",
            ("pool", "use"),
            registry=registry,
        )
        self.per_million_tokens_usd = Gauge(
            "headrace_cost_per_million_tokens_usd",
            "The last day's cost of a pool, idle and waste in it, per million tokens: input, "
            "output, total, total_at_slo, and total_never_idle without idle time. Of its hours "
            "that have a price; nothing if there are none.",
            ("pool", "kind"),
            registry=registry,
        )
        self.per_thousand_requests_usd = Gauge(
            "headrace_cost_per_thousand_requests_usd",
            "The last day's cost of a pool per thousand requests, of its hours that have a price.",
            ("pool",),
            registry=registry,
        )
        self.busy_ratio = Gauge(
            "headrace_cost_busy_ratio",
            "The part of the last day's replica time in which there was work.",
            ("pool",),
            registry=registry,
        )
        self.anomalies = Gauge(
            "headrace_cost_anomalies",
            "Users and models that cost unlike before in the last day, by kind.",
            ("kind",),
            registry=registry,
        )

    def economics(self, report: Mapping[str, Any]) -> None:
        """Set what the report on economics says; pools that are gone are forgotten."""
        for gauge in (self.cost_usd, self.per_million_tokens_usd, self.per_thousand_requests_usd):
            gauge.clear()
        self.busy_ratio.clear()
        for pool in report["data"]:
            name = pool["pool"]
            self.busy_ratio.labels(name).set(pool["busy_ratio"])
            uses = pool["cost_by_use_usd"] if pool["unpriced_ratio"] < 1 else {}
            for use, cost in uses.items():
                self.cost_usd.labels(name, use).set(float(cost))
            for key, kind in _KINDS.items():
                if pool[key] is not None:
                    self.per_million_tokens_usd.labels(name, kind).set(pool[key])
            if pool["usd_per_thousand_requests"] is not None:
                self.per_thousand_requests_usd.labels(name).set(pool["usd_per_thousand_requests"])

    def odd(self, kinds: Iterable[str]) -> None:
        """Set how many of each kind were found."""
        self.anomalies.clear()
        for kind in kinds:
            self.anomalies.labels(kind).inc()
