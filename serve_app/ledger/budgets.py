"""Budgets in the database, and what routers were granted of them.

A grant is decided and kept in one transaction that holds the epoch's row: with what the
ledger has at that moment, and by no Control but the latest. Nothing is kept in memory, so
nothing is lost with a Control; and nothing is read off a clock, so that one that is wrong
lends nothing twice.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

from sqlalchemy import Connection, Row, and_, delete, insert, select, update

from serve_app.changes import PROGRAM, Actor
from serve_app.core.budget import (
    FOREVER,
    Account,
    Balance,
    Budget,
    BudgetKey,
    BudgetScope,
    Grant,
    Lent,
    Line,
    Period,
    Window,
    answer,
    counted,
    period_of,
    shares,
)
from serve_app.core.calendar import HOUR_S
from serve_app.core.pricing import amount_in_all, dollars
from serve_app.ledger.database import Database
from serve_app.ledger.grants import fenced
from serve_app.ledger.schema import API_KEY, BUDGET, BUDGET_GRANT, BUDGET_VERSION, META
from serve_app.ledger.spending import spent
from serve_app.ledger.trail import note_change

_SETTLED: Final = BUDGET_GRANT.c.released >= BUDGET_GRANT.c.granted


class BudgetStore:
    """Synchronous: call it from a thread. Every method raises StoreUnavailable if need be."""

    def __init__(self, database: Database, wall_clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._wall_clock = wall_clock

    def version(self) -> int:
        """Return the version of the list: it grows with each change."""
        with self._database.transaction() as connection:
            query = select(META.c.value).where(META.c.name == BUDGET_VERSION)
            return int(connection.execute(query).scalar_one())

    def every(self) -> list[Budget]:
        """Return every budget."""
        with self._database.transaction() as connection:
            rows = connection.execute(select(BUDGET).order_by(BUDGET.c.scope, BUDGET.c.id))
            return [_budget(row) for row in rows]

    def put(self, budget: Budget, by: Actor = PROGRAM) -> None:
        """Set a budget, new or in place of the one with its key. What was spent stays spent.

        An API key that took another's place has that one's budget.
        """
        with self._database.change(BUDGET_VERSION) as connection:
            budget = replace(budget, key=_account(connection, budget.key))
            row = connection.execute(select(BUDGET).where(_is(budget.key))).first()
            connection.execute(delete(BUDGET).where(_is(budget.key)))
            connection.execute(insert(BUDGET).values(_row(budget)))
            before = None if row is None else _budget(row)
            self._note(connection, by, "budget.set", budget.key, before, budget)

    def add(self, key: BudgetKey, amount_nanousd: int, by: Actor = PROGRAM) -> Budget | None:
        """Add to a budget's amount, as prepaid credits are bought; None if there is none.

        Raises:
            AmountTooLarge: together they are more than a budget may be.
        """
        with self._database.change(BUDGET_VERSION) as connection:
            key = _account(connection, key)
            row = connection.execute(select(BUDGET).where(_is(key))).first()
            if row is None:
                return None
            before = _budget(row)
            total = amount_in_all(before.amount_nanousd, amount_nanousd)
            after = replace(before, amount_nanousd=total)
            connection.execute(
                update(BUDGET).where(_is(key)).values(amount_nanousd=after.amount_nanousd)
            )
            self._note(connection, by, "budget.add", key, before, after)
            return after

    def remove(self, key: BudgetKey, by: Actor = PROGRAM) -> bool:
        """Remove a budget; tell whether there was one."""
        with self._database.change(BUDGET_VERSION) as connection:
            key = _account(connection, key)
            row = connection.execute(select(BUDGET).where(_is(key))).first()
            if row is None:
                return False
            connection.execute(delete(BUDGET).where(_is(key)))
            self._note(connection, by, "budget.remove", key, _budget(row), None)
            return True

    def balances(self) -> Sequence[Balance]:
        """Return how every budget stands in the period of this clock's time."""
        now_s = int(self._wall_clock())
        found = []
        with self._database.snapshot() as connection:
            for row in connection.execute(select(BUDGET).order_by(BUDGET.c.scope, BUDGET.c.id)):
                budget = _budget(row)
                period = period_of(budget, now_s)
                outstanding = sum(
                    each.outstanding
                    for lent, each in _grants(connection, budget.key).items()
                    if shares(budget, period, lent.start_s)
                )
                used = spent(connection, budget.key, counted(budget, period))
                begins_anew = budget.window is not Window.ROLLING
                shown = period if begins_anew else FOREVER
                found.append(Balance(budget, shown, used, outstanding))
        return found

    def lend(
        self, router: str, accounts: Iterable[Account], epoch: int, routers: int
    ) -> tuple[list[Line], dict[BudgetKey, set[str]]]:
        """Take a router's accounts and grant what it needs, as far as there is.

        Beside the answer: the other routers that hold something of a budget that lacked.

        Raises:
            Superseded: another Control has begun.
        """
        lines: list[Line] = []
        holders: dict[BudgetKey, set[str]] = {}
        with fenced(self._database, epoch) as connection:
            for account in accounts:
                row = connection.execute(select(BUDGET).where(_is(account.key))).first()
                if row is None:
                    _note_released(connection, router, account)
                    continue
                budget = _budget(row)
                grants = _grants(connection, account.key)
                changed, answered = answer(
                    budget,
                    account,
                    router=router,
                    grants=grants,
                    spent=partial(spent, connection, account.key),
                    routers=routers,
                )
                for lent, grant in changed.items():
                    if grant != grants.get(lent, Grant()):
                        _keep(connection, account.key, lent, grant)
                lines += answered
                for line in answered:
                    if line.unmet:
                        holders[line.key] = _holders(budget, line.period, grants) - {router}
        return lines, holders

    def holders(self) -> set[str]:
        """Return the routers that something is outstanding with."""
        with self._database.transaction() as connection:
            open_ = BUDGET_GRANT.c.granted > BUDGET_GRANT.c.released
            return set(connection.execute(select(BUDGET_GRANT.c.router).where(open_)).scalars())

    def forget(self, router: str, epoch: int) -> None:
        """Free what is outstanding with a router that is gone, its records all committed."""
        with fenced(self._database, epoch) as connection:
            connection.execute(delete(BUDGET_GRANT).where(BUDGET_GRANT.c.router == router))

    def _note(
        self,
        connection: Connection,
        by: Actor,
        action: str,
        key: BudgetKey,
        before: Budget | None,
        after: Budget | None,
    ) -> None:
        note_change(
            connection,
            by,
            action,
            f"budget {key.scope.value} {key.id}",
            at_s=self._wall_clock(),
            before=None if before is None else _told(before),
            after=None if after is None else _told(after),
        )


