"""What the comparison of attributed cost with nodes' bills came to. Nodes are in the report."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge


class BillMetrics:
    """Control's; set whenever bills were read."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.gap_ratio = Gauge(
            "headrace_cost_gap_ratio",
            "Bills of the last day less attributed and idle cost, as a part of the bills.",
            registry=registry,
        )
        self.worst_gap_ratio = Gauge(
            "headrace_cost_worst_node_gap_ratio",
            "The largest gap of a node over the last day, without its sign.",
            registry=registry,
        )
        self.alert = Gauge(
            "headrace_cost_gap_alert",
            "1 if a node's cost and bill disagree in an hour of the last day, else 0.",
            registry=registry,
        )
        self.findings = Gauge(
            "headrace_cost_nodes",
            "Nodes by what their comparison over the last day came to.",
            ("finding",),
            registry=registry,
        )
        self.reads_total = Counter(
            "headrace_opencost_reads_total",
            "Hours of bills asked of OpenCost, by outcome: read, empty, failed.",
            ("outcome",),
            registry=registry,
        )
        self.read_at_seconds = Gauge(
            "headrace_opencost_read_at_seconds",
            "When bills were last read, in seconds since the epoch.",
            registry=registry,
        )

    def compared(
        self, gap_ratio: float, worst_ratio: float, alert: bool, findings: Mapping[str, int]
    ) -> None:
        """Set what the last comparison came to."""
        self.gap_ratio.set(gap_ratio)
        self.worst_gap_ratio.set(worst_ratio)
        self.alert.set(alert)
        self.findings.clear()
        for finding, count in findings.items():
            self.findings.labels(finding).set(count)
