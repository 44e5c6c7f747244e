"""A KV cache that fills: the ladder climbs, refuses Sheddable, serves Critical, and climbs down."""

from __future__ import annotations

from serve_app.drills.frame import Stage
from serve_app.drills.load import ANSWER_S, body
from serve_app.drills.pressure import filled

KV_RATIO = 0.86


async def run(stage: Stage) -> None:
    """Fill the KV cache of the tight pool, ask in two classes, and let go."""
    target, pool = stage.target, stage.target.names.tight
    model = target.names.tight_model

    async def rung() -> float:
        return await target.metric("headrace_brownout_rung", pool=pool)

    async def up() -> bool:
        return await rung() >= 1

    async def down() -> bool:
        return await rung() == 0

    await stage.until(down, "no rung to begin with", 60)
    async with filled(stage, KV_RATIO):
        took_s = await stage.check_until(up, "the ladder climbs to rung 1 or above", 20)
        stage.figure(up_after_s=took_s)
        flex = await target.client.post(
            "/v1/completions", json=body(model, 4, service_tier="flex"), timeout=ANSWER_S
        )
        stage.check(flex.status_code in (429, 503), f"Sheddable is refused ({flex.status_code})")
        stage.check("retry-after" in flex.headers, "and told when to come again")
        first = await target.client.post(
            "/v1/completions", json=body(model, 4, service_tier="priority"), timeout=ANSWER_S
        )
        stage.check(first.status_code == 200, f"Critical is served ({first.status_code})")
    stage.figure(down_after_s=await stage.check_until(down, "it climbs down by itself", 120))
    again = await target.client.post(
        "/v1/completions", json=body(model, 4, service_tier="flex"), timeout=ANSWER_S
    )
    stage.check(again.status_code == 200, "Sheddable is served again")
