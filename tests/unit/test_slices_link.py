"""Routers and Control's desk on one loop: what waits, what is fetched, what is told.

Time is virtual: on a busy machine what is fetched would come too late, and be unavailable.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from serve_app.core.limits import Limits, Scope, ScopeKind, Short
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.core.types import RequestId
from serve_app.errors import ApiError
from serve_app.granter import GrantDesk
from serve_app.limiter import RouterLimits
from serve_app.slices_link import SlicesLink
from tests.virtual_time import in_virtual_time


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread takes real time. The store is in memory, and waits for nothing."""

    async def at_once(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named)

    monkeypatch.setattr(asyncio, "to_thread", at_once)


class Clock:
    """Monotonic seconds: the loop's own, and what a test adds."""

    def __init__(self) -> None:
        self.added_s = 0.0

    def __call__(self) -> float:
        return asyncio.get_running_loop().time() + self.added_s


@dataclass(frozen=True)
class Taken:
    epoch: int
    routers: tuple[str, ...]
    gone_lately: bool = False
    alive_lately: bool = True


@dataclass
class Record:
    """A store in memory."""

    epoch: int = 0
    routers: set[str] = field(default_factory=set)

    def begin(self) -> Taken:
        self.epoch += 1
        return Taken(self.epoch, tuple(self.routers))

    def add(self, router: str, epoch: int) -> None:
        if epoch != self.epoch:
            raise RuntimeError("superseded")
        self.routers.add(router)

    def remove(self, router: str, epoch: int, *, lost: bool) -> None:
        self.routers.discard(router)

    def is_latest(self, epoch: int) -> bool:
        return epoch == self.epoch


class Line:
    """What routers reach Control by: it can be cut, and the desk behind it exchanged."""

    def __init__(self, desk: GrantDesk) -> None:
        self.desk = desk
        self.cut = False
        self.exchanges = 0

    async def exchange_slices(self, message: Message) -> Reply:
        await asyncio.sleep(0)
        if self.cut:
            raise ConnectionError("cut")
        self.exchanges += 1
        return await self.desk.exchange(message)

    async def slices_bell(self, router: str) -> Bell:
        if self.cut:
            raise ConnectionError("cut")
        return await self.desk.bell(router)


@dataclass
class Fleet:
    clock: Clock
    record: Record
    line: Line
    links: list[SlicesLink]
    routers: list[RouterLimits]
    asked: int = 0

    async def ask(self, router: int, *scopes: Scope, tokens: int = 1) -> ApiError | None:
        """Take a request at a router and leave it open."""
        self.asked += 1
        wanted = (RequestId(f"q{self.asked}"), scopes, tokens, tokens)
        taken = self.routers[router].take(*wanted)
        if isinstance(taken, Short):
            taken = await self.routers[router].fetch(*wanted, short=taken)
        return taken[1]


async def desk_of(record: Record, clock: Clock) -> GrantDesk:
    desk = GrantDesk(record, clock, forget_after_s=30.0)
    await desk.begin()
    return desk


@asynccontextmanager
async def fleet(count: int) -> AsyncIterator[Fleet]:
    clock, record = Clock(), Record()
    line = Line(await desk_of(record, clock))
    links = [SlicesLink(f"router-{number}", line, clock) for number in range(count)]
    routers = [RouterLimits(clock, lambda refused: None, link) for link in links]
    for link in links:
        link.start()
    await until(lambda: len(line.desk.granter.routers()) == count)
    try:
        yield Fleet(clock, record, line, links, routers)
    finally:
        line.cut = False
        for link in links:
            await link.stop()


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  # the condition is another task's
            await asyncio.sleep(0.01)


def scope(name: str = "k", **limits: int) -> Scope:
    return Scope(ScopeKind.KEY, name, Limits(**limits))


