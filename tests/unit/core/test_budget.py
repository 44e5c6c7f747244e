"""Budgets: never more than granted, nearly all of it usable, whatever is lost on the way."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import ClassVar

import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serve_app.core.budget import (
    FOREVER,
    Account,
    Budget,
    BudgetKey,
    BudgetScope,
    Grant,
    Lent,
    Line,
    Period,
    Window,
    allot,
    answer,
    counted,
    crossed,
    period_of,
)
from serve_app.core.calendar import DAY_S, HOUR_S
from serve_app.core.purses import LINGER_S, Lacking, Need, Overdrawn, Purses, Reserved, Statement
from serve_app.core.types import RequestId
from tests.properties import examples

TENANT = BudgetKey(BudgetScope.TENANT, "acme")
KEY = BudgetKey(BudgetScope.KEY, "k1")


def budget(amount: int, window: Window = Window.NONE, key: BudgetKey = TENANT) -> Budget:
    return Budget(key, amount, window, rolling_s=86_400 if window is Window.ROLLING else 0)


def wall_s(*date: int) -> int:
    return int(datetime(*date, tzinfo=UTC).timestamp())  # type: ignore[arg-type, misc]


@dataclass
class Bank:
    """Control and its database, in memory."""

    budgets: dict[BudgetKey, Budget]
    routers: int = 4
    booked: dict[tuple[BudgetKey, int], int] = field(default_factory=dict)
    grants: dict[BudgetKey, dict[Lent, Grant]] = field(default_factory=dict)

    def lend(self, router: str, accounts: Iterable[Account]) -> list[Line]:
        lines = []
        for account in accounts:
            grants = self.grants.setdefault(account.key, {})
            changed, answered = answer(
                self.budgets[account.key],
                account,
                router=router,
                grants=grants,
                spent=partial(self.spent, account.key),
                routers=self.routers,
            )
            grants.update(changed)
            lines += answered
        return lines

    def pay(self, key: BudgetKey, at_s: int, cost: int) -> None:
        self.booked[key, at_s] = self.booked.get((key, at_s), 0) + cost

    def spent(self, key: BudgetKey, hours: Period = FOREVER) -> int:
        return sum(
            cost
            for (of, at_s), cost in self.booked.items()
            if of == key and hours.start_s <= at_s < hours.end_s
        )

    def outstanding(self, key: BudgetKey) -> dict[int, int]:
        """Return what is outstanding, by the start of the period that it is of."""
        found: dict[int, int] = {}
        for lent, grant in self.grants.get(key, {}).items():
            if grant.outstanding:
                found[lent.start_s] = found.get(lent.start_s, 0) + grant.outstanding
        return found

    def committed(self, key: BudgetKey) -> int:
        return self.spent(key) + sum(self.outstanding(key).values())


def reserve(
    purses: Purses, name: str, amount: int, *keys: BudgetKey, least: int | None = None, at: int = 0
) -> Reserved | Lacking | Overdrawn:
    least = amount if least is None else least
    return purses.reserve(
        RequestId(name), keys or (TENANT,), amount, least=least, at_s=at, now_s=0.0
    )


def extend(
    purses: Purses, name: str, more: int, *, least: int | None = None
) -> Reserved | Lacking | Overdrawn | None:
    return purses.extend(RequestId(name), more, least=more if least is None else least, now_s=0.0)


def fetch(purses: Purses, bank: Bank, lacking: object, router: str = "r") -> None:
    assert isinstance(lacking, Lacking)
    exchange(purses, bank, lacking.needs, router)


def exchange(purses: Purses, bank: Bank, needs: Iterable[Need] = (), router: str = "r") -> None:
    statement = purses.state(needs)
    purses.accept(statement, bank.lend(router, statement.accounts), 0.0)


def account(purses: Purses) -> Account:
    """Return how the tenant's purse stands."""
    [found] = purses.state(recalled=[TENANT]).accounts
    return found


def released(purses: Purses) -> int:
    return account(purses).released


# Windows


