"""A pool that follows its demand: from nothing, up, and back to nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

MOST = 3
BODY = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """One pool of nought to three replicas that take two seconds to start."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    _, pool, gateway = document["applications"]
    pool["args"]["engine"] |= {"start_delay_s": 2.0}
    pool["args"]["replicas"] = {
        "num_replicas": 0,
        "autoscale": {"min_replicas": 0, "max_replicas": MOST},
    }
    settings = gateway["deployments"][0]["user_config"]["pools"]["sim"]
    settings |= {
        "max_concurrency_per_replica": 8,
        "hold_without_replica_s": 60,
        "queue_timeout_s": 120,
        "early_rejection": False,
        "scaling": {
            "to_zero": True,
            "cold_start_s": 2,
            "fast_s": 2,
            "slow_s": 4,
            "down_after_s": 5,
            "idle_s": 8,
        },
    }
    with running_stack(document) as running:
        yield running


def replicas(stack: Stack) -> int:
    return len(stack.processes("pool-sim", "Engine"))


async def ask(stack: Stack, count: int, **fields: Any) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    headers = {"authorization": f"Bearer {stack.key}"}
    async with httpx.AsyncClient(
        base_url=stack.url, timeout=120, limits=limits, headers=headers
    ) as client:
        return await asyncio.gather(*(client.post(CHAT, json=BODY | fields) for _ in range(count)))


async def test_from_nothing_to_many_and_back_with_no_held_request_lost(stack: Stack) -> None:
    assert replicas(stack) == 0
    held = await ask(stack, 20, max_tokens=20)
    assert [each.status_code for each in held] == [200] * 20
    assert replicas(stack) >= 1

    stop = asyncio.Event()
    codes: list[int] = []

    async def client() -> None:
        while not stop.is_set():
            codes.extend(each.status_code for each in await ask(stack, 1, max_tokens=300))

    clients = [asyncio.create_task(client()) for _ in range(24)]

    def grown() -> bool:
        wanted = stack.metric("headrace_pool_replicas_wanted", pool="sim")
        return wanted == MOST == stack.metric("headrace_replicas", pool="sim")

    await asyncio.to_thread(until, grown, "it has grown")
    stop.set()
    await asyncio.gather(*clients)
    assert set(codes) == {200}

    until(lambda: replicas(stack) == 0, "it has gone")
    assert stack.metric("headrace_pool_replicas_wanted", pool="sim") == 0
    [again] = await ask(stack, 1, max_tokens=5)
    assert again.status_code == 200


async def test_a_client_that_leaves_does_not_take_the_wake_along(stack: Stack) -> None:
    until(lambda: replicas(stack) == 0, "it sleeps")
    with pytest.raises(httpx.ReadTimeout), stack.http() as client:
        client.post(CHAT, json=BODY, timeout=1.5)
    until(lambda: replicas(stack) >= 1, "it wakes all the same")
