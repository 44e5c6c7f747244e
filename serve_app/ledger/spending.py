"""What each key, user, tenant and tag spent by the hour: what budgets are held against.

Derived from the rollups, kept in the ledger's own transactions, rebuilt and checked like
them. A user's id is ``tenant/user``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from sqlalchemy import Connection, delete, func, insert, select

from serve_app.core.budget import BudgetKey, BudgetScope, Period, scopes_of
from serve_app.ledger.schema import API_KEY, SPENDING, USAGE_ROLLUP
from serve_app.ledger.statements import upsert
from serve_app.ledger.tally import Tally

_KEY: Final = ("scope", "id", "hour")


def add_spending(
    connection: Connection, key_names: Iterable[str], sums: Mapping[tuple[Any, ...], Tally]
) -> None:
    """Add what was just added to the rollups, whose keys have the columns ``key_names``."""
    names = tuple(key_names)
    amounts: dict[tuple[str, str, int], int] = {}
    for values, tally in sums.items():
        row = dict(zip(names, values, strict=True))
        _add(amounts, row, tally.amount_nanousd)
    if not amounts:
        return
    new = upsert(connection, SPENDING)
    total = SPENDING.c.amount_nanousd + new.excluded.amount_nanousd
    statement = new.on_conflict_do_update(index_elements=_KEY, set_={"amount_nanousd": total})
    connection.execute(statement, _rows(amounts))


def rebuild_spending(connection: Connection) -> None:
    """Make it anew from the rollups."""
    connection.execute(delete(SPENDING))
    amounts = _from_rollups(connection)
    if amounts:
        connection.execute(insert(SPENDING), _rows(amounts))


def spending_differences(connection: Connection) -> Iterator[str]:
    """Yield a line for each sum that is not what the rollups say."""
    expected = _from_rollups(connection)
    query = select(SPENDING.c.scope, SPENDING.c.id, SPENDING.c.hour, SPENDING.c.amount_nanousd)
    for scope, name, hour, amount in connection.execute(query):
        wanted = expected.pop((scope, name, hour), 0)
        if wanted != amount:
            yield f"spending {scope} {name!r} hour {hour}: {amount} nano-dollars, not {wanted}"
    for (scope, name, hour), amount in expected.items():
        if amount:
            yield f"spending {scope} {name!r} hour {hour}: missing, {amount} nano-dollars"


def spent(connection: Connection, key: BudgetKey, period: Period) -> int:
    """Return what a scope spent in the hours from a period's start and before its end.

    A key's is that of all the keys that took its place as well.
    """
    ids = [key.id]
    if key.scope is BudgetScope.KEY:
        # Read first: as a part of the sum they would keep it from its index.
        mine = select(API_KEY.c.key_id).where(API_KEY.c.account == key.id)
        ids = sorted({key.id, *connection.execute(mine).scalars()})
    total = func.coalesce(func.sum(SPENDING.c.amount_nanousd), 0)
    query = select(total).where(
        SPENDING.c.scope == key.scope.value,
        SPENDING.c.id.in_(ids),
        SPENDING.c.hour >= period.start_s,
        SPENDING.c.hour < period.end_s,
    )
    return int(connection.execute(query).scalar_one())


def _from_rollups(connection: Connection) -> dict[tuple[str, str, int], int]:
    amounts: dict[tuple[str, str, int], int] = {}
    columns = [
        USAGE_ROLLUP.c[name]
        for name in ("hour", "tenant", "user_id", "key_id", "tag", "amount_nanousd")
    ]
    for row in connection.execute(select(*columns)):
        _add(amounts, row._mapping, row.amount_nanousd)
    return amounts


def _add(
    amounts: dict[tuple[str, str, int], int], row: Mapping[Any, Any], amount_nanousd: int
) -> None:
    for key in scopes_of(
        tenant=row["tenant"], user=row["user_id"], key=row["key_id"], tag=row["tag"]
    ):
        name = (key.scope.value, key.id, int(row["hour"]))
        amounts[name] = amounts.get(name, 0) + amount_nanousd


def _rows(amounts: Mapping[tuple[str, str, int], int]) -> list[dict[str, Any]]:
    # In order, so that two writers never wait for each other's rows.
    return [
        dict(zip((*_KEY, "amount_nanousd"), (*name, amounts[name]), strict=True))
        for name in sorted(amounts)
    ]