@pytest.mark.parametrize(
    ("window", "at", "start", "end"),
    [
        (Window.DAY, (2027, 12, 31, 23), (2027, 12, 31), (2028, 1, 1)),
        (Window.WEEK, (2028, 1, 1), (2027, 12, 27), (2028, 1, 3)),
        (Window.MONTH, (2028, 2, 29, 12), (2028, 2, 1), (2028, 3, 1)),
        (Window.MONTH, (2027, 2, 28), (2027, 2, 1), (2027, 3, 1)),
        (Window.MONTH, (2027, 12, 31), (2027, 12, 1), (2028, 1, 1)),
    ],
)
def test_windows_follow_the_calendar(
    window: Window, at: tuple[int, ...], start: tuple[int, ...], end: tuple[int, ...]
) -> None:
    assert period_of(budget(1, window), wall_s(*at)) == (wall_s(*start), wall_s(*end))


def test_a_rolling_window_counts_every_hour_it_touches() -> None:
    rolling = budget(1, Window.ROLLING)
    period = period_of(rolling, wall_s(2027, 3, 2, 10, 30))
    assert period == (wall_s(2027, 3, 2, 10), FOREVER.end_s)
    assert counted(rolling, period).start_s == wall_s(2027, 3, 1, 10)
    assert counted(budget(1), FOREVER) == FOREVER


def test_alerts_are_the_thresholds_just_passed() -> None:
    of = replace(budget(1000), alert_ratios=(0.9, 0.5, 1.0))
    assert crossed(of, 400, 950) == [0.5, 0.9]
    assert crossed(of, 950, 960) == []
    assert crossed(of, 960, 1000) == [1.0]


def test_grants_shrink_near_the_end() -> None:
    sizes = [allot(available, 10, 4) for available in (100_000, 1000, 100, 20, 10, 3, 0, -5)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-4:] == [10, 3, 0, 0]


# One router


def test_all_budgets_are_reserved_or_none() -> None:
    bank = Bank({TENANT: budget(1000), KEY: budget(50, key=KEY)})
    purses = Purses()
    fetch(purses, bank, reserve(purses, "a", 40, TENANT, KEY))
    assert reserve(purses, "a", 40, TENANT, KEY) == Reserved(40)
    fetch(purses, bank, reserve(purses, "b", 40, TENANT, KEY))
    assert reserve(purses, "b", 40, TENANT, KEY) == Overdrawn(KEY, exhausted=False)
    purses.settle(RequestId("a"), 15)
    assert reserve(purses, "b", 35, TENANT, KEY) == Reserved(35)
    purses.void(RequestId("b"))
    assert purses.open_requests == 0


def test_less_is_reserved_where_no_more_is_to_be_had_but_not_less_than_the_least() -> None:
    bank, purses = Bank({TENANT: budget(100)}), Purses()
    fetch(purses, bank, reserve(purses, "a", 500, least=20))
    assert reserve(purses, "a", 500, least=20) == Reserved(100)
    answer = reserve(purses, "b", 500, least=20)
    assert answer == Overdrawn(TENANT, exhausted=False), "it is reserved, not spent"
    purses.settle(RequestId("a"), 90)
    bank.pay(TENANT, 0, 90)
    purses.acknowledge(RequestId("a"), 0.0)
    purses.accept(purses.state(), [Line(TENANT, FOREVER, 100, left=10, unmet=True)], 0.0)
    assert reserve(purses, "b", 500, least=20) == Overdrawn(TENANT, exhausted=True)


def test_a_grant_that_got_lost_is_told_again_and_not_given_again() -> None:
    bank = Bank({TENANT: budget(1000)})
    asked = Account(TENANT, 0, 0, 0, need=100)
    [first] = bank.lend("r", [asked])
    assert bank.lend("r", [asked]) == [first]
    [more] = bank.lend("r", [replace(asked, need=first.granted + 50)])
    assert first.granted + 50 <= more.granted < 2 * first.granted


def test_what_a_request_cost_is_released_when_the_ledger_has_it_and_once() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60))
    reserve(purses, "a", 60)
    purses.settle(RequestId("a"), 25)
    purses.settle(RequestId("a"), 60)
    assert released(purses) == 0
    for _ in range(2):
        purses.acknowledge(RequestId("a"), 0.0)
        assert released(purses) == 25


def test_an_acknowledgement_that_comes_before_the_end_counts() -> None:
    bank, purses = Bank({TENANT: budget(100)}), Purses()
    fetch(purses, bank, reserve(purses, "a", 60))
    reserve(purses, "a", 60)
    purses.acknowledge(RequestId("a"), 0.0)
    assert released(purses) == 0
    purses.settle(RequestId("a"), 25)
    assert released(purses) == 25


