"""Filling the KV cache of the tight pool, for the drills that need it full."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serve_app.drills.frame import DrillImpossible, Stage
from serve_app.drills.load import Streams

PROMPT_RATIO = 0.09
TOKENS = 200
FILL_S = 60.0
# A Control that has just come back hears every process's metrics within its period.
REPORT_S = 30.0


async def kv_capacity_tokens(stage: Stage) -> float:
    """Return the tokens that one replica's KV cache holds.

    Raises:
        DrillImpossible: the pool has no replica, or several: no one of them would be filled.
    """
    target, pool = stage.target, stage.target.names.tight
    replicas = await target.replicas(pool)
    if replicas != 1:
        raise DrillImpossible(f"pool {pool} has {replicas} replicas; one alone can be filled")

    async def reported() -> bool:
        return await target.metric("headrace_engine_kv_capacity_tokens", pool=pool) > 0

    await stage.until(reported, f"the size of the KV cache of pool {pool}", REPORT_S)
    return await target.metric("headrace_engine_kv_capacity_tokens", pool=pool)


@asynccontextmanager
async def filled(stage: Stage, kv_ratio: float) -> AsyncIterator[Streams]:
    """Hold the pool's KV cache at ``kv_ratio`` with Critical streams while the block runs."""
    target, pool = stage.target, stage.target.names.tight
    tokens = int(PROMPT_RATIO * await kv_capacity_tokens(stage))
    streams = Streams(target, target.names.tight_model, TOKENS)
    stage.inject(f"Critical streams of {tokens} tokens fill pool {pool} to {kv_ratio:.0%}")

    # Nearly as many as it takes at once, the rest one by one.
    streams.open(int(kv_ratio / PROMPT_RATIO) - 1, prompt_tokens=tokens, service_tier="priority")

    async def full() -> bool:
        used = await target.metric("headrace_engine_kv_usage_ratio", pool=pool)
        if used >= kv_ratio:
            return True
        if streams.began() == len(streams.all):
            streams.open(1, prompt_tokens=tokens, service_tier="priority")
        return False

    try:
        await stage.until(full, f"{kv_ratio:.0%} of the KV cache of pool {pool} in use", FILL_S)
        yield streams
    finally:
        await streams.leave()
