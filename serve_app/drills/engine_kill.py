"""An engine killed at work: nothing without a token is lost, streams end, it is replaced."""

from __future__ import annotations

from serve_app.drills.engines import engines_of
from serve_app.drills.frame import Stage
from serve_app.drills.load import Load, running_streams
from serve_app.drills.target import kill

STREAMS = 24
TOKENS = 300
RATE_PER_S = 8.0
AFTER_S = 4.0


async def run(stage: Stage) -> None:
    """Kill one replica's process under streams and under requests that come on."""
    target = stage.target
    engines = await engines_of(stage)
    await stage.until_idle()
    streams = await running_streams(stage, STREAMS, TOKENS)
    load = Load(target, target.names.model)
    async with load.at_rate(RATE_PER_S):
        stage.inject(f"process {engines.victim.pid} of pool {engines.pool} is killed")
        kill([engines.victim])
        await stage.sleep(AFTER_S)
    stage.check(await streams.ended(within_s=60), "no stream hangs")
    await streams.leave()
    cut, whole = streams.count("error"), streams.count("done")
    stage.check(cut + whole == STREAMS, "every stream ended as done or with an error event")
    stage.check(whole > 0, "streams of the other replicas went on")
    short = [each for each in streams.all if each.ended == "done" and each.tokens < TOKENS]
    stage.check(not short, "no stream that says it is done lacks tokens")
    stage.check(not load.failures, f"no request without a token was lost ({load.described()})")

    stage.figure(streams_whole=whole, streams_cut=cut, answered=load.answered)
    stage.figure(slowest_s=load.slowest_s)
    await engines.check_replaced(stage)
    await stage.check_until(target.idle, "no slot is held", 20)
