"""A router killed: clients that retry as openai's does notice nothing, its slots are freed."""

from __future__ import annotations

from serve_app.drills.frame import DrillImpossible, Stage
from serve_app.drills.load import RETRIES, Load, running_streams
from serve_app.drills.target import kill

STREAMS = 20
TOKENS = 1000
RATE_PER_S = 8.0
AFTER_S = 6.0


async def run(stage: Stage) -> None:
    """Kill one of the routers under streams and under requests that come on."""
    target = stage.target
    routers = target.processes(":gateway:", "Router")
    if len(routers) < 2:
        raise DrillImpossible("the gateway needs two routers: one is killed")
    await stage.until_idle()
    streams = await running_streams(stage, STREAMS, TOKENS)
    load = Load(target, target.names.model, retries=RETRIES)
    async with load.at_rate(RATE_PER_S):
        stage.inject(f"router {routers[0].pid} of {len(routers)} is killed")
        kill(routers[:1])
        await stage.sleep(AFTER_S)
    stage.check(load.answered > 0, "requests came in meanwhile")
    stage.check(not load.failures, f"none failed for good ({load.described()})")
    cut = streams.count("cut") + streams.count("error")
    await streams.leave()
    stage.check(cut < STREAMS, "the other routers' streams went on")
    stage.figure(answered=load.answered, retried=load.retried, slowest_s=load.slowest_s)
    stage.figure(streams_cut=cut, streams=STREAMS)

    async def replaced() -> bool:
        known = await target.metric("headrace_control_processes", role="router")
        return min(known, len(target.alive(":gateway:", "Router"))) >= len(routers)

    await stage.check_until(target.idle, "no slot of its streams is held", 30)
    stage.figure(replaced_after_s=await stage.check_until(replaced, "it was replaced", 120))
