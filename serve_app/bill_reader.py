"""Reads nodes' bills on an interval and compares them, in Control and apart from serving.

Nothing waits for it. Whatever OpenCost answers or does not, the ledger goes on as it is and
the hours that are missing are asked for again the next time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from sqlalchemy import func, select

from serve_app.config_costs import CostSettings, OpenCostSettings
from serve_app.core.calendar import DAY_S, HOUR_S
from serve_app.core.reconciliation import NodeBill, Reconciliation, over_hours
from serve_app.ledger.costs import write_bills
from serve_app.ledger.database import Database
from serve_app.ledger.opencost import OpenCostUnavailable
from serve_app.ledger.reconcile import reconciled
from serve_app.ledger.schema import NODE_BILL
from serve_app.periodic import Periodic
from serve_app.telemetry.bill_metrics import BillMetrics
from serve_app.usage_report import UsageQuery, iso_time

logger = logging.getLogger("headrace.bills")

# Bills change for some hours: credits, spot prices, late disks.
_SETTLED_AFTER_S: Final = 6 * HOUR_S
_FAILURES_MAX: Final = 2


class Bills(Protocol):
    """Where bills come from; see ledger.opencost.OpenCost."""

    async def node_bills(self, from_s: int, until_s: int) -> Sequence[NodeBill]:
        """Return what nodes cost, or raise OpenCostUnavailable."""

    async def close(self) -> None:
        """Close the connections."""


class BillReader:
    """One task of Control. ``wall_clock`` is wall seconds."""

    def __init__(
        self,
        bills: Bills,
        database: Database,
        settings: CostSettings,
        metrics: BillMetrics,
        wall_clock: Callable[[], float],
    ) -> None:
        assert settings.opencost is not None, "there is something to read"
        self._bills = bills
        self._database = database
        self._settings = settings
        self._opencost: OpenCostSettings = settings.opencost
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._said: frozenset[tuple[str, str]] = frozenset()
        self._away = False
        failed = "bills cannot be read; what is attributed stays as it is"
        self._reading = Periodic(self.read, self._opencost.period_s, logger, failed)

    def start(self) -> None:
        """Begin to read."""
        self._reading.start()

    async def stop(self) -> None:
        """End. Idempotent."""
        await self._reading.stop()
        await self._bills.close()

    async def read(self) -> Reconciliation:
        """Read the hours whose bills are missing or may have changed, and compare a day."""
        failed = 0
        for hour in await asyncio.to_thread(self._wanted):
            # One hour may be lost to OpenCost for good; where the next fails too, it is away.
            failed = 0 if await self._read_hour(hour) else failed + 1
            if failed == _FAILURES_MAX:
                break
        found = await asyncio.to_thread(self._compare)
        self._tell(found)
        return found

    async def _read_hour(self, hour: int) -> bool:
        try:
            bills = await self._bills.node_bills(hour, hour + HOUR_S)
        except OpenCostUnavailable as error:
            self._metrics.reads_total.labels("failed").inc()
            if not self._away:
                logger.warning("OpenCost is away, bills will be read later: %s", error)
            self._away = True
            return False
        self._away = False
        now_s = self._wall_clock()
        self._metrics.reads_total.labels("read" if bills else "empty").inc()
        self._metrics.read_at_seconds.set(now_s)
        await asyncio.to_thread(self._keep, hour, bills, now_s)
        return True

    def _wanted(self) -> list[int]:
        """Return the whole hours to ask for, the latest first."""
        now_s = self._wall_clock()
        this_hour = int(now_s // HOUR_S) * HOUR_S
        first = this_hour - self._opencost.look_back_hours * HOUR_S
        query = select(NODE_BILL.c.hour, func.max(NODE_BILL.c.read_at_s))
        query = query.where(NODE_BILL.c.hour >= first).group_by(NODE_BILL.c.hour)
        with self._database.transaction() as connection:
            rows = connection.execute(query).all()
        read_at_s = {row[0]: row[1] for row in rows}
        return [
            hour
            for hour in range(this_hour - HOUR_S, first - 1, -HOUR_S)
            if read_at_s.get(hour, 0.0) < hour + HOUR_S + _SETTLED_AFTER_S
        ]

    def _keep(self, hour: int, bills: Sequence[NodeBill], now_s: float) -> None:
        with self._database.transaction() as connection:
            write_bills(connection, hour, bills, now_s)

    def _compare(self) -> Reconciliation:
        until = int(self._wall_clock() // HOUR_S) * HOUR_S
        query = UsageQuery((), until - DAY_S, until)
        with self._database.transaction() as connection:
            found = reconciled(connection, query, self._settings)
        # An hour that could not be read yet has no bills, which is nobody's finding so far.
        settled_s = self._wall_clock() - HOUR_S - _SETTLED_AFTER_S
        hours = {
            hour: each
            for hour, each in found.items()
            if hour <= settled_s or any(node.billed_nanousd is not None for node in each.nodes)
        }
        whole = over_hours(hours.values(), alert_ratio=self._settings.alert_ratio)
        alerts = frozenset(
            (iso_time(hour), each.node)
            for hour, compared in hours.items()
            for each in compared.nodes
            if each.finding.alarms
        )
        for at, node in sorted(alerts - self._said):
            logger.warning("node %s and its bill disagree in the hour %s", node, at)
        self._said = alerts
        return whole

    def _tell(self, found: Reconciliation) -> None:
        ratios = [abs(each.gap_ratio) for each in found.nodes if each.gap_ratio is not None]
        self._metrics.compared(
            float(found.gap_ratio or 0),
            float(max(ratios, default=0)),
            found.alert or bool(self._said),
            Counter(each.finding.value for each in found.nodes),
        )
