"""Budgets: never more than granted, nearly all of it usable, whatever is lost on the way."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

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
    Line,
    Window,
    allot,
    counted,
    crossed,
    lend,
    period_of,
)
from serve_app.core.purses import LINGER_S, Lacking, Overdrawn, Purses, Reserved
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
    spent: dict[tuple[BudgetKey, int], int] = field(default_factory=dict)
    grants: dict[tuple[BudgetKey, int], dict[str, Grant]] = field(default_factory=dict)
    begun_s: dict[BudgetKey, int] = field(default_factory=dict)

    def lend(self, router: str, accounts: list[Account], now: int = 0) -> list[Line]:
        lines = []
        for account in accounts:
            of = self.budgets[account.key]
            period = period_of(of, now, self.begun_s.get(of.key, 0))
            self.begun_s[of.key] = period.start_s
            if account.start_s != period.start_s and not account.need:
                rows = self.grants.setdefault((of.key, account.start_s), {})
                own = rows.get(router, Grant())
                rows[router] = Grant(own.granted, max(own.released, account.released))
                continue
            rows = self.grants.setdefault((of.key, period.start_s), {})
            spent = self.spent.get((of.key, period.start_s), 0)
            rows[router], line = lend(
                of,
                account,
                router=router,
                period=period,
                spent=spent,
                grants=rows,
                routers=self.routers,
            )
            lines.append(line)
        return lines

    def pay(self, key: BudgetKey, start_s: int, cost: int) -> None:
        self.spent[key, start_s] = self.spent.get((key, start_s), 0) + cost

    def committed(self, key: BudgetKey, start_s: int = 0) -> int:
        rows = self.grants.get((key, start_s), {})
        return self.spent.get((key, start_s), 0) + sum(each.outstanding for each in rows.values())


def reserve(
    purses: Purses, name: str, amount: int, *keys: BudgetKey, least: int | None = None, at: int = 0
) -> Reserved | Lacking | Overdrawn:
    least = amount if least is None else least
    return purses.reserve(
        RequestId(name), keys or (TENANT,), amount, least=least, wall_s=at, now_s=0.0
    )


def extend(
    purses: Purses, name: str, more: int, *, least: int | None = None
) -> Reserved | Lacking | Overdrawn | None:
    return purses.extend(RequestId(name), more, least=more if least is None else least, now_s=0.0)


def fetch(purses: Purses, bank: Bank, lacking: object, now: int = 0, router: str = "r") -> None:
    assert isinstance(lacking, Lacking)
    accounts = purses.accounts(lacking.needs)
    purses.accept(accounts, bank.lend(router, accounts, now), 0.0)


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


def test_a_clock_that_goes_back_over_an_edge_begins_nothing_twice() -> None:
    monthly = budget(1, Window.MONTH)
    march = period_of(monthly, wall_s(2027, 3, 1))
    assert period_of(monthly, wall_s(2027, 2, 28), begun_s=march.start_s) == march


def test_a_rolling_window_counts_every_hour_it_touches() -> None:
    rolling = budget(1, Window.ROLLING)
    now = wall_s(2027, 3, 2, 10, 30)
    assert period_of(rolling, now) == FOREVER
    assert counted(rolling, FOREVER, now).start_s == wall_s(2027, 3, 1, 10)
    assert counted(budget(1), FOREVER, now) == FOREVER


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
    purses.acknowledge(RequestId("a"))
    purses.accept([], [Line(TENANT, FOREVER, 100, left=10, unmet=True)], 0.0)
    assert reserve(purses, "b", 500, least=20) == Overdrawn(TENANT, exhausted=True)


def test_a_grant_that_got_lost_is_told_again_and_not_given_again() -> None:
    bank = Bank({TENANT: budget(1000)})
    account = Account(TENANT, 0, 0, 0, need=100)
    [first] = bank.lend("r", [account])
    assert bank.lend("r", [account]) == [first]
    [more] = bank.lend("r", [replace(account, need=first.granted + 50)])
    assert first.granted + 50 <= more.granted < 2 * first.granted


def test_what_a_request_cost_is_released_when_the_ledger_has_it_and_once() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60))
    reserve(purses, "a", 60)
    purses.settle(RequestId("a"), 25)
    purses.settle(RequestId("a"), 60)
    assert purses.account(TENANT).released == 0
    for _ in range(2):
        purses.acknowledge(RequestId("a"))
        assert purses.account(TENANT).released == 25


def test_an_acknowledgement_that_comes_before_the_end_counts() -> None:
    bank, purses = Bank({TENANT: budget(100)}), Purses()
    fetch(purses, bank, reserve(purses, "a", 60))
    reserve(purses, "a", 60)
    purses.acknowledge(RequestId("a"))
    assert purses.account(TENANT).released == 0
    purses.settle(RequestId("a"), 25)
    assert purses.account(TENANT).released == 25


def test_a_cost_that_may_grow_keeps_its_reservation_for_a_while() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 100))
    reserve(purses, "a", 100)
    purses.settle(RequestId("a"), 10, final=False, now_s=5.0)
    purses.expire(5.0 + LINGER_S - 0.1, 0)
    assert isinstance(reserve(purses, "b", 80), Lacking)
    purses.expire(5.0 + LINGER_S, 0)
    fetch(purses, bank, reserve(purses, "b", 80))
    assert reserve(purses, "b", 80) == Reserved(80)
    purses.acknowledge(RequestId("a"))
    assert purses.account(TENANT).released == 90 + 10


def test_what_an_engine_billed_of_a_cut_off_request_is_not_spent_again() -> None:
    bank, purses = Bank({TENANT: budget(100)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 100))
    reserve(purses, "a", 100)
    purses.settle(RequestId("a"), 10, final=False, now_s=0.0)
    bank.pay(TENANT, 0, 10)
    purses.acknowledge(RequestId("a"))
    bank.pay(TENANT, 0, 40)  # what the engine had generated beyond what was delivered
    purses.expire(LINGER_S, 0)
    fetch(purses, bank, reserve(purses, "b", 60, least=1))
    assert reserve(purses, "b", 60, least=1) == Reserved(50)
    assert bank.committed(TENANT) == 100


@pytest.mark.parametrize("after", [Window.WEEK, Window.MONTH, Window.NONE])
def test_a_window_that_is_made_longer_is_followed_at_once(after: Window) -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=now), now=now)
    assert reserve(purses, "a", 60, at=now) == Reserved(60)
    bank.budgets[TENANT] = budget(1000, after)
    fetch(purses, bank, reserve(purses, "b", 500, at=now), now=now)
    assert reserve(purses, "b", 500, at=now) == Reserved(500)
    purses.settle(RequestId("a"), 60)
    purses.expire(0.0, now)
    purses.acknowledge(RequestId("a"))
    accounts = purses.accounts()
    purses.accept(accounts, bank.lend("r", accounts, now), 0.0)
    assert bank.committed(TENANT, wall_s(2027, 3, 18)) == 0


def test_a_late_word_of_the_window_before_brings_nothing_back() -> None:
    now = wall_s(2027, 3, 18, 12)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 40, at=now), now=now)
    late = purses.accounts([(TENANT, 100)])
    lines = bank.lend("r", late, now)
    bank.budgets[TENANT] = budget(70, Window.NONE)
    for _ in range(2):
        fetch(purses, bank, Lacking(((TENANT, 70),)), now=now)
    purses.accept(late, lines, 0.0)
    assert isinstance(reserve(purses, "a", 71, at=now), Lacking)
    assert reserve(purses, "a", 70, at=now) == Reserved(70)


def test_a_control_whose_clock_is_behind_at_an_edge_gives_no_money_twice() -> None:
    first, second = wall_s(2027, 3, 1, 23), wall_s(2027, 3, 2)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=first), now=first)
    assert reserve(purses, "a", 60, at=first) == Reserved(60)
    fetch(purses, bank, reserve(purses, "b", 30, at=second), now=first)
    purses.expire(0.0, second)
    accounts = purses.accounts()
    purses.accept(accounts, bank.lend("r", accounts, second), 0.0)
    assert bank.committed(TENANT, wall_s(2027, 3, 1)) == 60


def test_a_window_made_longer_in_its_first_part_gives_no_money_twice() -> None:
    first, second = wall_s(2027, 3, 1, 12), wall_s(2027, 3, 2, 12)
    bank, purses = Bank({TENANT: budget(100, Window.DAY)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=first), now=first)
    assert reserve(purses, "a", 60, at=first) == Reserved(60)
    bank.budgets[TENANT] = budget(100, Window.MONTH)
    for _ in range(2):  # first it learns that it has something already
        fetch(purses, bank, reserve(purses, "b", 30, at=second), now=second)
    assert reserve(purses, "b", 30, at=second) == Reserved(30)
    purses.expire(0.0, second)
    assert purses._old == []
    fetch(purses, bank, reserve(purses, "c", 20, least=1, at=second), now=second)
    assert reserve(purses, "c", 20, least=1, at=second) == Reserved(10)


def test_a_tranche_is_extended_while_there_is_money() -> None:
    bank, purses = Bank({TENANT: budget(100)}), Purses()
    fetch(purses, bank, reserve(purses, "a", 100, least=100))
    assert reserve(purses, "a", 40) == Reserved(40)
    assert extend(purses, "a", 60) == Reserved(60)
    assert extend(purses, "a", 1) == Lacking(((TENANT, 1),))
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
    free = purses.accounts([(TENANT, 0)])
    purses.settle(RequestId("a"), 40)
    assert all(each.released <= each.granted for each in [*free, *purses.accounts()])


def test_an_answer_that_outlives_its_period_gets_no_more_of_it() -> None:
    march, april = wall_s(2027, 3, 31), wall_s(2027, 4, 1)
    bank, purses = Bank({TENANT: budget(100, Window.MONTH)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=march), now=march)
    assert reserve(purses, "a", 60, at=march) == Reserved(60)
    fetch(purses, bank, reserve(purses, "b", 10, at=april), now=april)
    purses.expire(0.0, april)
    assert extend(purses, "a", 1) == Overdrawn(TENANT, exhausted=False)


def test_a_new_period_begins_with_a_grant_of_its_own_and_the_old_one_is_closed() -> None:
    march, april = wall_s(2027, 3, 31), wall_s(2027, 4, 1)
    bank, purses = Bank({TENANT: budget(100, Window.MONTH)}, routers=1), Purses()
    fetch(purses, bank, reserve(purses, "a", 60, at=march), now=march)
    assert reserve(purses, "a", 60, at=march) == Reserved(60)
    lacking = reserve(purses, "b", 90, at=april)
    fetch(purses, bank, lacking, now=april)
    assert reserve(purses, "b", 90, at=april) == Reserved(90)
    purses.settle(RequestId("a"), 50)
    bank.pay(TENANT, wall_s(2027, 3, 1), 50)
    purses.acknowledge(RequestId("a"))
    purses.expire(0.0, april)
    accounts = purses.accounts()
    purses.accept(accounts, bank.lend("r", accounts, april), 0.0)
    assert bank.committed(TENANT, wall_s(2027, 3, 1)) == 50
    purses.expire(0.0, april)
    assert purses._old == []


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
            routers[place].acknowledge(RequestId(f"q{number}"))
        assert all(each.open_requests <= 200 for each in routers)
        del running[:20]
        assert bank.spent.get((TENANT, 0), 0) + spendable(routers) <= amount
    spent = bank.spent[TENANT, 0]
    assert refused > 0
    assert 0.99 * amount <= spent <= amount


def spendable(routers: list[Purses]) -> int:
    """Return what routers' requests have reserved, and what they could still reserve."""
    purses = [purse for each in routers for purse in each._purses.values()]
    return sum(purse.free + purse.reserved for purse in purses)


