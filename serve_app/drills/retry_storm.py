"""Refused clients that ask again at once take nothing from those that are served."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from serve_app.drills.frame import Stage
from serve_app.drills.load import ANSWER_S, body
from serve_app.drills.target import Target

TOKENS = 10
CLIENTS = 12
STORM_CLIENTS = 96
LEVEL_S = 8.0
KEPT_RATIO = 0.7
PAUSE_S = 0.05


@dataclass(slots=True)
class _Level:
    """A closed loop for some seconds: what was answered, what was refused."""

    target: Target
    statuses: Counter[int] = field(default_factory=Counter)
    told: int = 0

    async def run(self, clients: int, seconds: float) -> float:
        """Return the answers per second."""
        ends_s = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(self._client(ends_s))
        return self.statuses[200] / seconds

    async def _client(self, ends_s: float) -> None:
        while time.monotonic() < ends_s:
            request = body(self.target.names.tight_model, TOKENS)
            try:
                answer = await self.target.client.post(
                    "/v1/completions", json=request, timeout=ANSWER_S
                )
            except httpx.HTTPError:
                self.statuses[0] += 1
                continue
            if time.monotonic() <= ends_s or answer.status_code != 200:
                self.statuses[answer.status_code] += 1
            self.told += answer.status_code in (429, 503) and "retry-after" in answer.headers
            if answer.status_code != 200:
                # It was told to wait for longer, and does not.
                await asyncio.sleep(PAUSE_S)


async def run(stage: Stage) -> None:
    """Measure the tight pool at its capacity, then with eight times the clients."""
    target, pool = stage.target, stage.target.names.tight
    await stage.until_idle()
    stage.say(f"{CLIENTS} clients for {LEVEL_S:.0f} s")
    calm_per_s = await _Level(target).run(CLIENTS, LEVEL_S)
    stage.inject(f"{STORM_CLIENTS} clients that retry at once, for {LEVEL_S:.0f} s")
    storm = _Level(target)
    storm_per_s = await storm.run(STORM_CLIENTS, LEVEL_S)
    refused = storm.statuses[429] + storm.statuses[503]
    others = sum(storm.statuses.values()) - refused - storm.statuses[200]
    stage.figure(calm_per_s=calm_per_s, storm_per_s=storm_per_s, refused=refused)
    stage.check(calm_per_s > 0, "requests were answered before the storm")
    stage.check(
        storm_per_s >= KEPT_RATIO * calm_per_s,
        f"goodput in the storm is {storm_per_s:.1f}/s, {calm_per_s:.1f}/s before it",
    )
    stage.check(not others, f"every request was answered or refused ({dict(storm.statuses)})")
    stage.check(storm.told == refused, "every refusal says when to come again")

    async def queue_empty() -> bool:
        return await target.metric("headrace_queue_depth", pool=pool) == 0 and await target.idle()

    stage.figure(
        idle_after_s=await stage.check_until(queue_empty, "nothing is left of the storm", 30)
    )
