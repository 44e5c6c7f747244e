"""A replica that goes silent gets nothing new, and work again when it is heard."""

from __future__ import annotations

import psutil

from serve_app.drills.frame import DrillImpossible, Stage
from serve_app.drills.load import Load, Streams

SILENT_S = 5.0
NOTICED_S = 2.0
# On a busy machine too.
SEEN_S = 60.0
RATE_PER_S = 8.0
STREAMS_AT_ONCE = 2
TOKENS = 3000


async def run(stage: Stage) -> None:
    """Stop one engine's process for a few seconds: its load reports stop with it."""
    target = stage.target
    pool = target.names.pool
    engines = target.processes(f":pool-{pool}:", "Engine")
    if len(engines) < 2:
        raise DrillImpossible(f"pool {pool} needs two replicas: one is silenced")
    await stage.until_idle()
    load = Load(target, target.names.model, tokens=5)
    silenced = engines[0]
    stage.inject(f"process {silenced.pid} of pool {pool} is stopped for {SILENT_S:.0f} s")
    silenced.suspend()
    try:
        await stage.sleep(NOTICED_S)
        async with load.at_rate(RATE_PER_S):
            await stage.sleep(SILENT_S - NOTICED_S)
        # Every answer has come by now: who had waited for it would do so still.
        silent = silenced.is_running() and silenced.status() == psutil.STATUS_STOPPED
    finally:
        silenced.resume()
    stage.figure(answered=load.answered, slowest_s=load.slowest_s, failed=load.failures.total())
    stage.check(load.answered > 0, "requests came in while it was silent")
    stage.check(not load.failures, f"none of them failed ({load.described()})")
    stage.check(silent, f"none waited for it (slowest {load.slowest_s:.1f} s)")

    streams = Streams(target, target.names.model, TOKENS)

    async def all_busy() -> bool:
        # More each time: what came before it was heard again has gone elsewhere, for good.
        streams.open(STREAMS_AT_ONCE)
        running = [
            each.value
            for each in await target.samples()
            if each.name == "headrace_engine_running" and each.labels.get("pool") == pool
        ]
        return len(running) >= len(engines) and all(running)

    try:
        back_s = await stage.check_until(all_busy, "every replica has work again", SEEN_S)
    finally:
        await streams.leave()
    stage.figure(back_after_s=back_s)
    stage.check(silenced.is_running(), "it was not replaced for a pause this short")
    await stage.check_until(target.idle, "no slot is held", SEEN_S)
