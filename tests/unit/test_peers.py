"""The live exchange: real cores, real sockets, several routers in one loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from serve_app import peers as peers_module
from serve_app.core.controller import Controller
from serve_app.core.exchange import RouterId
from serve_app.core.policy import PoolPolicy
from serve_app.core.types import (
    KeyId,
    PoolName,
    PriorityClass,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Ticket,
)
from serve_app.engine.channel_router import RouterChannel
from serve_app.gate import Gate
from serve_app.peers import Peers

POOL = PoolName("chat")
PORTS = range(21_000, 22_000)
WAIT_S = 120.0
SLOTS = 8


class Router:
    """One router's core with its end of the exchange."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.core = Controller(router=RouterId(name))
        self.gate = Gate(self.core, time.monotonic, lambda notice: None)
        self.channel = RouterChannel("127.0.0.1", PORTS, 4096)
        self.peers = Peers(self.gate, self.channel)
        self.gate.configure({POOL: PoolPolicy(max_concurrency_per_replica=SLOTS)})

    @property
    def address(self) -> tuple[str, bytes]:
        return (self.channel.address.endpoint, self.channel.address.server_key)

    def observe(self, sequence: int, running: int) -> None:
        view = ReplicaView(ReplicaId("r1"), POOL, sequence, SLOTS, running, 0, 0.0, 100_000)
        self.gate.observe(view)

    def known_peers(self) -> int:
        return len(self.core._pools[POOL].peers)

    async def close(self) -> None:
        await self.peers.stop()
        self.channel.close()
        self.gate.close()


@pytest_asyncio.fixture
async def routers(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Router]]:
    monkeypatch.setattr(peers_module, "EXCHANGE_PERIOD_S", 0.02)
    made = [Router(name) for name in "abc"]
    addresses = {router.name: router.address for router in made}
    for router in made:
        router.peers.know(addresses)
    yield made
    for router in made:
        await router.close()


async def until_they_know(routers: list[Router], peers: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while any(router.known_peers() != peers for router in routers):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def ticket(name: str, priority_class: PriorityClass = PriorityClass.STANDARD) -> Ticket:
    return Ticket(
        RequestId(name), POOL, TenantId("t"), KeyId("k"), priority_class, 10, max_tokens=10
    )


async def test_routers_that_know_each_other_divide_what_is_free(routers: list[Router]) -> None:
    """Each alone would take all eight places."""
    await until_they_know(routers, peers=2)
    for router in routers:
        router.observe(1, running=0)
    async with AsyncExitStack() as held:
        tasks = []
        for router in routers:
            for number in range(SLOTS):
                place = router.gate.place(ticket(f"{router.name}{number}"))
                tasks.append(asyncio.create_task(held.enter_async_context(place)))
        await asyncio.sleep(0)
        assert sum(router.gate.in_flight(POOL) for router in routers) == SLOTS
        assert all(router.gate.in_flight(POOL) for router in routers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_router_is_not_its_own_peer(routers: list[Router]) -> None:
    assert [router.peers.count for router in routers] == [2, 2, 2]
    await until_they_know(routers, peers=2)


async def test_a_router_that_ends_is_forgotten_and_its_part_shared_out(
    routers: list[Router],
) -> None:
    await until_they_know(routers, peers=2)
    await routers[2].peers.stop()
    await until_they_know(routers[:2], peers=1)


async def test_the_last_router_of_several_has_everything(routers: list[Router]) -> None:
    await until_they_know(routers, peers=2)
    for other in routers[1:]:
        await other.peers.stop()
    routers[0].peers.know({"a": routers[0].address})
    await until_they_know(routers[:1], peers=0)


async def test_a_router_that_fails_to_tell_goes_on_hearing_and_tells_again(
    routers: list[Router], monkeypatch: pytest.MonkeyPatch
) -> None:
    await until_they_know(routers, peers=2)
    digest = routers[0].gate.digest
    monkeypatch.setattr(routers[0].gate, "digest", lambda: 1 / 0)
    await until_they_know(routers[1:], peers=1)
    assert routers[0].known_peers() == 2
    monkeypatch.setattr(routers[0].gate, "digest", digest)
    await until_they_know(routers, peers=2)
