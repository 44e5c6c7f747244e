"""What a process says of its own loop while it keeps in touch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from serve_app.telemetry.exposition import Family
from serve_app.telemetry.metrics import ProcessMetrics
from serve_app.telemetry.uplink import LOOP_PROBE_S, Heartbeat, Tables, Uplink
from tests.virtual_time import run


class Away:
    """A Control that never answers."""

    async def heartbeat(self, beat: Heartbeat) -> Tables:
        raise ConnectionError("away")

    async def report_metrics(self, process: str, families: Mapping[str, Family]) -> None:
        raise ConnectionError("away")


async def lags(periods: int) -> list[float]:
    """Return what is told of the loop in so many probes, the clock standing still for the last."""
    loop = asyncio.get_running_loop()
    late_s = [0.0]
    seen: list[float] = []
    uplink = Uplink(
        Away(),
        beat=lambda: Heartbeat(process="p", role="router", keys_version=0),
        families=dict,
        heartbeat_period_s=1,
        metrics_period_s=5,
        metrics=ProcessMetrics(CollectorRegistry()),
        clock=lambda: loop.time() + late_s[0],
        on_lag=seen.append,
    )
    uplink.start()
    await asyncio.sleep((periods - 0.5) * LOOP_PROBE_S)
    late_s[0] = 2.0
    await asyncio.sleep(LOOP_PROBE_S)
    await uplink.stop()
    return seen


def test_every_probe_of_the_loop_is_told_control_or_not() -> None:
    seen = run(lags(4))
    assert [round(lag_s, 3) for lag_s in seen] == [0, 0, 0, 2]