@in_virtual_time
async def test_one_router_is_handed_the_whole_limit_once_and_then_decides_alone() -> None:
    async with fleet(1) as site:
        key = scope(requests_per_min=3)
        assert await site.ask(0, key) is None
        exchanges = site.line.exchanges
        site.line.cut = True
        assert [await site.ask(0, key) for _ in range(2)] == [None, None]
        refused = await site.ask(0, key)
        assert refused is not None
        assert refused.code == "rate_limit_exceeded"
        assert 19.0 < (refused.retry_after_s or 0) <= 20.0
        assert site.line.exchanges == exchanges


@in_virtual_time
async def test_limits_are_known_once_control_has_answered_and_stay_so_while_it_is_away() -> None:
    """Before, a request would be refused: a router that is not known is not ready."""
    clock = Clock()
    line = Line(await desk_of(Record(), clock))
    line.cut = True
    link = SlicesLink("router", line, clock)
    link.start()
    await asyncio.sleep(5)
    assert not link.known
    line.cut = False
    await until(lambda: link.known)
    line.cut = True
    link._contact.kick()
    await asyncio.sleep(60)
    assert link.known
    await link.stop()


@pytest.mark.parametrize("kind", ["requests_per_min", "tokens_per_min", "concurrent"])
@in_virtual_time
async def test_a_thousand_requests_through_four_routers_get_the_whole_limit_and_no_more(
    kind: str,
) -> None:
    async with fleet(4) as site:
        key, began_at_s = scope(**{kind: 800}), site.clock()
        shares = random.Random(5).choices(range(4), weights=[8, 4, 2, 1], k=1000)
        answers = await asyncio.gather(*(site.ask(router, key) for router in shares))
        granted = sum(answer is None for answer in answers)
        drained = 0 if kind == "concurrent" else (site.clock() - began_at_s) * 800 / 60
        assert 0.99 * 800 <= granted <= 800 + drained
        assert {answer.code for answer in answers if answer} == {"rate_limit_exceeded"}


@in_virtual_time
async def test_a_recall_that_takes_long_is_asked_for_again_however_busy_the_router_is() -> None:
    class Slow:
        """A Control whose recalls never come back."""

        asked = 0

        async def exchange_slices(self, message: Message) -> Reply:
            self.asked += len(message.wants)
            pending = tuple(want.key for want in message.wants)
            return Reply(1, message.sequence, pending=pending)

        async def slices_bell(self, router: str) -> Bell:
            return await asyncio.get_running_loop().create_future()

    now_s, slow = 0.0, Slow()
    link = SlicesLink("router", slow, lambda: now_s)
    limits = RouterLimits(lambda: now_s, lambda refused: None, link)
    link.start()
    wanted = (RequestId("q"), (scope(concurrent=1),), 1, 1)
    short = limits.take(*wanted)
    assert isinstance(short, Short)
    asking = asyncio.create_task(limits.fetch(*wanted, short=short))
    for _ in range(400):
        now_s += 0.01
        link._contact.kick()
        await asyncio.sleep(0)
    assert slow.asked >= 3
    asking.cancel()
    await link.stop()


@in_virtual_time
async def test_a_slot_that_another_router_does_not_need_is_fetched() -> None:
    async with fleet(2) as site:
        key = scope(concurrent=1)
        assert await site.ask(0, key) is None
        assert (await site.ask(1, key)) is not None
        site.routers[0].settle(RequestId("q1"), 0)
        site.clock.added_s += 1.0
        assert await site.ask(1, key) is None


@in_virtual_time
async def test_without_control_a_limit_never_seen_is_503_and_one_held_goes_on() -> None:
    async with fleet(2) as site:
        key = scope(requests_per_min=10)
        for router in (0, 1, 0, 1):
            assert await site.ask(router, key) is None
        site.line.cut = True
        assert await site.ask(0, key) is None
        unknown = await site.ask(0, scope("other", requests_per_min=10))
        assert unknown is not None
        assert (unknown.status, unknown.code) == (503, "limits_unavailable")
        assert unknown.retry_after_s == 1.0
        answers = [await site.ask(0, key) for _ in range(10)]
        codes = {answer.code for answer in answers if answer is not None}
        assert codes == {"limits_unavailable"}, "the other router's part may be unused"


