"""Every process's link to Control: heartbeats up, tables down, metrics beside them.

Losing Control loses nothing here: the process works on with the tables it holds, and
the next heartbeat that gets through catches up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve_app.core.budget import BudgetList
from serve_app.core.demand import EngineNews, PoolDemand, Wanted
from serve_app.core.pricing import PriceBook
from serve_app.core.scaling import ScalingPolicy
from serve_app.core.types import PoolName
from serve_app.telemetry.exposition import Family
from serve_app.telemetry.metrics import ProcessMetrics

logger = logging.getLogger("headrace.uplink")

LOOP_PROBE_S = 0.25


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A process saying that it lives, and which version of the key table it holds.

    ``keys_version``, ``prices_version`` and ``budgets_version`` are None for a process that
    needs none.
    ``channel`` is where a router hears others, endpoint and public key. ``demand`` is what a
    router was asked for, by pool; ``engine`` is an engine replica's part in scaling.
    """

    process: str
    role: str
    pool: str | None = None
    keys_version: int | None = None
    channel: tuple[str, bytes] | None = None
    prices_version: int | None = None
    budgets_version: int | None = None
    demand: Mapping[PoolName, tuple[PoolDemand, ScalingPolicy]] = field(default_factory=dict)
    engine: EngineNews | None = None


@dataclass(frozen=True, slots=True)
class Tables:
    """Control's answer: ``keys`` is None when the process's version is the current one.

    So are ``prices``, a core.pricing.PriceBook, and ``budgets``.

    ``routers`` are the channels of all live routers by process name, for routers only.
    ``wanted`` is the size decided for an engine's pool.
    """

    keys_version: int
    keys: Any | None = None
    routers: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)
    prices: PriceBook | None = None
    budgets: BudgetList | None = None
    wanted: Wanted | None = None


class ControlLink(Protocol):
    """What a process asks of Control. Any exception means Control is away."""

    async def heartbeat(self, beat: Heartbeat) -> Tables:
        """Exchange a heartbeat for the tables that changed."""

    async def report_metrics(self, process: str, families: Mapping[str, Family]) -> None:
        """Hand over the process's rendered metric families."""


class Uplink:
    """Runs the two periodic exchanges as one owned task each."""

    def __init__(
        self,
        link: ControlLink,
        *,
        beat: Callable[[], Heartbeat],
        families: Callable[[], Mapping[str, Family]],
        heartbeat_period_s: float,
        metrics_period_s: float,
        metrics: ProcessMetrics,
        clock: Callable[[], float],
        on_tables: Callable[[Tables], None] | None = None,
        on_lag: Callable[[float], None] | None = None,
    ) -> None:
        self._link = link
        self._beat = beat
        self._families = families
        self._periods_s = (heartbeat_period_s, metrics_period_s)
        self._on_tables = on_tables
        self._on_lag = on_lag
        self._metrics = metrics
        self._clock = clock
        self._reached_at_s = clock()
        self._tasks: list[asyncio.Task[None]] = []
        self.control_is_away = True

    def start(self) -> None:
        """Begin both exchanges on the running loop."""
        heartbeat_period_s, metrics_period_s = self._periods_s
        self._tasks = [
            asyncio.create_task(self._every(heartbeat_period_s, self._heartbeat)),
            asyncio.create_task(self._every(metrics_period_s, self._report)),
            asyncio.create_task(self._measure_loop()),
        ]

    async def stop(self) -> None:
        """End both exchanges."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _heartbeat(self) -> None:
        tables = await self._link.heartbeat(self._beat())
        self._reached_at_s = self._clock()
        if self._on_tables is not None:
            self._on_tables(tables)

    async def _report(self) -> None:
        beat = self._beat()
        age_s = self._clock() - self._reached_at_s
        self._metrics.control_heartbeat_age_seconds.set(age_s)
        await self._link.report_metrics(beat.process, self._families())

    async def _measure_loop(self) -> None:
        """Observe how late this loop wakes a timer: what probes and tokens wait for, too."""
        while True:
            due_s = self._clock() + LOOP_PROBE_S
            await asyncio.sleep(LOOP_PROBE_S)
            lag_s = max(0.0, self._clock() - due_s)
            self._metrics.event_loop_lag_seconds.observe(lag_s)
            if self._on_lag is None:
                continue
            try:
                self._on_lag(lag_s)
            except Exception:
                # Without the probe nobody would know of a late loop any more.
                logger.exception("what is done about a late loop failed")

    async def _every(self, period_s: float, exchange: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                async with asyncio.timeout(max(5.0, 2 * period_s)):
                    await exchange()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  # away in whatever way
                if not self.control_is_away:
                    logger.warning("control is away: %s: %.200s", type(error).__name__, error)
                self.control_is_away = True
            else:
                self.control_is_away = False
            await asyncio.sleep(period_s)
