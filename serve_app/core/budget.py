"""Budgets in whole nano-dollars: who may spend how much in which time, and never more.

Control keeps, per budget and period, what the ledger says was spent and what each router
was granted and has not released; the three together never exceed the budget. Both numbers
of a router only grow, so messages may be lost, doubled or late. A router spends what it
was granted (``core/purses.py``), and releases what a request cost only when the ledger has
it, so that at no moment a nano-dollar is counted nowhere.

Which period pays follows from when a request came, and from nothing else: the ledger books it
in the hour that its id tells, and the money reserved for it is that of the same hour. Nobody's
clock is asked again, so one that is wrong, or is set, moves no money to another window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from serve_app.core.calendar import (
    DAY_S,
    HOUR_S,
    WEEK_S,
    day_start_s,
    month_start_s,
    next_month_start_s,
    week_start_s,
)


class BudgetScope(StrEnum):
    """Whose money it is. A user's id is ``tenant/user``."""

    KEY = "key"
    USER = "user"
    TENANT = "tenant"
    TAG = "tag"


class Window(StrEnum):
    """When a budget begins anew; ``none`` never does: prepaid credits, which only decrease."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    ROLLING = "rolling"
    NONE = "none"


class BudgetKey(NamedTuple):
    """Names a budget."""

    scope: BudgetScope
    id: str


def scopes_of(*, tenant: str, user: str, key: str, tag: str) -> list[BudgetKey]:
    """Return whose money a request with these dimensions is; empty ones are nobody's.

    Users and tags are a tenant's own: nobody spends another's budget by naming its tag.
    """
    named = (
        (BudgetScope.KEY, key),
        (BudgetScope.USER, f"{tenant}/{user}" if user else ""),
        (BudgetScope.TENANT, tenant),
        (BudgetScope.TAG, f"{tenant}/{tag}" if tag else ""),
    )
    return [BudgetKey(scope, name) for scope, name in named if name]


@dataclass(frozen=True, slots=True)
class Budget:
    """An amount for a window. ``rolling_s`` is a rolling window's length, whole hours.

    ``alert_ratios`` of it spent are reported. One that is not ``hard`` is only watched.
    """

    key: BudgetKey
    amount_nanousd: int
    window: Window
    rolling_s: int = 0
    alert_ratios: tuple[float, ...] = ()
    hard: bool = True

    def __post_init__(self) -> None:
        assert self.amount_nanousd >= 0
        assert (self.window is Window.ROLLING) == (self.rolling_s > 0)
        assert self.rolling_s % HOUR_S == 0


@dataclass(frozen=True, slots=True)
class BudgetList:
    """Which budgets routers have to reserve of: the hard ones."""

    version: int = -1
    keys: frozenset[BudgetKey] = frozenset()


class Period(NamedTuple):
    """From ``start_s`` on and before ``end_s``, wall seconds."""

    start_s: int
    end_s: int


@dataclass(frozen=True, slots=True)
class Balance:
    """How a budget stands: spent in its present period, and granted but not yet spent."""

    budget: Budget
    period: Period
    spent_nanousd: int
    outstanding_nanousd: int


FOREVER = Period(0, 1 << 62)


def period_of(budget: Budget, at_s: int) -> Period:
    """Return the period that pays for a request that came at ``at_s``, wall seconds.

    A rolling window's begins with that hour and does not end: money that was lent when the
    hours before it were counted pays for later requests, and for no earlier one.
    """
    if budget.window is Window.DAY:
        start_s = day_start_s(at_s)
        return Period(start_s, start_s + DAY_S)
    if budget.window is Window.WEEK:
        start_s = week_start_s(at_s)
        return Period(start_s, start_s + WEEK_S)
    if budget.window is Window.MONTH:
        return Period(month_start_s(at_s), next_month_start_s(at_s))
    if budget.window is Window.ROLLING:
        return Period(at_s // HOUR_S * HOUR_S, FOREVER.end_s)
    return FOREVER


def counted(budget: Budget, period: Period) -> Period:
    """Return the hours whose spending counts in a period: of a rolling window those before too."""
    if budget.window is not Window.ROLLING:
        return period
    return Period(period.start_s - budget.rolling_s, period.end_s)


def shares(budget: Budget, period: Period, start_s: int) -> bool:
    """Whether money lent for the period that began at ``start_s`` may be spent in this one.

    That of an earlier one may if the window was changed since; that of the one just before it
    is its own.
    """
    if budget.window in (Window.ROLLING, Window.NONE):
        return True
    return start_s < period.end_s and start_s != period_of(budget, period.start_s - 1).start_s


def allot(available: int, need: int, routers: int) -> int:
    """Return what to grant of what is available: the need, and a part of what else there is.

    The nearer the end, the smaller the part; so little lies unused with others.
    """
    if available <= need:
        return max(0, available)
    return need + (available - need) // (4 * max(1, routers))


def crossed(budget: Budget, before_nanousd: int, after_nanousd: int) -> list[float]:
    """Return the alert thresholds that spending has passed, lowest first."""
    return [
        ratio
        for ratio in sorted(budget.alert_ratios)
        if before_nanousd < ratio * budget.amount_nanousd <= after_nanousd
    ]


@dataclass(frozen=True, slots=True)
class Account:
    """A router's side of one budget's period: all that it ever got and let go of.

    It knows of ``granted``, has let go of ``released``, and lacks ``need`` more for requests
    that came at ``at_s``, which may be of another period than the account.
    """

    key: BudgetKey
    start_s: int
    granted: int
    released: int
    need: int = 0
    at_s: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """Control's side: ``granted`` and ``released`` in all. ``left`` is what is not spent.

    ``needed`` says that it answers a need, ``unmet`` that this was not met, and ``pending`` that
    others are being asked.
    """

    key: BudgetKey
    period: Period
    granted: int
    left: int
    unmet: bool = False
    pending: bool = False
    released: int = 0
    needed: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """What a router was granted of a budget's period and has let go of, in all."""

    granted: int = 0
    released: int = 0

    @property
    def outstanding(self) -> int:
        """What it may still spend, or has spent without the ledger knowing."""
        return self.granted - self.released


