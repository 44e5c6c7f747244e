"""Routers that stand still for seconds: nobody is refused what a limit still has.

Three routers and Control's desk in virtual time; one bucket for everybody is the judge. One router
stands still again and again, as on a machine with too much to do: nothing happens in it, then all
that came meanwhile.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.core.limits import Limits, Scope, ScopeKind, Short
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.core.types import RequestId
from serve_app.granter import GrantDesk
from serve_app.limiter import RouterLimits
from serve_app.slices_link import SlicesLink
from tests.unit.test_slices_link import Record, until
from tests.virtual_time import run

pytestmark = pytest.mark.slow

ROUTERS, CLIENTS, REQUESTS, LIMIT = 3, 48, 400, 400
ASKS = 10
SEEDS = range(60)
SCOPES = (Scope(ScopeKind.KEY, "k", Limits(requests_per_min=LIMIT)),)


class Stalling:
    """A process that stands still from time to time, or never."""

    def __init__(self, source: random.Random, *, ever: bool) -> None:
        now_s = asyncio.get_running_loop().time()
        self._stalls: list[tuple[float, float]] = []
        self._woken = 0
        end_s = now_s + 120 * ever
        while now_s < end_s:
            now_s += source.expovariate(1.0)
            until_s = now_s + source.uniform(1.0, 3.0)
            self._stalls.append((now_s, until_s))
            now_s = until_s

    async def awake(self) -> None:
        """Return when the process runs; in the order of the calls."""
        now_s = asyncio.get_running_loop().time()
        for from_s, until_s in self._stalls:
            if from_s <= now_s < until_s:
                self._woken += 1
                await asyncio.sleep(until_s - now_s + 1e-6 * self._woken)


class SlowLine:
    """One router's way to Control."""

    def __init__(self, desk: GrantDesk, router: Stalling, source: random.Random) -> None:
        self._desk = desk
        self._router = router
        self._source = source

    async def _travel(self) -> None:
        await asyncio.sleep(self._source.uniform(0.002, 0.03))

    async def exchange_slices(self, message: Message) -> Reply:
        await self._router.awake()
        await self._travel()
        reply = await self._desk.exchange(message)
        await self._travel()
        await self._router.awake()
        return reply

    async def slices_bell(self, router: str) -> Bell:
        await self._router.awake()
        await self._travel()
        bell = await self._desk.bell(router)
        await self._travel()
        await self._router.awake()
        return bell


class Judge:
    """One bucket for everybody."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at_s = clock()
        self.fill = 0.0

    def has_room(self) -> bool:
        now_s = self._clock()
        self.fill = max(0.0, self.fill - (now_s - self._at_s) * LIMIT / 60)
        self._at_s = now_s
        return self.fill + 1 <= LIMIT


async def a_burst(seed: int) -> Counter[str]:
    """Send REQUESTS by CLIENTS, each to the router with the fewest; return what came of them."""
    source = random.Random(seed)
    clock = asyncio.get_running_loop().time
    desk = GrantDesk(Record(), clock, forget_after_s=10.0)
    await desk.begin()
    nodes = [Stalling(source, ever=number == 0) for number in range(ROUTERS)]
    links = [
        SlicesLink(f"r{number}", SlowLine(desk, node, source), clock)
        for number, node in enumerate(nodes)
    ]
    routers = [RouterLimits(clock, lambda refused: None, link) for link in links]
    for link in links:
        link.start()
    await until(lambda: len(desk.granter.routers()) == ROUTERS)
    judge, told, open_at = Judge(clock), Counter[str](), [0] * ROUTERS
    together, names = asyncio.Semaphore(CLIENTS), iter(range(10**6))

    async def ask(number: int) -> int:
        name = RequestId(f"q{next(names)}")
        await asyncio.sleep(source.uniform(0.001, 0.01))
        await nodes[number].awake()
        taken: Any = routers[number].take(name, SCOPES, 1, 1)
        if isinstance(taken, Short):
            taken = await routers[number].fetch(name, SCOPES, 1, 1, short=taken)
        room, error = judge.has_room(), taken[1]
        if error is not None:
            told["refused with room"] += error.status == 429 and room
            return int(error.status)
        judge.fill += 1
        told["over the limit"] += not room
        await asyncio.sleep(source.uniform(0.2, 0.8))
        await nodes[number].awake()
        routers[number].settle(name, 1)
        return 200

    async def client() -> None:
        async with together:
            for _ in range(ASKS):
                number = min(range(ROUTERS), key=lambda each: (open_at[each], source.random()))
                open_at[number] += 1
                try:
                    status = await ask(number)
                finally:
                    open_at[number] -= 1
                if status != 503:
                    break
                await asyncio.sleep(1.0)
            told[str(status)] += 1

    await asyncio.gather(*(client() for _ in range(REQUESTS)))
    for link in links:
        await link.stop()
    return told


def test_nobody_is_refused_what_is_there_though_a_router_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def at_once(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    told = sum((run(a_burst(seed)) for seed in SEEDS), Counter[str]())
    assert told["200"] + told["429"] + told["503"] == REQUESTS * len(SEEDS)
    assert told["over the limit"] == 0
    assert told["refused with room"] == 0, told
    assert told["200"] == REQUESTS * len(SEEDS), told