def _told(budget: Budget) -> dict[str, Any]:
    """Return a budget as the audit trail tells it."""
    return {
        "amount_usd": dollars(budget.amount_nanousd),
        "window": budget.window.value,
        "rolling_hours": budget.rolling_s // HOUR_S or None,
        "alerts": list(budget.alert_ratios),
        "hard": budget.hard,
    }


def _account(connection: Connection, key: BudgetKey) -> BudgetKey:
    """Return the budget that a name means: of an API key, that of the first it replaces."""
    if key.scope is not BudgetScope.KEY:
        return key
    query = select(API_KEY.c.account).where(API_KEY.c.key_id == key.id)
    return BudgetKey(key.scope, connection.execute(query).scalar() or key.id)


def _is(key: BudgetKey) -> Any:
    return and_(BUDGET.c.scope == key.scope.value, BUDGET.c.id == key.id)


def _of(key: BudgetKey) -> Any:
    return and_(BUDGET_GRANT.c.scope == key.scope.value, BUDGET_GRANT.c.id == key.id)


def _grants(connection: Connection, key: BudgetKey) -> dict[Lent, Grant]:
    rows = connection.execute(select(BUDGET_GRANT).where(_of(key)))
    return {Lent(row.router, row.start_s): Grant(row.granted, row.released) for row in rows}


def _holders(budget: Budget, period: Period, grants: Mapping[Lent, Grant]) -> set[str]:
    """Return the routers that hold something that may be spent in a period."""
    return {
        lent.router
        for lent, each in grants.items()
        if each.outstanding and shares(budget, period, lent.start_s)
    }


def _keep(connection: Connection, key: BudgetKey, lent: Lent, grant: Grant) -> None:
    values = {"granted": grant.granted, "released": grant.released}
    mine = and_(
        _of(key), BUDGET_GRANT.c.router == lent.router, BUDGET_GRANT.c.start_s == lent.start_s
    )
    kept = connection.execute(update(BUDGET_GRANT).where(mine).values(values))
    if not kept.rowcount:
        named = {"scope": key.scope.value, "id": key.id, **lent._asdict()}
        connection.execute(insert(BUDGET_GRANT).values(named | values))
        # One that is settled is kept until then: a late message would open it once more.
        earlier = BUDGET_GRANT.c.start_s < lent.start_s
        connection.execute(delete(BUDGET_GRANT).where(_of(key), earlier, _SETTLED))


def _note_released(connection: Connection, router: str, account: Account) -> None:
    """Keep what a router let go of of a budget that is gone."""
    mine = and_(
        _of(account.key),
        BUDGET_GRANT.c.start_s == account.start_s,
        BUDGET_GRANT.c.router == router,
        BUDGET_GRANT.c.released < account.released,
    )
    connection.execute(update(BUDGET_GRANT).where(mine).values(released=account.released))
    connection.execute(delete(BUDGET_GRANT).where(_of(account.key), _SETTLED))


def _row(budget: Budget) -> dict[str, Any]:
    return {
        "scope": budget.key.scope.value,
        "id": budget.key.id,
        "amount_nanousd": budget.amount_nanousd,
        "resets": budget.window.value,
        "rolling_s": budget.rolling_s,
        "alerts_json": json.dumps(budget.alert_ratios),
        "hard": budget.hard,
    }


def _budget(row: Row[Any]) -> Budget:
    return Budget(
        BudgetKey(BudgetScope(row.scope), row.id),
        row.amount_nanousd,
        Window(row.resets),
        row.rolling_s,
        tuple(json.loads(row.alerts_json)),
        bool(row.hard),
    )
