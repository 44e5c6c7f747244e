"""An XID restarts the engine of its GPU; one that nobody knows does nothing but say so."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prometheus_client import CollectorRegistry

from serve_app.core.gpu_readings import LAST_XID
from serve_app.drills.engines import engines_of
from serve_app.drills.frame import Stage
from serve_app.drills.load import Load
from serve_app.gpu_engines import ProcessEngines
from serve_app.gpu_health import GpuWatch, WatchMetrics, WatchSettings
from serve_app.gpu_sources import file_source

RATE_PER_S = 8.0
UNKNOWN_XID = 777
RESTART_XID = 31


async def run(stage: Stage) -> None:
    """Let a GPU watcher of our own read a file in which an engine's GPU has XIDs."""
    target = stage.target
    engines = await engines_of(stage)
    victim = engines.victim
    await stage.until_idle()
    registry = CollectorRegistry()
    load = Load(target, target.names.model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dcgm.prom"
        watch = GpuWatch(
            WatchSettings(node="drill"),
            file_source(file),
            ProcessEngines(processes=lambda: target.alive(":Engine")),
            WatchMetrics(registry),
            clock=stage.clock,
        )

        async def show(xid: int) -> None:
            file.write_text(f'{LAST_XID}{{UUID="pid:{victim.pid}"}} {xid}\n')
            await watch.tick()

        await show(0)
        async with load.at_rate(RATE_PER_S):
            stage.inject(f"XID {UNKNOWN_XID}, which is in no table")
            await show(UNKNOWN_XID)
            stage.check(victim.is_running(), "an unknown XID ends nothing")
            stage.inject(f"XID {RESTART_XID} on the GPU of process {victim.pid}")
            await show(RESTART_XID)
            await show(RESTART_XID)

            async def ended() -> bool:
                return not victim.is_running() or victim.status() == "zombie"

            await stage.check_until(ended, "its engine is ended", 10)
    restarts = registry.get_sample_value(
        "headrace_gpu_decisions_total", {"remedy": "restart_engine", "action": "restart_engine"}
    )
    stage.check(restarts == 1, "once")
    stage.check(not load.failures, f"no request was lost ({load.described()})")

    stage.figure(answered=load.answered, slowest_s=load.slowest_s)
    await engines.check_replaced(stage)
