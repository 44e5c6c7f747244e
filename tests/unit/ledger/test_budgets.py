"""Budgets in the database: lent in fenced transactions, held against what the ledger has."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import event, text

from serve_app.core.budget import (
    Account,
    Budget,
    BudgetKey,
    BudgetScope,
    Line,
    Period,
    Window,
    period_of,
)
from serve_app.core.calendar import DAY_S
from serve_app.core.pricing import AMOUNT_NANOUSD_MAX, AmountTooLarge, RateCard, Rates
from serve_app.keys import KeyWish
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.grants import GrantStore, Superseded
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.spending import spent
from serve_app.ledger.store import KeyStore
from serve_app.ledger.usage import UsageLedger
from serve_app.ledger.verify import verify
from tests.usage_records import START_S, charge, record

ACME = BudgetKey(BudgetScope.TENANT, "acme")


class Wall:
    """The wall clock."""

    def __init__(self, at_s: float = START_S) -> None:
        self.at_s = at_s

    def __call__(self) -> float:
        return self.at_s


class Site:
    """One Control on a database."""

    def __init__(self, database: Database) -> None:
        self.wall = Wall()
        self.budgets = BudgetStore(database, self.wall)
        self.grants = GrantStore(database, self.wall)
        self.epoch = self.grants.begin().epoch
        prices = PriceStore(database)
        prices.replace([RateCard("all", Rates(request_nanousd=100))], "")
        self.ledger = UsageLedger(database, prices)
        self.count = 0

    def lend(self, router: str, need: int = 0, **fields: int) -> Line:
        """Lend for requests that come now, or ``at_s``."""
        values = {"start_s": 0, "granted": 0, "released": 0, "at_s": int(self.wall.at_s)}
        account = Account(ACME, **(values | fields), need=need)
        [line, *_] = self.budgets.lend(router, [account], self.epoch, 2)[0]
        return line

    def spend(self, requests: int, at_s: float | None = None) -> None:
        """Commit requests of a hundred nano-dollars each."""
        at_s = self.wall.at_s if at_s is None else at_s
        for _ in range(requests):
            self.count += 1
            of = charge(self.count, at_s, tenant="acme", price_version=1)
            self.ledger.commit([record(of)])


@pytest.fixture
def site(database: Database) -> Site:
    return Site(database)


def test_a_budget_is_kept_as_it_was_set(site: Site) -> None:
    rolling = Budget(ACME, 5, Window.ROLLING, 7200, (0.5, 1.0), hard=False)
    version = site.budgets.version()
    site.budgets.put(Budget(BudgetKey(BudgetScope.USER, "acme/ann"), 1, Window.DAY))
    site.budgets.put(rolling)
    site.budgets.put(replace(rolling, amount_nanousd=6))
    assert site.budgets.every()[0] == replace(rolling, amount_nanousd=6)
    assert len(site.budgets.every()) == 2
    assert site.budgets.add(ACME, 4) == replace(rolling, amount_nanousd=10)
    assert site.budgets.remove(ACME)
    assert not site.budgets.remove(ACME)
    assert site.budgets.add(ACME, 4) is None
    assert site.budgets.version() > version


def test_a_budget_that_would_be_too_large_stays_as_it_was(site: Site) -> None:
    full = Budget(ACME, AMOUNT_NANOUSD_MAX, Window.NONE)
    site.budgets.put(full)
    version = site.budgets.version()
    with pytest.raises(AmountTooLarge):
        site.budgets.add(ACME, 1)
    assert site.budgets.every() == [full]
    assert site.budgets.version() == version


def test_what_is_spent_and_what_is_lent_are_never_more_than_the_amount(site: Site) -> None:
    site.budgets.put(Budget(ACME, 1000, Window.NONE))
    site.spend(3)
    first = site.lend("a", need=500)
    assert first.granted == 500 + 200 // 8
    assert first.left == 700
    second = site.lend("b", need=500)
    assert second.granted == 175
    assert second.unmet
    assert site.lend("b", need=500, granted=175).granted == 175
    [balance] = site.budgets.balances()
    assert (balance.spent_nanousd, balance.outstanding_nanousd) == (300, 700)


def test_a_grant_that_never_arrived_is_told_again_and_not_given_twice(site: Site) -> None:
    site.budgets.put(Budget(ACME, 1000, Window.NONE))
    first = site.lend("a", need=100)
    assert site.lend("a", need=100).granted == first.granted
    late = site.lend("a", granted=first.granted, released=first.granted)
    assert late.left == 1000
    assert site.lend("a", granted=0, released=0).granted == first.granted
    [balance] = site.budgets.balances()
    assert balance.outstanding_nanousd == 0


def test_what_was_released_can_be_lent_again(site: Site) -> None:
    site.budgets.put(Budget(ACME, 1000, Window.NONE))
    first = site.lend("a", need=1000)
    site.spend(4)
    site.lend("a", granted=first.granted, released=1000)
    assert site.lend("b", need=1000).granted == 600


def test_a_superseded_control_lends_nothing(site: Site) -> None:
    site.budgets.put(Budget(ACME, 1000, Window.NONE))
    site.grants.begin()
    with pytest.raises(Superseded):
        site.lend("a", need=1)
    with pytest.raises(Superseded):
        site.grants.add("a", site.epoch)
    assert not site.grants.is_latest(site.epoch)


def test_a_new_month_begins_with_nothing_spent(site: Site) -> None:
    march = int(datetime(2027, 3, 31, 23, 59, tzinfo=UTC).timestamp())
    april = int(datetime(2027, 4, 1, 0, 1, tzinfo=UTC).timestamp())
    site.budgets.put(Budget(ACME, 1000, Window.MONTH))
    site.spend(10, march)
    assert site.lend("a", need=100, at_s=march).granted == 0
    fresh = site.lend("a", need=100, at_s=april)
    assert (fresh.granted >= 100, fresh.left) == (True, 1000)
    assert site.lend("b", need=100, at_s=march).left == 0, "the clock of who asks went back"


@pytest.mark.parametrize(
    "window", [Window.DAY, Window.WEEK, Window.MONTH, Window.ROLLING, Window.NONE]
)
def test_controls_clock_has_no_say_in_which_window_pays(site: Site, window: Window) -> None:
    now = int(site.wall.at_s)
    rolling_s = 7200 if window is Window.ROLLING else 0
    site.budgets.put(Budget(ACME, 1000, window, rolling_s))
    site.spend(8, now)
    # It jumps past a month's end, and comes back.
    for wall_s in (now, now + 40 * DAY_S, now - 40 * DAY_S, now):
        site.wall.at_s = wall_s
        lent = site.lend("a", need=300, at_s=now)
        assert (lent.granted, lent.left, lent.unmet) == (200, 200, True)
        assert lent.period.start_s <= now < lent.period.end_s
    [balance] = site.budgets.balances()
    assert (balance.spent_nanousd, balance.outstanding_nanousd) == (800, 200)


def test_a_rolling_window_forgets_by_the_hour(site: Site) -> None:
    site.budgets.put(Budget(ACME, 1000, Window.ROLLING, 7200))
    site.spend(10)
    now = int(site.wall.at_s)
    assert site.lend("a", need=100).granted == 0
    assert site.lend("a", need=100, at_s=now + 3600).granted == 0
    assert site.lend("a", need=100, at_s=now + 3 * 3600).granted >= 100
    assert site.lend("a", need=100).granted == 0, "the clock of who asks went back"


def test_a_past_period_is_settled_and_forgotten_with_the_next(
    site: Site, database: Database
) -> None:
    budget = Budget(ACME, 1000, Window.DAY)
    site.budgets.put(budget)
    now = int(site.wall.at_s)
    today = period_of(budget, now)
    first = site.lend("a", need=100)
    site.lend("a", start_s=today.start_s, granted=first.granted, released=first.granted)
    site.lend("a", need=100, at_s=now + DAY_S)
    with database.transaction() as connection:
        [start_s] = connection.execute(text("SELECT start_s FROM budget_grant")).scalars()
    assert start_s == today.end_s


def test_what_is_held_of_a_budget_that_is_gone_is_forgotten_when_it_comes_back(
    site: Site, database: Database
) -> None:
    site.budgets.put(Budget(ACME, 1000, Window.NONE))
    first = site.lend("a", need=100)
    site.budgets.remove(ACME)
    assert site.budgets.holders() == {"a"}
    told = Account(ACME, 0, first.granted, first.granted)
    assert site.budgets.lend("a", [told], site.epoch, 2) == ([], {})
    with database.transaction() as connection:
        rows = connection.execute(text("SELECT COUNT(*) FROM budget_grant")).scalar_one()
    assert rows == 0


def test_a_lost_routers_money_comes_back_when_it_is_forgotten(site: Site) -> None:
    site.budgets.put(Budget(ACME, 1000, Window.NONE))
    site.lend("a", need=1000)
    assert site.budgets.holders() == {"a"}
    assert site.lend("b", need=10).unmet
    site.budgets.forget("a", site.epoch)
    assert site.budgets.holders() == set()
    assert not site.lend("b", need=10).unmet


def test_who_holds_what_lacks_is_named(site: Site) -> None:
    site.budgets.put(Budget(ACME, 100, Window.NONE))
    site.lend("a", need=90)
    account = Account(ACME, 0, 0, 0, 50)
    assert site.budgets.lend("b", [account], site.epoch, 2)[1] == {ACME: {"a"}}


def test_spending_is_rebuilt_and_checked_like_the_rollups(site: Site, database: Database) -> None:
    site.spend(5)
    assert verify(database).differences == 0
    with database.transaction() as connection:
        connection.execute(text("UPDATE spending SET amount_nanousd = amount_nanousd + 1"))
        connection.execute(text("DELETE FROM spending WHERE scope = 'key'"))
    lines = verify(database).lines
    assert any("tenant 'acme'" in line and "501 nano-dollars, not 500" in line for line in lines)
    assert any(line.startswith("spending key") and "missing" in line for line in lines)
    site.ledger.rebuild()
    assert verify(database).differences == 0


def test_a_control_takes_over_routers_and_knows_of_those_just_lost(site: Site) -> None:
    site.grants.add("a", site.epoch)
    site.grants.add("b", site.epoch)
    site.grants.add("c", site.epoch)
    site.grants.remove("c", site.epoch, lost=False)
    assert not site.grants.begin().gone_lately
    site.epoch += 1
    site.grants.remove("b", site.epoch, lost=True)
    taken = site.grants.begin()
    assert taken.alive_lately
    assert taken.epoch == site.epoch + 1
    assert (taken.routers, taken.gone_lately) == (("a",), True)
    site.wall.at_s += 61
    later = site.grants.begin()
    assert (later.gone_lately, later.alive_lately) == (False, False)
    site.wall.at_s += 50
    assert site.grants.is_latest(later.epoch)
    site.wall.at_s += 50
    assert site.grants.begin().alive_lately, "it said so meanwhile"


def test_a_rotated_key_keeps_its_budget_and_what_is_spent_of_it(
    site: Site, database: Database
) -> None:
    keys = KeyStore(database, site.wall)
    _, first = keys.create(KeyWish("laptop"))
    of_first = BudgetKey(BudgetScope.KEY, first.key_id)
    site.budgets.put(Budget(of_first, 1000, Window.NONE))
    ids = [first.key_id]
    for _ in range(2):
        rotated = keys.rotate(ids[-1], 3600)
        assert rotated is not None
        ids.append(rotated[1].key_id)
        assert rotated[1].budget_id == first.key_id
    for number, key in enumerate(ids):
        site.ledger.commit([record(charge(number, key=key, price_version=1))])
    (balance,) = site.budgets.balances()
    assert (balance.budget.key, balance.spent_nanousd) == (of_first, 300)
    account = Account(of_first, start_s=0, granted=0, released=0, need=2000)
    ((line,), _) = site.budgets.lend("r1", [account], site.epoch, 1)
    assert line.granted == 700
    kept = {each.key_id: each.account for each in keys.list()}
    assert kept == {ids[0]: None, ids[1]: ids[0], ids[2]: ids[0]}
    # Any of its keys names it.
    of_last = BudgetKey(BudgetScope.KEY, ids[-1])
    assert site.budgets.add(of_last, 50) == Budget(of_first, 1050, Window.NONE)
    site.budgets.put(Budget(of_last, 400, Window.NONE))
    assert [each.key for each in site.budgets.every()] == [of_first]
    assert site.budgets.remove(of_last)
    assert site.budgets.every() == []
    assert verify(database).lines == []


@pytest.mark.parametrize("kind", ["sqlite"])
def test_what_a_key_spent_is_read_by_the_primary_key(database: Database) -> None:
    asked: list[tuple[str, Any]] = []

    def note(_c: Any, _r: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    with database.transaction() as connection:
        event.listen(connection, "before_cursor_execute", note)
        assert spent(connection, BudgetKey(BudgetScope.KEY, "k1"), Period(0, 10**10)) == 0
        plans = [
            str(row)
            for statement, parameters in list(asked)
            for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
        ]
    of_keys, of_sums = plans
    assert "api_key_by_account (account=?)" in of_keys
    assert "(scope=? AND id=? AND hour>? AND hour<?)" in of_sums


def test_a_key_that_took_nobodys_place_spends_of_no_other(site: Site, database: Database) -> None:
    keys = KeyStore(database, site.wall)
    (_, one), (_, other) = keys.create(KeyWish("a")), keys.create(KeyWish("b"))
    site.budgets.put(Budget(BudgetKey(BudgetScope.KEY, one.key_id), 1000, Window.NONE))
    site.ledger.commit([record(charge(1, key=other.key_id, price_version=1))])
    assert [each.spent_nanousd for each in site.budgets.balances()] == [0]