@in_virtual_time
async def test_a_new_control_takes_over_what_is_held_and_the_old_one_grants_no_more() -> None:
    async with fleet(2) as site:
        key, began_at_s = scope(requests_per_min=100), site.clock()
        await asyncio.gather(*(site.ask(number % 2, key) for number in range(60)))
        old, site.line.desk = site.line.desk, await desk_of(site.record, site.clock)
        await until(lambda: len(site.line.desk.granter.routers()) == 2)
        assert not site.line.desk.granter.recovering
        answers = await asyncio.gather(*(site.ask(number % 2, key) for number in range(80)))
        drained = (site.clock() - began_at_s) * 100 / 60
        assert sum(answer is None for answer in answers) <= 40 + drained
        await old.follow()
        assert old.superseded
        with pytest.raises(RuntimeError):
            await old.exchange(Message("router-0", 1, 99))  # type: ignore[arg-type]


@in_virtual_time
async def test_a_router_that_stops_gives_everything_back_at_once() -> None:
    async with fleet(2) as site:
        key = scope(concurrent=2)
        assert [await site.ask(0, key) for _ in range(2)] == [None, None]
        for number in (1, 2):
            site.routers[0].settle(RequestId(f"q{number}"), 0)
        await site.links[0].stop()
        assert site.line.desk.granter.routers() == ["router-1"]
        await site.line.desk.follow()
        assert site.record.routers == {"router-1"}
        assert [await site.ask(1, key) for _ in range(2)] == [None, None]


@in_virtual_time
async def test_a_control_that_was_stopped_takes_nobody_for_dead() -> None:
    async with fleet(1) as site:
        assert await site.ask(0, scope(concurrent=2)) is None
        site.clock.added_s += 100
        await site.line.desk.follow()
        assert site.line.desk.granter.routers() == ["router-0"]


@in_virtual_time
async def test_a_router_whose_process_is_gone_is_not_waited_for() -> None:
    clock, record = Clock(), Record(routers={"old", "older"})
    alive: set[str] | None = set()
    desk = GrantDesk(record, clock, 30.0, lambda: alive)
    await desk.begin()
    assert not desk.granter.recovering
    await desk.follow()
    assert record.routers == set()

    line = Line(desk)
    link = SlicesLink("router-0", line, clock)
    link.start()
    await until(lambda: desk.granter.routers() == ["router-0"])
    for task in link._contact._tasks:
        task.cancel()
    clock.added_s += 2.5
    await desk.follow()
    clock.added_s += 1.0
    alive = None
    await desk.follow()
    assert desk.granter.routers() == ["router-0"], "nobody can tell"
    alive = set()
    await desk.follow()
    assert desk.granter.routers() == []


@in_virtual_time
async def test_a_router_that_is_silent_for_long_loses_its_parts() -> None:
    async with fleet(1) as site:
        assert await site.ask(0, scope(concurrent=2)) is None
        other = SlicesLink("other", site.line, site.clock)
        other.start()
        await until(lambda: len(site.line.desk.granter.routers()) == 2)
        for task in site.links[0]._contact._tasks:
            task.cancel()
        for _ in range(16):
            site.clock.added_s += 2.0
            site.line.desk.heard("other")
            await site.line.desk.follow()
        assert site.line.desk.granter.routers() == ["other"]
        assert site.record.routers == {"other"}
        await other.stop()


@in_virtual_time
async def test_a_request_that_goes_away_while_it_waits_leaves_nothing() -> None:
    async with fleet(1) as site:
        held = asyncio.Event()
        exchange = site.line.exchange_slices

        async def slow(message: Message) -> Reply:
            await held.wait()
            return await exchange(message)

        site.line.exchange_slices = slow  # type: ignore[method-assign]
        task = asyncio.create_task(site.ask(0, scope(concurrent=1)))
        await until(lambda: site.links[0].waiting == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        held.set()
        assert site.links[0].waiting == 0
        assert await site.ask(0, scope(concurrent=1)) is None
