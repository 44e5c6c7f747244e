"""A pool that follows its demand: from nothing, up, and back to nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.e2e.fleet import MOST
from tests.e2e.waiting import until
from tests.stack import Stack

BODY = {"model": "elastic", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def stack(fleet_stack: Stack) -> Stack:
    return fleet_stack


def replicas(stack: Stack) -> int:
    return len(stack.processes("pool-elastic", "Engine"))


def waiting(stack: Stack) -> float:
    return stack.metric("headrace_queue_depth", pool="elastic")


async def ask(stack: Stack, count: int, **fields: Any) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    headers = {"authorization": f"Bearer {stack.key}"}
    async with httpx.AsyncClient(
        base_url=stack.url, timeout=120, limits=limits, headers=headers
    ) as client:
        return await asyncio.gather(*(client.post(CHAT, json=BODY | fields) for _ in range(count)))


@pytest.mark.proof
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
        wanted = stack.metric("headrace_pool_replicas_wanted", pool="elastic")
        return wanted == MOST == stack.metric("headrace_replicas", pool="elastic")

    await asyncio.to_thread(until, grown, "it has grown")
    stop.set()
    await asyncio.gather(*clients)
    assert set(codes) == {200}

    until(lambda: replicas(stack) == 0, "it has gone")
    assert stack.metric("headrace_pool_replicas_wanted", pool="elastic") == 0
    [again] = await ask(stack, 1, max_tokens=5)
    assert again.status_code == 200


async def test_a_client_that_leaves_does_not_take_the_wake_along(stack: Stack) -> None:
    held = False
    while not held:
        await asyncio.to_thread(until, lambda: replicas(stack) == 0, "it sleeps")
        asking = asyncio.create_task(ask(stack, 1))
        # Whoever looks late finds it answered.
        await asyncio.to_thread(
            until, lambda each=asking: waiting(stack) == 1 or each.done(), "a router holds it"
        )
        held = not asking.done()
    asking.cancel()
    await asyncio.to_thread(until, lambda: waiting(stack) == 0, "it has left")
    await asyncio.to_thread(until, lambda: replicas(stack) >= 1, "it wakes all the same")
