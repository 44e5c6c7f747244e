"""Controls as real processes over one database: stopped, continued, killed; no grant twice.

Four routers in this process spend as fast as they can. Which Control a router reaches is the
test's to say, so that an old one that was stopped still has its routers when it goes on.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from serve_app.core.budget import Account, Budget, BudgetKey, BudgetScope, Line, Window
from serve_app.core.limits import Limits, Scope, ScopeKind, Short
from serve_app.core.pricing import RateCard, Rates
from serve_app.core.purses import Lacking, Overdrawn, Reserved
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.core.types import RequestId
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.verify import verify
from serve_app.limiter import RouterLimits
from serve_app.purse_link import PurseLink
from serve_app.slices_link import SlicesLink
from serve_app.treasury import MoneyBell
from serve_app.usage import encode
from tests.control_process import ControlProcess
from tests.postgres import fresh_database, running_postgres
from tests.usage_records import START_S, charge, record

pytestmark = pytest.mark.slow

ROUTERS = 4
ACME = BudgetKey(BudgetScope.TENANT, "acme")
RATES = Rates(output_nanousd=1000)
MOST_NANOUSD = 20 * RATES.output_nanousd


class Way:
    """How one router reaches Control; where it leads can be changed at any time."""

    def __init__(self) -> None:
        self.control: ControlProcess | None = None

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self.control is None:
            raise ConnectionError("no Control")
        return await self.control.call(method, *arguments)

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        lines: list[Line] = await self._call("lend", router, accounts)
        return lines

    async def money_bell(self, router: str) -> MoneyBell:
        bell: MoneyBell = await self._call("money_bell", router)
        return bell

    async def exchange_slices(self, message: Message) -> Reply:
        reply: Reply = await self._call("exchange_slices", message)
        return reply

    async def slices_bell(self, router: str) -> Bell:
        bell: Bell = await self._call("slices_bell", router)
        return bell

    async def record_usage(self, payload: bytes) -> None:
        """Return when the ledger has it, from whichever Control: as a journal is sent on."""
        while True:
            try:
                async with asyncio.timeout(2):
                    return await self._call("record_usage", [payload])
            except (OSError, TimeoutError):
                await asyncio.sleep(0.05)


class Site:
    """Routers, a database, and the Controls that were started."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self.database = Database(url)
        self.budgets = BudgetStore(self.database, lambda: START_S)
        PriceStore(self.database).replace([RateCard("all", RATES)], "")
        self.ways = [Way() for _ in range(ROUTERS)]
        clock = time.monotonic
        names = [f"router-{number}" for number in range(ROUTERS)]
        pairs = list(zip(names, self.ways, strict=True))
        self.money = [PurseLink(name, way, clock, lambda: START_S) for name, way in pairs]
        self.slices = [SlicesLink(name, way, clock) for name, way in pairs]
        self.limits = [RouterLimits(clock, lambda refused: None, link) for link in self.slices]
        self.controls: list[ControlProcess] = []
        self.numbers = itertools.count(1)
        self.served = 0
        self.open = asyncio.Event()
        self.open.set()

    async def begin_control(self, dies_after: int | None = None) -> ControlProcess:
        name = f"c{len(self.controls)}"
        control = ControlProcess(self.url, self.folder, name, START_S, dies_after)
        self.controls.append(control)
        await control.ready()
        return control

    async def stop(self, control: ControlProcess) -> None:
        """Stop a Control, but not within a transaction: it would keep its locks, and nobody
        else could begin before it goes on.
        """
        while True:
            await asyncio.to_thread(control.pause)
            if await asyncio.to_thread(self._is_free):
                return
            control.signal(signal.SIGCONT)
            await asyncio.sleep(0.003)

    def _is_free(self) -> bool:
        try:
            with self.database.engine.connect() as connection:
                if self.database.is_sqlite:
                    connection.exec_driver_sql("PRAGMA busy_timeout = 50")
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                    connection.exec_driver_sql("PRAGMA busy_timeout = 10000")
                else:
                    connection.exec_driver_sql("SELECT value FROM meta FOR UPDATE NOWAIT")
                connection.rollback()
        except DBAPIError:
            return False
        return True

    def lead(self, control: ControlProcess, *routers: int) -> None:
        """Have these routers, or all, reach this Control from now on."""
        for number in routers or range(ROUTERS):
            self.ways[number].control = control

    async def serve_until(self, count: int) -> None:
        """Return when so many requests have been served in all."""
        async with asyncio.timeout(240):
            while self.served < count:  # noqa: ASYNC110  # others' doing
                await asyncio.sleep(0.01)

    async def spend(self, place: int, chance: random.Random) -> None:
        """Serve requests of the budget through a router until it is spent, while it is open."""
        link, way = self.money[place], self.ways[place]
        while await self.open.wait():
            name = charge(next(self.numbers)).request_id

            def attempt(name: RequestId = name) -> Reserved | Lacking | Overdrawn:
                return link.reserve(name, (ACME,), MOST_NANOUSD, MOST_NANOUSD)

            answer: Reserved | Lacking | Overdrawn | None = attempt()
            if isinstance(answer, Lacking):
                answer = await link.fetch(name, answer, attempt)
            if isinstance(answer, Reserved):
                tokens = chance.randint(5, 15)
                await asyncio.sleep(chance.random() * 0.02)
                link.purses.settle(name, RATES.output_nanousd * tokens)
                of = charge(price_version=1, request_id=name)
                seen = record(of, prompt_tokens=0, cached_prompt_tokens=0, output_tokens=tokens)
                await way.record_usage(encode(seen))
                link.purses.acknowledge(name, link.now_s())
                self.served += 1
            elif isinstance(answer, Overdrawn) and answer.exhausted:
                return
            else:
                await asyncio.sleep(0.05)

    def spent(self) -> int:
        [balance] = self.budgets.balances()
        return balance.spent_nanousd


