"""Routers, Control's treasury and the ledger on one loop and a real database.

Time is virtual: on a busy machine what is fetched would come too late, and be unavailable.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from serve_app.core.budget import (
    FOREVER,
    Account,
    Budget,
    BudgetKey,
    BudgetScope,
    Line,
    Window,
)
from serve_app.core.pricing import RateCard, Rates
from serve_app.core.purses import Lacking, Overdrawn, Reserved
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.grants import GrantStore
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.usage import UsageLedger
from serve_app.ledger.verify import verify
from serve_app.ledger.writer import LedgerWriter
from serve_app.purse_link import PurseLink
from serve_app.treasury import ABANDON_S, MoneyBell, Treasury
from serve_app.usage import encode
from tests.usage_records import START_S, charge, record
from tests.virtual_time import in_virtual_time

pytestmark = pytest.mark.slow

ACME = BudgetKey(BudgetScope.TENANT, "acme")
KEY = BudgetKey(BudgetScope.KEY, "k1")
# A token out costs a thousand nano-dollars.
RATES = Rates(output_nanousd=1000)
MOST_TOKENS = 20


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread takes real time. Others have their turn all the same."""

    async def in_turn(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        await asyncio.sleep(0)
        found = function(*arguments, **named)
        await asyncio.sleep(0)
        return found

    monkeypatch.setattr(asyncio, "to_thread", in_turn)


@dataclass
class Wire:
    """What routers reach Control by: it can be cut."""

    treasury: Treasury
    cut: bool = False
    calls: int = 0

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        if self.cut:
            raise ConnectionError("cut")
        self.calls += 1
        return await self.treasury.lend(router, accounts)

    async def money_bell(self, router: str) -> MoneyBell:
        if self.cut:
            raise ConnectionError("cut")
        return await self.treasury.bell(router)


class Site:
    """Some routers and one Control."""

    def __init__(self, folder: Path, count: int) -> None:
        self.database = Database(f"sqlite:///{folder}/books.db")
        # Control's clock, the routers', and when requests come as their ids tell.
        self.control_s = self.routers_s = self.at_s = START_S
        self.budgets = BudgetStore(self.database, lambda: self.control_s)
        prices = PriceStore(self.database)
        prices.replace([RateCard("all", RATES)], "")
        self.ledger = UsageLedger(self.database, prices)
        self.writer = LedgerWriter(self.ledger)
        epoch = GrantStore(self.database).begin().epoch
        names = [f"router-{number}" for number in range(count)]
        clock = asyncio.get_running_loop().time
        self.line = Wire(Treasury(self.budgets, clock, lambda: names, lambda: epoch))
        self.links = [PurseLink(name, self.line, clock, lambda: self.routers_s) for name in names]
        self.numbers = itertools.count(1)

    async def reserve(
        self, place: int, amount: int, keys: Sequence[BudgetKey] = (ACME,), least: int | None = None
    ) -> tuple[int, Reserved | Overdrawn | None]:
        number = next(self.numbers)
        name = charge(number, self.at_s).request_id
        link = self.links[place]
        least = amount if least is None else least

        def attempt() -> Reserved | Lacking | Overdrawn:
            return link.reserve(name, keys, amount, least)

        answer = attempt()
        if isinstance(answer, Lacking):
            return number, await link.fetch(name, answer, attempt)
        return number, answer

    async def pay(self, place: int, number: int, tokens: int, at_s: int = START_S) -> None:
        """End a request as the router does: settle, have the ledger commit, let go."""
        of = charge(number, at_s, price_version=1)
        purses = self.links[place].purses
        purses.settle(of.request_id, RATES.output_nanousd * tokens)
        seen = record(of, prompt_tokens=0, cached_prompt_tokens=0, output_tokens=tokens)
        await self.writer.write([encode(seen)])
        purses.acknowledge(of.request_id, self.links[place].now_s())

    def spent(self) -> int:
        [balance] = [each for each in self.budgets.balances() if each.budget.key == ACME]
        return balance.spent_nanousd


@asynccontextmanager
async def made(folder: Path, count: int) -> AsyncIterator[Site]:
    site = Site(folder, count)
    for link in site.links:
        link.start()
    try:
        yield site
    finally:
        site.line.cut = False
        for link in site.links:
            await link.stop()
        await site.writer.close()
        site.database.close()


async def until_reserved(site: Site, place: int, amount: int) -> None:
    async with asyncio.timeout(20):
        while (await site.reserve(place, amount))[1] != Reserved(amount):  # noqa: ASYNC110  # another task's
            await asyncio.sleep(0.05)


@in_virtual_time
async def test_a_thousand_requests_through_four_routers_spend_nearly_all_and_never_more(
    tmp_path: Path,
) -> None:
    amount = 8_000_000
    async with made(tmp_path, 4) as site:
        site.budgets.put(Budget(ACME, amount, Window.NONE))
        chance = random.Random(3)
        places = chance.choices(range(4), weights=[8, 4, 2, 1], k=1000)

        async def one(place: int) -> bool:
            while True:
                number, answer = await site.reserve(place, 1000 * MOST_TOKENS)
                if isinstance(answer, Reserved):
                    await asyncio.sleep(0)
                    await site.pay(place, number, chance.randint(5, 15))
                    return True
                if isinstance(answer, Overdrawn) and answer.exhausted:
                    return False
                await asyncio.sleep(0.02)

        served = await asyncio.gather(*(one(place) for place in places))
        assert not all(served), "there were more than it pays for"
        assert 0.99 * amount <= site.spent() <= amount
        assert verify(site.database).differences == 0
        assert all(not link.purses.open_requests for link in site.links)


@in_virtual_time
async def test_nothing_is_asked_where_a_purse_suffices(tmp_path: Path) -> None:
    async with made(tmp_path, 1) as site:
        site.budgets.put(Budget(ACME, 10**9, Window.NONE))
        await site.reserve(0, 1000)
        site.line.cut = True
        for _ in range(20):
            assert (await site.reserve(0, 1000))[1] == Reserved(1000)


@in_virtual_time
async def test_what_lies_unused_elsewhere_is_fetched(tmp_path: Path) -> None:
    async with made(tmp_path, 2) as site:
        site.budgets.put(Budget(ACME, 1000, Window.NONE))
        number, first = await site.reserve(0, 900)
        assert first == Reserved(900)
        assert (await site.reserve(1, 200))[1] == Overdrawn(ACME, exhausted=False)
        site.links[0].purses.void(charge(number).request_id)
        # A denial is remembered for a second.
        await until_reserved(site, 1, 900)


@in_virtual_time
async def test_of_two_who_hold_too_little_one_gets_enough(tmp_path: Path) -> None:
    async with made(tmp_path, 2) as site:
        site.budgets.put(Budget(ACME, 1000, Window.NONE))
        numbers = [(await site.reserve(place, 500))[0] for place in (0, 1)]
        for place, number in enumerate(numbers):
            site.links[place].purses.void(charge(number).request_id)
        answers: list[Reserved | Overdrawn | None] = []
        # On a busy machine neither gives back in time: both are told to ask again, and do.
        async with asyncio.timeout(20):
            while Reserved(800) not in answers:
                both = await asyncio.gather(*(site.reserve(place, 800) for place in (0, 1)))
                answers = [answer for _, answer in both]
        assert answers.count(Reserved(800)) == 1


@in_virtual_time
async def test_the_strictest_of_several_budgets_holds(tmp_path: Path) -> None:
    async with made(tmp_path, 1) as site:
        site.budgets.put(Budget(ACME, 10**6, Window.NONE))
        site.budgets.put(Budget(KEY, 500, Window.NONE))
        assert (await site.reserve(0, 400, (ACME, KEY)))[1] == Reserved(400)
        assert (await site.reserve(0, 400, (ACME, KEY)))[1] == Overdrawn(KEY, exhausted=False)
        assert (await site.reserve(0, 400, (ACME, KEY), least=50))[1] == Reserved(100)


@in_virtual_time
async def test_control_away_is_nothing_known_and_not_a_budget_spent(tmp_path: Path) -> None:
    async with made(tmp_path, 1) as site:
        site.budgets.put(Budget(ACME, 1000, Window.NONE))
        site.line.cut = True
        assert (await site.reserve(0, 10))[1] is None
        site.line.cut = False
        await until_reserved(site, 0, 10)


async def spend_all(site: Site, at_s: int) -> int:
    """Ask for requests that come at a time until the budget is spent; return what they cost."""
    site.at_s = at_s
    cost = 0
    async with asyncio.timeout(60):
        while True:
            number, answer = await site.reserve(0, 1000 * MOST_TOKENS)
            assert answer is not None, "Control is there"
            if isinstance(answer, Reserved):
                await site.pay(0, number, MOST_TOKENS, at_s)
                cost += 1000 * MOST_TOKENS
            elif answer.exhausted:
                return cost
            else:
                await asyncio.sleep(0.05)


@pytest.mark.parametrize("window", [Window.DAY, Window.MONTH, Window.ROLLING])
@in_virtual_time
async def test_clocks_that_jump_and_come_back_move_no_money_to_another_window(
    tmp_path: Path, window: Window
) -> None:
    amount = 200_000
    async with made(tmp_path, 1) as site:
        site.budgets.put(Budget(ACME, amount, window, 7200 if window is Window.ROLLING else 0))
        number, answer = await site.reserve(0, 1000 * MOST_TOKENS)
        assert answer == Reserved(1000 * MOST_TOKENS)
        await site.pay(0, number, MOST_TOKENS)
        later_s = START_S + 40 * 86_400
        # Control alone is wrong, then a router alone, then both; and all is right again.
        for site.control_s, site.routers_s in ((later_s, START_S), (START_S, later_s)):
            site.at_s = site.routers_s
            number, answer = await site.reserve(0, 1000 * MOST_TOKENS)
            assert answer == Reserved(1000 * MOST_TOKENS)
            await site.pay(0, number, MOST_TOKENS, site.at_s)
        site.control_s = site.routers_s = START_S
        # To a rolling window what is booked ahead of its hours counts as well.
        ahead = 1000 * MOST_TOKENS if window is Window.ROLLING else 0
        assert await spend_all(site, START_S) == amount - 2 * 1000 * MOST_TOKENS - ahead
        if window is not Window.ROLLING:
            assert site.spent() == amount
        assert await spend_all(site, later_s) == amount - 1000 * MOST_TOKENS
        assert verify(site.database).differences == 0


@in_virtual_time
async def test_a_body_that_came_slowly_over_midnight_is_paid_and_booked_by_the_day_it_began_in(
    tmp_path: Path,
) -> None:
    amount = 100_000
    before_s, after_s = START_S + 86_399, START_S + 86_400
    async with made(tmp_path, 1) as site:
        site.budgets.put(Budget(ACME, amount, Window.DAY))
        site.control_s = site.routers_s = before_s
        assert await spend_all(site, before_s) == amount
        site.control_s = site.routers_s = after_s
        answer = (await site.reserve(0, 1000 * MOST_TOKENS))[1]
        assert answer == Overdrawn(ACME, exhausted=True), "it came before midnight"
        assert await spend_all(site, after_s) == amount
        site.at_s = before_s
        assert (await site.reserve(0, 1000 * MOST_TOKENS))[1] == answer
        assert site.spent() == amount
        assert verify(site.database).differences == 0


@in_virtual_time
async def test_a_removed_budgets_requests_end_and_leave_nothing_behind(tmp_path: Path) -> None:
    async with made(tmp_path, 2) as site:
        site.budgets.put(Budget(ACME, 10**6, Window.MONTH))
        await site.line.treasury.follow()
        for link in site.links:
            link.list = site.line.treasury.list
        open_ = [(place, await site.reserve(place, 1000 * MOST_TOKENS)) for place in (0, 1)]
        assert site.budgets.remove(ACME)
        await site.line.treasury.follow()
        for link in site.links:
            link.list = site.line.treasury.list
        for place, (number, answer) in open_:
            assert answer == Reserved(1000 * MOST_TOKENS)
            assert site.links[place].purses.open_requests == 1
            await site.pay(place, number, 7)
        async with asyncio.timeout(20):
            while site.budgets.holders() or any(link.purses.budgets() for link in site.links):  # noqa: ASYNC110  # other tasks'
                await asyncio.sleep(0.05)
        assert not any(link.purses.unreleased for link in site.links)
        site.budgets.put(Budget(ACME, 10**6, Window.MONTH))
        [balance] = site.budgets.balances()
        assert (balance.spent_nanousd, balance.outstanding_nanousd) == (2 * 7000, 0)
        assert verify(site.database).differences == 0


@in_virtual_time
async def test_what_lingers_is_let_go_of_however_often_there_is_something_to_say() -> None:
    class Silent:
        async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
            return []

        async def money_bell(self, router: str) -> MoneyBell:
            return await asyncio.get_running_loop().create_future()

    now_s = 0.0
    link = PurseLink("router", Silent(), lambda: now_s, lambda: START_S)
    link.purses.accept(link.purses.state(), [Line(ACME, FOREVER, 100, 100, needed=True)], now_s)
    cut_off = charge(1).request_id
    assert link.reserve(cut_off, [ACME], 100, 100) == Reserved(100)
    link.purses.settle(cut_off, 0, final=False, now_s=now_s)
    link.purses.acknowledge(cut_off, now_s)
    link.start()
    for _ in range(400):
        now_s += 0.1
        link._contact.kick()
        await asyncio.sleep(0)
    assert not link.purses.unreleased
    await link.stop()


@in_virtual_time
async def test_a_router_that_stops_lets_go_of_what_it_has(tmp_path: Path) -> None:
    async with made(tmp_path, 2) as site:
        site.budgets.put(Budget(ACME, 1000, Window.NONE))
        number, _ = await site.reserve(0, 800)
        site.links[0].purses.void(charge(number).request_id)
        await site.links[0].stop()
        assert site.budgets.holders() == set()
        assert (await site.reserve(1, 1000))[1] == Reserved(1000)


@pytest.mark.parametrize(
    "less",
    [Budget(ACME, 500, Window.NONE), Budget(ACME, 10**6, Window.MONTH)],
    ids=["amount", "window"],
)
@in_virtual_time
async def test_what_was_lent_of_a_budget_that_is_less_now_comes_back(
    tmp_path: Path, less: Budget
) -> None:
    async with made(tmp_path, 2) as site:
        site.budgets.put(Budget(ACME, 10**6, Window.NONE))
        await site.line.treasury.follow()
        await site.reserve(0, 1000)
        [purse] = site.links[0].purses._purses[ACME]
        assert purse.free > 0, "more was lent than one request needs"
        site.budgets.put(less)
        await site.line.treasury.follow()
        async with asyncio.timeout(20):
            while purse.free:  # noqa: ASYNC110  # another task's
                await asyncio.sleep(0.01)


@in_virtual_time
async def test_money_of_a_router_that_only_lost_control_is_not_lent_again(tmp_path: Path) -> None:
    """It may go on spending it: until its process is gone, and two minutes more."""
    async with made(tmp_path, 1) as site:
        site.budgets.put(Budget(ACME, 10**6, Window.NONE))
        await site.reserve(0, 1000)
        now_s, epoch = 0.0, site.line.treasury._epoch
        ray: dict[str, set[str] | None] = {}
        control = Treasury(site.budgets, lambda: now_s, lambda: [], epoch, lambda: ray["lists"])
        for ray["lists"] in ({"router-0"}, None, {"router-0"}):
            now_s += 2 * ABANDON_S
            await control.follow()
            assert site.budgets.holders() == {"router-0"}
        ray["lists"] = set()
        for _ in range(2):
            assert site.budgets.holders() == {"router-0"}
            now_s += ABANDON_S
            await control.follow()
        assert site.budgets.holders() == set()


@in_virtual_time
async def test_thresholds_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with made(tmp_path, 1) as site:
        site.budgets.put(Budget(ACME, 100_000, Window.NONE, alert_ratios=(0.5,), hard=False))
        treasury = site.line.treasury
        for tokens in (40, 20, 20):
            number = next(site.numbers)
            await site.pay(0, number, tokens)
            treasury._tell_alerts(site.budgets.balances())
        told = [each for each in caplog.records if "0.5 of it" in each.getMessage()]
        assert len(told) == 1
        await treasury.follow()
        assert treasury.list.keys == frozenset(), "nobody is stopped by a soft budget"
