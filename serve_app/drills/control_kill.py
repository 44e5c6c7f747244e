"""Control killed: no request notices, keys and limits go on, it comes back by itself."""

from __future__ import annotations

from serve_app.drills.frame import Stage
from serve_app.drills.load import Load
from serve_app.drills.target import Before, kill

RATE_PER_S = 8.0
AFTER_S = 6.0


async def run(stage: Stage) -> None:
    """Kill Control under requests that come on."""
    target = stage.target
    before = Before(target, (":control:", "Control"))
    pids = sorted(each.pid for each in before.processes)
    load = Load(target, target.names.model)
    async with load.at_rate(RATE_PER_S):
        stage.inject(f"Control (process {pids}) is killed")
        kill(before.processes)
        await stage.sleep(AFTER_S)
    stage.check(load.answered > 0, "requests came in meanwhile")
    stage.check(not load.failures, f"none failed ({load.described()})")
    stage.figure(answered=load.answered, slowest_s=load.slowest_s)

    async def back() -> bool:
        known = await target.metric("headrace_control_processes", role="router")
        fresh = await target.metric("headrace_scrape_age_seconds")
        return before.joined() and known > 0 and fresh < 5

    stage.figure(back_after_s=await stage.check_until(back, "it is back and hears routers", 120))

    async def makes_keys() -> bool:
        answer = await target.client.get("/admin/keys")
        return answer.status_code == 200

    await stage.check_until(makes_keys, "keys can be administered again", 60)