@contextmanager
def database_url(kind: str, folder: Path) -> Iterator[str]:
    if kind == "sqlite":
        yield f"sqlite:///{folder}/books.db"
        return
    with running_postgres() as cluster, fresh_database(cluster) as url:
        yield url


@asynccontextmanager
async def site_of(kind: str, folder: Path) -> AsyncIterator[Site]:
    with database_url(kind, folder) as url:
        site = Site(url, folder)
        try:
            site.lead(await site.begin_control())
            for link in (*site.slices, *site.money):
                link.start()
            yield site
        finally:
            for way in site.ways:
                way.control = None
            for link in (*site.slices, *site.money):
                await link.stop()
            for control in site.controls:
                control.close()
            site.database.close()


DATABASES = pytest.mark.parametrize(
    "kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.proof)]
)


@DATABASES
@pytest.mark.parametrize(
    "requests", [300, pytest.param(3000, id="3000 requests", marks=pytest.mark.proof)]
)
async def test_a_budget_is_never_overspent_by_controls_that_are_stopped_continued_and_killed(
    tmp_path: Path, kind: str, requests: int
) -> None:
    amount = requests * 10 * RATES.output_nanousd
    async with site_of(kind, tmp_path) as site:
        site.budgets.put(Budget(ACME, amount, Window.NONE))
        chance = random.Random(requests)
        [first] = site.controls
        async with asyncio.TaskGroup() as tasks:
            for number in range(32):
                tasks.create_task(site.spend(number % ROUTERS, chance))
            # The old one is stopped with grants under way; half of the routers wait for it.
            await site.serve_until(requests // 8)
            await site.stop(first)
            second = await site.begin_control()
            assert await second.call("epoch") == 2
            site.lead(second, 0, 1)
            await site.serve_until(site.served + requests // 8)
            # It goes on where it was: with its old epoch, and messages of routers of its own.
            first.signal(signal.SIGCONT)
            with pytest.raises(ConnectionError, match="another Control"):
                await first.call("lend", "router-9", [Account(ACME, 0, 0, 0, 1000)])
            # Only now can what its routers hold be had by the others.
            site.lead(second)
            await site.serve_until(site.served + requests // 8)
            # One that dies between a grant's commit and its reply, again and again.
            for deaths in range(2):
                # Meanwhile nothing is spent, or there would be nothing left to die at.
                site.open.clear()
                dying = await site.begin_control(dies_after=3 + deaths)
                site.lead(dying)
                site.open.set()
                async with asyncio.timeout(240):
                    while dying.process.poll() is None:  # noqa: ASYNC110  # a process
                        await asyncio.sleep(0.01)
                assert dying.process.returncode == -signal.SIGKILL
            site.lead(await site.begin_control())
        assert 0.99 * amount <= site.spent() <= amount
        assert verify(site.database).differences == 0
        assert all(not link.purses.open_requests for link in site.money)


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
async def test_a_thousand_at_once_through_four_routers_spend_nearly_all_and_never_more(
    tmp_path: Path, kind: str
) -> None:
    amount = 3000 * 10 * RATES.output_nanousd
    async with site_of(kind, tmp_path) as site:
        site.budgets.put(Budget(ACME, amount, Window.NONE))
        chance = random.Random(7)
        async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
            for number in range(1000):
                tasks.create_task(site.spend(number % ROUTERS, chance))
        assert 0.99 * amount <= site.spent() <= amount
        assert verify(site.database).differences == 0
        assert all(not link.purses.open_requests for link in site.money)


@DATABASES
@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(n, marks=pytest.mark.proof) for n in (2, 3, 4))]
)
async def test_limits_are_never_granted_twice_by_two_controls(
    tmp_path: Path, kind: str, seed: int
) -> None:
    concurrent, per_minute = 12, 600
    scope = Scope(ScopeKind.KEY, "k1", Limits(per_minute, None, concurrent))
    async with site_of(kind, tmp_path) as site:
        chance = random.Random(seed)
        open_now = most_open = 0
        began_s = time.monotonic()
        ending = asyncio.Event()

        async def ask(place: int) -> None:
            nonlocal open_now, most_open
            limits = site.limits[place]
            while not ending.is_set():
                name = RequestId(f"q{next(site.numbers)}")
                wanted = (name, (scope,), 1, 1)
                taken = limits.take(*wanted)
                if isinstance(taken, Short):
                    taken = await limits.fetch(*wanted, short=taken)
                if taken[1] is None:
                    open_now += 1
                    most_open = max(most_open, open_now)
                    site.served += 1
                    await asyncio.sleep(chance.random() * 0.1)
                    open_now -= 1
                    limits.settle(name, 1)
                else:
                    await asyncio.sleep(0.01)

        [first] = site.controls
        async with asyncio.TaskGroup() as tasks:
            for number in range(24):
                tasks.create_task(ask(number % ROUTERS))
            await site.serve_until(100)
            # Less than the three seconds after which it would look by itself whether it is the one.
            await site.stop(first)
            second = await site.begin_control()
            site.lead(second, 0, 1)
            await asyncio.sleep(chance.random())
            first.signal(signal.SIGCONT)
            await site.serve_until(200)
            site.lead(second)
            await site.serve_until(400)
            second.signal(signal.SIGKILL)
            site.lead(await site.begin_control())
            await site.serve_until(500)
            ending.set()
        took_s = time.monotonic() - began_s
        assert most_open <= concurrent
        assert site.served <= per_minute + per_minute / 60 * took_s
