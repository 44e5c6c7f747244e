"""A long Sheddable prompt at a full KV cache is refused before it evicts anybody."""

from __future__ import annotations

from serve_app.drills.frame import Stage
from serve_app.drills.load import ANSWER_S, BYTES_PER_TOKEN, body
from serve_app.drills.pressure import filled, kv_capacity_tokens

KV_RATIO = 0.86
LONG_RATIO = 0.3
TRIES = 3


async def run(stage: Stage) -> None:
    """Fill the KV cache with Critical streams and send long Sheddable prompts at it."""
    target, pool = stage.target, stage.target.names.tight

    async def preemptions() -> float:
        return await target.metric("headrace_engine_preemptions_total", pool=pool)

    before = await preemptions()
    async with filled(stage, KV_RATIO) as streams:
        long_tokens = int(LONG_RATIO * await kv_capacity_tokens(stage))
        stage.inject(f"{TRIES} Sheddable prompts of {long_tokens} tokens")
        statuses = []
        for number in range(TRIES):
            prompt = f"{number} ".ljust(BYTES_PER_TOKEN * long_tokens, "y")
            fields = body(target.names.tight_model, 8, prompt, service_tier="flex")
            answer = await target.client.post("/v1/completions", json=fields, timeout=ANSWER_S)
            statuses.append(answer.status_code)
        refused = sum(status in (429, 503) for status in statuses)
        stage.check(refused == TRIES, f"every one is refused ({statuses})")
        running = sum(each.ended is None for each in streams.all)
        stage.check(running > 0, f"{running} streams go on")
        failed = streams.count("error") + streams.count("cut")
        stage.check(failed == 0, "none was cut")
    evicted = int(await preemptions() - before)
    stage.check(evicted == 0, f"{evicted} requests were preempted")
    stage.figure(refused=refused, streams=len(streams.all), preemptions=evicted)