def test_a_cost_that_may_grow_keeps_its_reservation_until_the_ledger_has_been_there() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 100))
    reserve(purses, "a", 100)
    purses.settle(RequestId("a"), 10, final=False, now_s=5.0)
    # The ledger is away, and with it what the engine says of the request.
    purses.expire(5.0 + 10 * LINGER_S, 0)
    assert isinstance(reserve(purses, "b", 80), Lacking)
    known_s = 500.0
    purses.acknowledge(RequestId("a"), known_s)
    purses.expire(known_s + LINGER_S - 0.1, 0)
    assert isinstance(reserve(purses, "b", 80), Lacking)
    purses.acknowledge(RequestId("a"), known_s + LINGER_S - 0.1)
    purses.expire(known_s + LINGER_S, 0)
    fetch(purses, bank, reserve(purses, "b", 80))
    assert reserve(purses, "b", 80) == Reserved(80)
    assert released(purses) == 90 + 10
    assert purses.open_requests == 1


def test_a_cost_whose_record_is_lost_is_kept_until_the_ledger_has_been_there() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 100))
    reserve(purses, "a", 100)
    purses.lose(RequestId("a"))
    purses.heard(1.0)
    assert list(purses._lost) == ["a"], "the request runs"
    purses.settle(RequestId("a"), 10, final=False, now_s=2.0)
    purses.expire(10 * LINGER_S, 0)
    assert released(purses) == 0
    for now_s in (400.0, 401.0):
        purses.heard(now_s)
    assert not purses.awaits_ledger
    purses.expire(400.0 + LINGER_S - 0.1, 0)
    assert released(purses) == 0
    purses.expire(400.0 + LINGER_S, 0)
    assert released(purses) == 100
    assert not purses.unreleased


def test_what_an_engine_billed_of_a_cut_off_request_is_not_spent_again() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 100))
    reserve(purses, "a", 100)
    purses.settle(RequestId("a"), 10, final=False, now_s=0.0)
    bank.pay(TENANT, 0, 10)
    purses.acknowledge(RequestId("a"), 0.0)
    bank.pay(TENANT, 0, 40)  # what the engine had generated beyond what was delivered
    purses.expire(LINGER_S, 0)
    fetch(purses, bank, reserve(purses, "b", 60, least=1))
    assert reserve(purses, "b", 60, least=1) == Reserved(50)
    assert bank.committed(TENANT) == 100


@pytest.mark.parametrize("after", [Window.WEEK, Window.MONTH, Window.NONE, Window.ROLLING])
def test_a_window_that_is_made_longer_is_followed_at_once(after: Window) -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=now))
    assert reserve(purses, "a", 60, at=now) == Reserved(60)
    bank.budgets[TENANT] = budget(1000, after)
    fetch(purses, bank, reserve(purses, "b", 500, at=now))
    assert reserve(purses, "b", 500, at=now) == Reserved(500)
    purses.settle(RequestId("a"), 60)
    purses.acknowledge(RequestId("a"), 0.0)
    purses.expire(0.0, now)
    exchange(purses, bank)
    assert wall_s(2027, 3, 18) not in bank.outstanding(TENANT)


@pytest.mark.parametrize("before", [Window.WEEK, Window.MONTH, Window.NONE, Window.ROLLING])
def test_what_runs_when_a_window_is_made_shorter_is_counted_in_the_new_one(before: Window) -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, before)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=now))
    assert reserve(purses, "a", 60, at=now) == Reserved(60)
    bank.budgets[TENANT] = budget(100, Window.DAY)
    purses.give_back([TENANT])
    fetch(purses, bank, reserve(purses, "b", 50, least=1, at=now))
    assert reserve(purses, "b", 50, least=1, at=now) == Reserved(40)
    assert sum(bank.outstanding(TENANT).values()) == 100


def test_an_answer_to_what_was_said_before_brings_nothing_back() -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 40, at=now))
    late = purses.state([Need(TENANT, now, 100)])
    lines = bank.lend("r", late.accounts)
    bank.budgets[TENANT] = budget(70, Window.NONE)
    purses.give_back([TENANT])
    exchange(purses, bank, [Need(TENANT, now, 70)])
    for _ in range(2):
        purses.expire(0.0, now)
        exchange(purses, bank)
    purses.accept(late, lines, 0.0)
    assert spendable([purses]) <= sum(bank.outstanding(TENANT).values()) <= 70