def ask(
    bank: Bank, routers: list[Purses], place: int, number: int, now_s: float
) -> Reserved | Overdrawn:
    """Reserve at a router; what it lacks comes from Control, or from the others by recall."""
    purses, name = routers[place], RequestId(f"q{number}")
    for attempt in range(3):
        answer = purses.reserve(name, [TENANT], 2000, least=2000, wall_s=0, now_s=now_s)
        if not isinstance(answer, Lacking):
            return answer
        accounts = purses.accounts(answer.needs)
        lines = bank.lend(f"r{place}", accounts)
        if lines[0].unmet and attempt == 0:
            lines = [replace(lines[0], pending=True)]
            for other, each in enumerate(routers):
                if other != place:
                    each.give_back([TENANT])
                    told = each.accounts()
                    each.accept(told, bank.lend(f"r{other}", told), now_s)
        purses.accept(accounts, lines, now_s)
    raise AssertionError("neither reserved nor refused")


class Spending(RuleBasedStateMachine):
    """Messages are lost, doubled and late; records reach the ledger whenever they do."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = 1000
        self.bank = Bank({TENANT: budget(self.amount)}, routers=3)
        self.routers = [Purses() for _ in range(3)]
        self.now_s = 0.0
        self.count = 0
        self.open: list[tuple[int, RequestId, int]] = []
        self.unrecorded: list[tuple[int, RequestId, int]] = []
        self.unacknowledged: list[tuple[int, RequestId]] = []
        self.late: list[tuple[int, list[Account]]] = []
        self.lines: list[tuple[int, list[Account], list[Line]]] = []
        self.cost = 0
        self.billed_later: list[tuple[float, int]] = []  # by the engine, of what is reserved

    @rule(place=st.integers(0, 2), amount=st.integers(1, 300), fate=st.integers(0, 5))
    def ask(self, place: int, amount: int, fate: int) -> None:
        self.count += 1
        name = RequestId(f"q{self.count}")
        for _ in range(2):
            answer = self.routers[place].reserve(
                name, [TENANT], amount, least=amount, wall_s=0, now_s=self.now_s
            )
            if isinstance(answer, Reserved):
                self.open.append((place, name, answer.amount))
            if not isinstance(answer, Lacking):
                return
            self.exchange(place, self.routers[place].accounts(answer.needs), fate)

    def exchange(self, place: int, accounts: list[Account], fate: int) -> None:
        if fate == 0:
            self.late.append((place, accounts))
            return
        lines = self.bank.lend(f"r{place}", accounts)
        if fate == 1:
            return
        if fate == 2:
            self.lines.append((place, accounts, lines))
            return
        self.routers[place].accept(accounts, lines, self.now_s)

    @rule(place=st.integers(0, 2), fate=st.integers(0, 5), recall=st.booleans())
    def tell(self, place: int, fate: int, recall: bool) -> None:
        if recall:
            self.routers[place].give_back([TENANT])
        self.exchange(place, self.routers[place].accounts(), fate)

    @precondition(lambda self: self.late)
    @rule(keep=st.booleans())
    def deliver_late(self, keep: bool) -> None:
        place, accounts = self.late[0] if keep else self.late.pop(0)
        lines = self.bank.lend(f"r{place}", accounts)
        self.routers[place].accept(accounts, lines, self.now_s)

    @precondition(lambda self: self.lines)
    @rule(keep=st.booleans())
    def answer_late(self, keep: bool) -> None:
        place, accounts, lines = self.lines[0] if keep else self.lines.pop(0)
        self.routers[place].accept(accounts, lines, self.now_s)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), final=st.booleans())
    def finish(self, data: st.DataObject, final: bool) -> None:
        place, name, amount = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        cost = data.draw(st.integers(0, amount))
        self.routers[place].settle(name, cost, final=final, now_s=self.now_s)
        self.cost += cost
        self.unrecorded.append((place, name, cost))
        if not final:
            more = data.draw(st.integers(0, amount - cost))
            self.bank.pay(TENANT, 0, more)
            self.billed_later.append((self.now_s + LINGER_S, more))

    @precondition(lambda self: self.unrecorded)
    @rule()
    def record(self) -> None:
        place, name, cost = self.unrecorded.pop(0)
        self.bank.pay(TENANT, 0, cost)
        self.unacknowledged.append((place, name))

    @precondition(lambda self: self.unacknowledged)
    @rule(twice=st.booleans())
    def acknowledge(self, twice: bool) -> None:
        place, name = self.unacknowledged[0] if twice else self.unacknowledged.pop(0)
        self.routers[place].acknowledge(name)

    @rule(wait_s=st.sampled_from([0.5, 2.0, 31.0]))
    def wait(self, wait_s: float) -> None:
        self.now_s += wait_s
        for purses in self.routers:
            purses.expire(self.now_s, 0)
        self.cost += sum(more for at_s, more in self.billed_later if at_s <= self.now_s)
        self.billed_later = [each for each in self.billed_later if each[0] > self.now_s]

    @invariant()
    def never_more_than_the_budget(self) -> None:
        assert self.cost + spendable(self.routers) <= self.amount

    def teardown(self) -> None:
        """When all is said and done, everything that was not spent can be granted again."""
        for place, name, _ in self.open:
            self.routers[place].void(name)
        while self.unrecorded:
            self.record()
        for place, name in self.unacknowledged:
            self.routers[place].acknowledge(name)
        self.wait(100.0)
        for place, purses in enumerate(self.routers):
            for _ in range(2):
                # A lost grant comes to light with the next answer.
                accounts = [purses.account(TENANT)]
                purses.accept(accounts, self.bank.lend(f"r{place}", accounts), self.now_s)
                purses.give_back([TENANT])
            accounts = [purses.account(TENANT)]
            self.bank.lend(f"r{place}", accounts)
            assert purses.open_requests == 0
            assert not purses._holds
        assert self.bank.committed(TENANT) == self.cost


TestSpending = Spending.TestCase
TestSpending.settings = examples(
    150,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