class Lent(NamedTuple):
    """Names a grant: to which router, and when the period that it is of begins."""

    router: str
    start_s: int


def answer(
    budget: Budget,
    account: Account,
    *,
    router: str,
    grants: Mapping[Lent, Grant],
    spent: Callable[[Period], int],
    routers: int,
) -> tuple[dict[Lent, Grant], list[Line]]:
    """Return the grants that change by what a router tells, and the lines to answer it with.

    ``grants`` are all of the budget, and ``spent`` what the ledger has of some hours, as they are
    now; what changed must be kept before a line is given out.
    """
    changed: dict[Lent, Grant] = {}
    lines: list[Line] = []
    told = Lent(router, account.start_s)
    period = period_of(budget, account.at_s if account.need else account.start_s)
    settles_only = not account.need and period.start_s != account.start_s
    if period.start_s != account.start_s and told in grants:
        own = grants[told]
        changed[told] = Grant(own.granted, max(own.released, account.released))
    if not settles_only:
        mine = Lent(router, period.start_s)
        others = [
            each.outstanding
            for name, each in {**grants, **changed}.items()
            if name != mine and shares(budget, period, name.start_s)
        ]
        left = budget.amount_nanousd - spent(counted(budget, period))
        changed[mine], line = _lend(
            account, period, left, grants.get(mine, Grant()), others=sum(others), routers=routers
        )
        lines.append(line)
    for name, each in grants.items():
        # Of a grant that never arrived a router knows nothing: it lets go of it when told.
        if name.router == router and each.outstanding and name not in changed:
            lines.append(_reminder(budget, name.start_s, each, spent))
    return changed, lines


def _lend(
    account: Account, period: Period, left: int, own: Grant, *, others: int, routers: int
) -> tuple[Grant, Line]:
    """Return a router's grant of a period after it has told its account, and its line.

    ``others`` is all else that is outstanding and may be spent in that period.
    """
    known = 0
    if account.start_s == period.start_s:
        # A router may know of more than is kept only if the database went back in time.
        known = account.granted
        own = Grant(max(own.granted, known), max(own.released, account.released))
    # A router that closed its account of the period has let go of all that it knew.
    need = account.need - (own.granted - max(known, own.released))
    given = allot(left - others - own.outstanding, need, routers) if need > 0 else 0
    own = Grant(own.granted + given, own.released)
    needed, unmet = account.need > 0, given < need
    return own, Line(
        account.key, period, own.granted, left, unmet, released=own.released, needed=needed
    )


def _reminder(budget: Budget, start_s: int, own: Grant, spent: Callable[[Period], int]) -> Line:
    period = period_of(budget, start_s)
    left = budget.amount_nanousd - spent(counted(budget, period))
    period = Period(start_s, max(period.end_s, start_s + HOUR_S))
    return Line(budget.key, period, own.granted, left, released=own.released)