def test_a_window_made_longer_in_its_first_part_gives_no_money_twice() -> None:
    first, second = wall_s(2027, 3, 1, 12), wall_s(2027, 3, 2, 12)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=first))
    assert reserve(purses, "a", 60, at=first) == Reserved(60)
    bank.budgets[TENANT] = budget(100, Window.MONTH)
    for _ in range(2):  # first it learns that it has something already
        fetch(purses, bank, reserve(purses, "b", 30, at=second))
    assert reserve(purses, "b", 30, at=second) == Reserved(30)
    fetch(purses, bank, reserve(purses, "c", 20, least=1, at=second))
    assert reserve(purses, "c", 20, least=1, at=second) == Reserved(10)


# Clocks


def test_the_period_in_which_a_request_came_pays_for_it_whenever_it_reserves() -> None:
    march, april = wall_s(2027, 3, 31, 23), wall_s(2027, 4, 1)
    bank, purses = Bank({TENANT: budget(100, Window.MONTH)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "new", 90, at=april))
    assert reserve(purses, "new", 90, at=april) == Reserved(90)
    purses.expire(0.0, april)
    fetch(purses, bank, reserve(purses, "slow", 80, at=march))
    assert reserve(purses, "slow", 80, at=march) == Reserved(80)
    assert bank.outstanding(TENANT)[wall_s(2027, 3, 1)] >= 80


def test_a_clock_that_was_ahead_leaves_nothing_in_the_way_and_nothing_behind() -> None:
    now, ahead = wall_s(2027, 3, 18, 12), wall_s(2027, 5, 2)
    bank, purses = Bank({TENANT: budget(100, Window.MONTH)}, routers=1), Purses()
    for at in (now, ahead, now):
        fetch(purses, bank, reserve(purses, "a", 90, at=at))
        assert reserve(purses, "a", 90, at=at) == Reserved(90)
        purses.void(RequestId("a"))
        # The other period's money goes back, the purses are forgotten.
        for other in (ahead, now):
            purses.expire(0.0, other)
            exchange(purses, bank)
        purses.expire(0.0, now)
    exchange(purses, bank)
    purses.expire(0.0, wall_s(2027, 7, 1))
    exchange(purses, bank)
    purses.expire(0.0, wall_s(2027, 7, 1))
    assert purses.budgets() == []
    assert bank.outstanding(TENANT) == {}


def test_money_of_a_rolling_window_lent_ahead_of_time_pays_for_nothing_earlier() -> None:
    now, ahead = wall_s(2027, 3, 18, 12), wall_s(2027, 5, 2)
    bank, purses = Bank({TENANT: budget(100, Window.ROLLING)}, routers=1), Purses()
    bank.pay(TENANT, now, 100)
    fetch(purses, bank, reserve(purses, "a", 90, at=ahead))
    assert isinstance(reserve(purses, "b", 10, at=now), Lacking)
    fetch(purses, bank, reserve(purses, "b", 10, at=now))
    answered = reserve(purses, "b", 10, at=now)
    if isinstance(answered, Lacking):  # what it had ahead of time went back first
        fetch(purses, bank, answered)
        answered = reserve(purses, "b", 10, at=now)
    assert answered == Overdrawn(TENANT, exhausted=True)


def test_a_rolling_windows_last_money_is_whole_after_the_hour() -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, Window.ROLLING)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 90, at=now))
    assert reserve(purses, "a", 10, at=now + HOUR_S) == Reserved(10), "an hour later it still pays"
    purses.void(RequestId("a"))
    for _ in range(2):
        fetch(purses, bank, reserve(purses, "b", 100, at=now + HOUR_S))
    assert reserve(purses, "b", 100, at=now + HOUR_S) == Reserved(100)


def test_a_grant_that_got_lost_and_that_nobody_needs_comes_back() -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, Window.ROLLING)}, routers=1), Purses()
    bank.lend("r", purses.state([Need(TENANT, now, 60)]).accounts)
    for _ in range(2):
        exchange(purses, bank, [Need(TENANT, now + HOUR_S, 90)])
        purses.expire(0.0, now + HOUR_S)
    fetch(purses, bank, reserve(purses, "a", 100, at=now + HOUR_S))
    assert reserve(purses, "a", 100, at=now + HOUR_S) == Reserved(100)


