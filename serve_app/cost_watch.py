"""Looks at the last day's costs now and then, in Control: metrics, and a line for what is odd.

Nothing waits for it, and what it finds is in the reports as well; see ledger/insights.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from serve_app.config_costs import CostSettings
from serve_app.core.calendar import DAY_S, HOUR_S
from serve_app.ledger.database import Database
from serve_app.ledger.insights import insight
from serve_app.periodic import Periodic
from serve_app.telemetry.spending_metrics import SpendingMetrics
from serve_app.usage_report import UsageQuery

logger = logging.getLogger("headrace.costs")

# By then what belongs to an hour has come through the journals.
_ARRIVED_AFTER_S: Final = 120


class CostWatch:
    """One task of Control. ``wall_clock`` is wall seconds."""

    def __init__(
        self,
        database: Database,
        settings: CostSettings,
        metrics: SpendingMetrics,
        wall_clock: Callable[[], float],
    ) -> None:
        self._database = database
        self._settings = settings
        self._metrics = metrics
        self._wall_clock = wall_clock
        self._looked_at: int | None = None
        self._said: set[tuple[str, str]] = set()
        failed = "costs cannot be read; their metrics stay as they are"
        self._watching = Periodic(self.look, settings.watch_period_s, logger, failed)

    def start(self) -> None:
        """Begin to look."""
        self._watching.start()

    async def stop(self) -> None:
        """End. Idempotent."""
        await self._watching.stop()

    async def look(self) -> None:
        """Read the last 24 whole hours, once an hour, and say what is new."""
        until = int((self._wall_clock() - _ARRIVED_AFTER_S) // HOUR_S) * HOUR_S
        if until == self._looked_at:
            return
        day = UsageQuery((), until - DAY_S, until)
        self._metrics.economics(await self._report("economics", day))
        found = (await self._report("anomalies", day))["data"]
        self._metrics.odd(each["kind"] for each in found)
        now = {(each["kind"], each["subject"]) for each in found}
        for each in found:
            if (each["kind"], each["subject"]) not in self._said:
                fields = {name: each[name] for name in ("kind", "subject", "first_at", "ratio")}
                logger.warning("costs unlike before", extra=fields)
        self._said = now
        self._looked_at = until

    async def _report(self, name: str, query: UsageQuery) -> dict[str, Any]:
        return await asyncio.to_thread(insight, self._database, name, query, self._settings)
