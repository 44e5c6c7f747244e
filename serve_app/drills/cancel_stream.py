"""Clients that hang up free their slots, and what was generated for them is counted as waste."""

from __future__ import annotations

from serve_app.drills.frame import Stage
from serve_app.drills.load import running_streams

STREAMS = 30
TOKENS = 3000
WASTED = "headrace_engine_tokens_total"


async def run(stage: Stage) -> None:
    """Open long streams, hang up on all of them, and watch the engines empty."""
    target = stage.target
    await stage.until_idle()
    wasted = await target.metric(WASTED, kind="wasted")
    streams = await running_streams(stage, STREAMS, TOKENS)
    stage.inject(f"{STREAMS} clients hang up on {TOKENS} tokens each")
    await streams.leave()
    stage.check(streams.count("left") == STREAMS, "every stream was running when it was left")
    took_s = await stage.check_until(target.idle, "no engine and no router holds a request", 20)

    async def counted() -> bool:
        return await target.metric(WASTED, kind="wasted") > wasted

    await stage.check_until(counted, "the engines count what they made for nobody", 20)
    made = await target.metric(WASTED, kind="wasted") - wasted
    stage.check(made < STREAMS * TOKENS / 2, "they stopped long before the answers' end")
    stage.figure(streams=STREAMS, idle_after_s=took_s, wasted_tokens=int(made))