def test_the_money_of_a_budget_that_is_gone_goes_back_but_for_what_runs() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 40))
    assert reserve(purses, "a", 40) == Reserved(40)
    purses.expire(0.0, 0, gone=[TENANT])
    exchange(purses, bank)
    assert bank.committed(TENANT) == 40
    purses.settle(RequestId("a"), 30)
    purses.acknowledge(RequestId("a"), 0.0)
    purses.expire(0.0, 0, gone=[TENANT])
    exchange(purses, bank)
    assert bank.committed(TENANT) == 0
    purses.expire(0.0, 0, gone=[TENANT])
    assert purses.budgets() == []


# Answers that grow


def test_a_tranche_is_extended_while_there_is_money() -> None:
    bank, purses = Bank({TENANT: budget(100)}), Purses()
    fetch(purses, bank, reserve(purses, "a", 100, least=100))
    assert reserve(purses, "a", 40) == Reserved(40)
    assert extend(purses, "a", 60) == Reserved(60)
    assert extend(purses, "a", 1) == Lacking((Need(TENANT, 0, 1),))
    fetch(purses, bank, extend(purses, "a", 1))
    assert extend(purses, "a", 1) == Overdrawn(TENANT, exhausted=False)
    purses.settle(RequestId("a"), 100)
    assert extend(purses, "a", 0) is None


def test_the_end_of_a_budget_extends_by_what_is_left_of_it() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 70))
    assert reserve(purses, "a", 70) == Reserved(70)
    fetch(purses, bank, extend(purses, "a", 60, least=10))
    assert extend(purses, "a", 60, least=10) == Reserved(30)
    assert extend(purses, "a", 60, least=10) == Overdrawn(TENANT, exhausted=False)


def test_every_budget_of_a_request_is_extended_or_none() -> None:
    other = BudgetKey(BudgetScope.KEY, "k1")
    bank = Bank({TENANT: budget(1000), other: replace(budget(50), key=other)}, routers=1)
    purses = Purses()
    fetch(purses, bank, reserve(purses, "a", 40, TENANT, other))
    assert reserve(purses, "a", 40, TENANT, other) == Reserved(40)
    fetch(purses, bank, extend(purses, "a", 20))
    assert extend(purses, "a", 20) == Overdrawn(other, exhausted=False)
    before = purses.state(recalled=[TENANT, other]).accounts
    purses.settle(RequestId("a"), 40)
    after = purses.state(recalled=[TENANT, other]).accounts
    assert all(each.released <= each.granted for each in (*before, *after))


def test_an_answer_that_outlives_its_period_goes_on_by_the_money_of_that_period() -> None:
    march, april = wall_s(2027, 3, 31), wall_s(2027, 4, 1)
    bank, purses = Bank({TENANT: budget(100, Window.MONTH)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=march))
    assert reserve(purses, "a", 60, at=march) == Reserved(60)
    fetch(purses, bank, reserve(purses, "b", 100, at=april))
    assert reserve(purses, "b", 100, at=april) == Reserved(100)
    purses.expire(0.0, april)
    exchange(purses, bank)
    fetch(purses, bank, extend(purses, "a", 50, least=1))
    assert extend(purses, "a", 50, least=1) == Reserved(40)
    assert bank.outstanding(TENANT) == {wall_s(2027, 3, 1): 100, april: 100}


def test_an_answer_whose_window_was_changed_ends_at_what_it_has() -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=now))
    assert reserve(purses, "a", 60, at=now) == Reserved(60)
    purses.give_back([TENANT])
    bank.budgets[TENANT] = budget(1000, Window.MONTH)
    fetch(purses, bank, extend(purses, "a", 50))
    assert extend(purses, "a", 50) == Overdrawn(TENANT, exhausted=False)


def test_a_new_period_begins_with_a_grant_of_its_own_and_the_old_one_is_closed() -> None:
    march, april = wall_s(2027, 3, 31), wall_s(2027, 4, 1)
    bank, purses = Bank({TENANT: budget(100, Window.MONTH)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=march))
    assert reserve(purses, "a", 60, at=march) == Reserved(60)
    fetch(purses, bank, reserve(purses, "b", 90, at=april))
    assert reserve(purses, "b", 90, at=april) == Reserved(90)
    purses.settle(RequestId("a"), 50)
    bank.pay(TENANT, march, 50)
    purses.acknowledge(RequestId("a"), 0.0)
    purses.expire(0.0, april)
    exchange(purses, bank)
    assert list(bank.outstanding(TENANT)) == [april]
    purses.expire(0.0, april)
    assert [each.start_s for each in purses.state(recalled=[TENANT]).accounts] == [april]


