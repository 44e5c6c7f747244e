"""Hours of nodes compared with their bills: what is attributed and idle, and the gap."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final

from sqlalchemy import Connection

from serve_app.config_costs import CostSettings
from serve_app.core.pricing import dollars
from serve_app.core.reconciliation import (
    NodeBill,
    NodeCharge,
    NodeGap,
    Reconciliation,
    over_hours,
    reconcile,
)
from serve_app.core.true_cost import Overhead
from serve_app.ledger.costs import read_bills, split_hours
from serve_app.usage_report import UsageQuery, iso_time

HOURS_SHOWN: Final = 48


def reconciled(
    connection: Connection, query: UsageQuery, settings: CostSettings
) -> dict[int, Reconciliation]:
    """Return every hour of ``query`` in which a node was used or billed, compared."""
    charges: dict[int, list[NodeCharge]] = defaultdict(list)
    for each in split_hours(connection, query, (), settings.prices()):
        account, cost = each.cost.hour, each.cost.cost_nanousd
        idle = next(part.cost_nanousd or 0 for part in each.cost.parts if part.key is Overhead.IDLE)
        charge = NodeCharge(account.node, (cost or 0) - idle, idle, account.gpus, cost is None)
        charges[account.hour].append(charge)
    bills: dict[int, list[NodeBill]] = defaultdict(list)
    for (hour, _), bill in read_bills(connection, query).items():
        bills[hour].append(bill)
    return {
        hour: reconcile(charges[hour], bills[hour], alert_ratio=settings.alert_ratio)
        for hour in sorted(charges.keys() | bills.keys())
    }


def reconciliation(
    connection: Connection, query: UsageQuery, settings: CostSettings
) -> dict[str, Any]:
    """Return the comparison as a JSON object: nodes over all hours, and hours with an alert.

    ``alert`` is that of all hours together or of any one; the last HOURS_SHOWN are listed.
    """
    hours = reconciled(connection, query, settings)
    whole = over_hours(hours.values(), alert_ratio=settings.alert_ratio)
    alerts = {hour: found for hour, found in hours.items() if found.alert}
    return {
        "object": "reconciliation",
        **query.window(),
        "alert": whole.alert or bool(alerts),
        "alert_gap_ratio": settings.alert_gap_ratio,
        "hours": len(hours),
        "gap_usd": dollars(whole.gap_nanousd),
        "gap_ratio": _ratio(whole.gap_ratio),
        "nodes": [_node(each) for each in whole.nodes],
        "alerts": _alerts(alerts),
        "alerts_unshown": max(0, len(alerts) - HOURS_SHOWN),
    }


def _alerts(alerts: Mapping[int, Reconciliation]) -> list[dict[str, Any]]:
    return [
        {
            "hour": iso_time(hour),
            "nodes": [_node(each) for each in alerts[hour].nodes if each.finding.alarms],
        }
        for hour in sorted(alerts)[-HOURS_SHOWN:]
    ]


def _node(node: NodeGap) -> dict[str, Any]:
    return {
        "node": node.node,
        "finding": node.finding.value,
        "attributed_usd": dollars(node.attributed_nanousd),
        "idle_usd": dollars(node.idle_nanousd),
        "billed_usd": None if node.billed_nanousd is None else dollars(node.billed_nanousd),
        "gap_usd": None if node.gap_nanousd is None else dollars(node.gap_nanousd),
        "gap_ratio": _ratio(node.gap_ratio),
    }


def _ratio(ratio: Fraction | None) -> float | None:
    return None if ratio is None else round(float(ratio), 6)
