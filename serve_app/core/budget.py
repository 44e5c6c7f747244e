"""Budgets in whole nano-dollars: who may spend how much in which time, and never more.

Control keeps, per budget and period, what the ledger says was spent and what each router
was granted and has not released; the three together never exceed the budget. Both numbers
of a router only grow, so messages may be lost, doubled or late. A router spends what it
was granted (``core/purses.py``), and releases what a request cost only when the ledger has
it, so that at no moment a nano-dollar is counted nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def period_of(budget: Budget, wall_s: int, begun_s: int = 0) -> Period:
    """Return the period to spend in: that of ``wall_s``, or the one begun if that is later.

    So a clock that goes back across a window's edge begins nothing a second time.
    """
    at_s = max(wall_s, begun_s)
    if budget.window is Window.DAY:
        start_s = day_start_s(at_s)
        return Period(start_s, start_s + DAY_S)
    if budget.window is Window.WEEK:
        start_s = week_start_s(at_s)
        return Period(start_s, start_s + WEEK_S)
    if budget.window is Window.MONTH:
        return Period(month_start_s(at_s), next_month_start_s(at_s))
    return FOREVER


def counted(budget: Budget, period: Period, wall_s: int) -> Period:
    """Return the whole hours whose spending counts: for a rolling window those it touches."""
    if budget.window is not Window.ROLLING:
        return period
    return Period((wall_s - budget.rolling_s) // HOUR_S * HOUR_S, period.end_s)


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

    It knows of ``granted``, has let go of ``released``, and lacks ``need`` more.
    """

    key: BudgetKey
    start_s: int
    granted: int
    released: int
    need: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """Control's side: ``granted`` in all. ``left`` is the budget less what was spent.

    ``unmet`` says that the need was not met, and ``pending`` that others are being asked.
    """

    key: BudgetKey
    period: Period
    granted: int
    left: int
    unmet: bool = False
    pending: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """What a router was granted of a budget's period and has let go of, in all."""

    granted: int = 0
    released: int = 0

    @property
    def outstanding(self) -> int:
        """What it may still spend, or has spent without the ledger knowing."""
        return self.granted - self.released


def lend(
    budget: Budget,
    account: Account,
    *,
    router: str,
    period: Period,
    spent: int,
    grants: Mapping[str, Grant],
    routers: int,
) -> tuple[Grant, Line]:
    """Return a router's grant after it has told its account, and the line to answer with.

    ``spent`` is what the ledger has for ``period`` and ``grants`` what routers have of it,
    all as they are now; the new grant must be kept before the line is given out.
    """
    own = grants.get(router, Grant())
    known = 0
    if account.start_s == period.start_s:
        # A router may know of more than is kept only if the database went back in time.
        known = account.granted
        own = Grant(max(own.granted, known), max(own.released, account.released))
    left = budget.amount_nanousd - spent
    others = sum(each.outstanding for name, each in grants.items() if name != router)
    need = account.need - (own.granted - known)
    given = allot(left - others - own.outstanding, need, routers) if need > 0 else 0
    own = Grant(own.granted + given, own.released)
    return own, Line(budget.key, period, own.granted, left, unmet=given < need)