def test_a_budget_set_below_what_is_spent_grants_nothing() -> None:
    bank, purses = Bank({TENANT: budget(100)}), Purses()
    bank.pay(TENANT, 0, 70)
    bank.budgets[TENANT] = budget(50)
    fetch(purses, bank, reserve(purses, "a", 1))
    assert reserve(purses, "a", 1) == Overdrawn(TENANT, exhausted=True)


# Several routers


def test_four_routers_with_a_thousand_requests_spend_nearly_all_and_never_more() -> None:
    rng = random.Random(7)
    amount = 1_000_000
    bank = Bank({TENANT: budget(amount)})
    routers = [Purses() for _ in range(4)]
    waiting: deque[tuple[int, int]] = deque(
        (number, rng.choices(range(4), weights=[8, 4, 2, 1])[0]) for number in range(1000)
    )
    running: list[tuple[int, int]] = []
    refused = 0
    now_s = 0.0
    while waiting or running:
        now_s += 0.01
        while waiting and len(running) < 200:
            number, place = waiting.popleft()
            answer = ask(bank, routers, place, number, now_s)
            if isinstance(answer, Reserved):
                running.append((number, place))
            elif answer.exhausted:
                refused += 1
            else:
                # What is left is reserved by requests that run: come again.
                waiting.append((number, place))
                break
        rng.shuffle(running)
        for number, place in running[:20]:
            cost = rng.randrange(500, 1900)
            routers[place].settle(RequestId(f"q{number}"), cost)
            bank.pay(TENANT, 0, cost)
            routers[place].acknowledge(RequestId(f"q{number}"), now_s)
        assert all(each.open_requests <= 200 for each in routers)
        del running[:20]
        assert bank.spent(TENANT) + spendable(routers) <= amount
    spent = bank.spent(TENANT)
    assert refused > 0
    assert 0.99 * amount <= spent <= amount


def spendable(routers: list[Purses], within: Period = FOREVER) -> int:
    """Return what may still be spent within some hours: what is reserved, and what could be.

    What is kept because a request that has ended may still be billed is no part of it.
    """
    purses = [
        purse
        for each in routers
        for some in each._purses.values()
        for purse in some
        if purse.period.start_s < within.end_s and within.start_s < purse.period.end_s
    ]
    ended = [hold for each in routers for hold in each._holds.values() if hold.settled]
    kept = sum(hold.amount for hold in ended for purse in hold.purses if purse in purses)
    return sum(purse.free + purse.reserved for purse in purses) - kept


def ask(
    bank: Bank, routers: list[Purses], place: int, number: int, now_s: float
) -> Reserved | Overdrawn:
    """Reserve at a router; what it lacks comes from Control, or from the others by recall."""
    purses, name = routers[place], RequestId(f"q{number}")
    for attempt in range(3):
        answered = purses.reserve(name, [TENANT], 2000, least=2000, at_s=0, now_s=now_s)
        if not isinstance(answered, Lacking):
            return answered
        statement = purses.state(answered.needs)
        lines = bank.lend(f"r{place}", statement.accounts)
        if lines[0].unmet and attempt == 0:
            lines = [replace(lines[0], pending=True)]
            for other, each in enumerate(routers):
                if other != place:
                    each.give_back([TENANT])
                    exchange(each, bank, router=f"r{other}")
        purses.accept(statement, lines, now_s)
    raise AssertionError("neither reserved nor refused")


EDGE_S = wall_s(2027, 3, 1)
HOURS = tuple(EDGE_S + hour * HOUR_S for hour in (-24, -1, 0, 1))
# Right, an hour wrong, and out of all bounds.
WALLS = (*HOURS, EDGE_S - 400 * DAY_S, EDGE_S + 400 * DAY_S)


@dataclass
class Cut:
    """A request that was cut off: what an engine made beyond the router's account of it.

    It is billed within LINGER_S from when the ledger is known to have been there.
    """

    place: int
    hour_s: int
    more: int
    billed: bool = False
    there_at_s: float | None = None


class Spending(RuleBasedStateMachine):
    """Messages are lost, doubled and late; records reach the ledger whenever they do.

    Requests come in any hour, as if every clock were set again and again.
    """

    window: ClassVar[Window] = Window.NONE

    def __init__(self) -> None:
        super().__init__()
        self.amount = 400
        self.budget = budget(self.amount, self.window)
        self.bank = Bank({TENANT: self.budget}, routers=3)
        self.routers = [Purses() for _ in range(3)]
        self.now_s = 0.0
        self.count = 0
        self.open: list[tuple[int, RequestId, int, int]] = []
        self.unrecorded: list[tuple[int, RequestId, int, int]] = []
        self.unacknowledged: list[tuple[int, RequestId]] = []
        self.late: list[tuple[int, Statement]] = []
        self.lines: list[tuple[int, Statement, list[Line]]] = []
        self.cost: dict[int, int] = {}
        self.cut: dict[RequestId, Cut] = {}
        self.lost: dict[RequestId, int] = {}

    @rule(
        place=st.integers(0, 2),
        amount=st.integers(1, 300),
        fate=st.integers(0, 5),
        hour_s=st.sampled_from(HOURS),
    )
    def ask(self, place: int, amount: int, fate: int, hour_s: int) -> None:
        self.count += 1
        name = RequestId(f"q{self.count}")
        for _ in range(2):
            answered = self.routers[place].reserve(
                name, [TENANT], amount, least=amount, at_s=hour_s + 7, now_s=self.now_s
            )
            if isinstance(answered, Reserved):
                self.open.append((place, name, answered.amount, hour_s))
            if not isinstance(answered, Lacking):
                return
            self.say(place, answered.needs, fate)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), more=st.integers(1, 100), fate=st.integers(2, 5))
    def extend(self, data: st.DataObject, more: int, fate: int) -> None:
        number = data.draw(st.integers(0, len(self.open) - 1))
        place, name, amount, hour_s = self.open[number]
        for _ in range(2):
            answered = self.routers[place].extend(name, more, least=1, now_s=self.now_s)
            if isinstance(answered, Reserved):
                self.open[number] = (place, name, amount + answered.amount, hour_s)
            if not isinstance(answered, Lacking):
                return
            self.say(place, answered.needs, fate)

    def say(self, place: int, needs: Iterable[Need], fate: int) -> None:
        statement = self.routers[place].state(needs)
        if fate == 0:
            self.late.append((place, statement))
            return
        lines = self.bank.lend(f"r{place}", statement.accounts)
        if fate == 1:
            return
        if fate == 2:
            self.lines.append((place, statement, lines))
            return
        self.answer(place, statement, lines)

    def answer(self, place: int, statement: Statement, lines: list[Line]) -> None:
        self.routers[place].accept(statement, lines, self.now_s)
        self.hear(place)

    def hear(self, place: int) -> None:
        self.routers[place].heard(self.now_s)
        for name in [each for each, at in self.lost.items() if at == place]:
            del self.lost[name]
            self.there(name)

    def there(self, name: RequestId) -> None:
        """From now on the engine's account of a request that was cut off has its time to come."""
        cut = self.cut.get(name)
        if cut is not None and cut.there_at_s is None:
            cut.there_at_s = self.now_s

    @rule(place=st.integers(0, 2), fate=st.integers(0, 5), recall=st.booleans())
    def tell(self, place: int, fate: int, recall: bool) -> None:
        if recall:
            self.routers[place].give_back([TENANT])
        self.say(place, (), fate)

    @precondition(lambda self: self.late)
    @rule(keep=st.booleans())
    def deliver_late(self, keep: bool) -> None:
        place, statement = self.late[0] if keep else self.late.pop(0)
        self.answer(place, statement, self.bank.lend(f"r{place}", statement.accounts))

    @precondition(lambda self: self.lines)
    @rule(keep=st.booleans())
    def answer_late(self, keep: bool) -> None:
        self.answer(*(self.lines[0] if keep else self.lines.pop(0)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), final=st.booleans())
    def finish(self, data: st.DataObject, final: bool) -> None:
        number = data.draw(st.integers(0, len(self.open) - 1))
        place, name, amount, hour_s = self.open.pop(number)
        cost = data.draw(st.integers(0, amount))
        self.routers[place].settle(name, cost, final=final, now_s=self.now_s)
        self.cost[hour_s] = self.cost.get(hour_s, 0) + cost
        self.unrecorded.append((place, name, cost, hour_s))
        if not final:
            cut = self.cut[name] = Cut(place, hour_s, data.draw(st.integers(0, amount - cost)))
            self.cost[hour_s] += cut.more

    @precondition(lambda self: self.unrecorded)
    @rule()
    def record(self) -> None:
        place, name, cost, hour_s = self.unrecorded.pop(0)
        self.bank.pay(TENANT, hour_s, cost)
        self.unacknowledged.append((place, name))

    @precondition(lambda self: self.unrecorded)
    @rule()
    def lose(self) -> None:
        place, name, cost, hour_s = self.unrecorded.pop(0)
        self.routers[place].lose(name)
        self.lost[name] = place
        # The engine's account tells what the router's would have.
        cut = self.cut.setdefault(name, Cut(place, hour_s, 0))
        if cut.billed:
            self.bank.pay(TENANT, hour_s, cost)
        cut.more += cost

    @precondition(lambda self: self.unacknowledged)
    @rule(twice=st.booleans())
    def acknowledge(self, twice: bool) -> None:
        place, name = self.unacknowledged[0] if twice else self.unacknowledged.pop(0)
        self.routers[place].acknowledge(name, self.now_s)
        self.there(name)

    @precondition(lambda self: self.cut)
    @rule(data=st.data())
    def bill(self, data: st.DataObject) -> None:
        cut = self.cut[data.draw(st.sampled_from(sorted(self.cut)))]
        if not cut.billed:
            cut.billed = True
            self.bank.pay(TENANT, cut.hour_s, cut.more)

    @rule(wait_s=st.sampled_from([0.5, 2.0, 31.0]), walls=st.tuples(*[st.sampled_from(WALLS)] * 3))
    def wait(self, wait_s: float, walls: tuple[int, int, int]) -> None:
        self.now_s += wait_s
        over = [
            name
            for name, cut in self.cut.items()
            if cut.there_at_s is not None and cut.there_at_s + LINGER_S <= self.now_s
        ]
        for cut in [self.cut.pop(name) for name in over]:
            if not cut.billed:
                self.bank.pay(TENANT, cut.hour_s, cut.more)
        for purses, wall in zip(self.routers, walls, strict=True):
            purses.expire(self.now_s, wall)

    @invariant()
    def never_more_than_the_budget(self) -> None:
        """What requests have cost, known or not, and what others may, of each window there is."""
        for hour_s in HOURS:
            period = period_of(self.budget, hour_s)
            hours = period
            if self.window is Window.ROLLING:
                hours = Period(hour_s - self.budget.rolling_s, hour_s + HOUR_S)
            booked = sum(
                cost for at, cost in self.cost.items() if hours.start_s <= at < hours.end_s
            )
            assert booked + spendable(self.routers, hours) <= self.amount

    def teardown(self) -> None:
        """When all is said and done, everything that was not spent can be granted again."""
        for place, name, _, _ in self.open:
            self.routers[place].void(name)
        while self.unrecorded:
            self.record()
        for place, name in self.unacknowledged:
            self.routers[place].acknowledge(name, self.now_s)
            self.there(name)
        for place in range(3):
            self.hear(place)
        self.wait(100.0, (HOURS[0],) * 3)
        for place, purses in enumerate(self.routers):
            for _ in range(3):
                # A lost grant comes to light with the next answer.
                statement = purses.state(recalled=[TENANT])
                self.answer(place, statement, self.bank.lend(f"r{place}", statement.accounts))
                purses.give_back([TENANT])
            assert purses.open_requests == 0
            assert not purses._holds
            assert not purses._lingering
        assert self.bank.outstanding(TENANT) == {}
        assert self.bank.committed(TENANT) == sum(self.cost.values())


class SpendingByTheDay(Spending):
    window = Window.DAY


class SpendingOfARollingDay(Spending):
    window = Window.ROLLING


SPENDING = examples(
    150,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.filter_too_much],
)
TestSpending = Spending.TestCase
TestSpendingByTheDay = SpendingByTheDay.TestCase
TestSpendingOfARollingDay = SpendingOfARollingDay.TestCase
for _case in (TestSpending, TestSpendingByTheDay, TestSpendingOfARollingDay):
    _case.settings = SPENDING
