"""Pieces of SQL statements that several modules of the ledger need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Select, Table
from sqlalchemy.dialects import postgresql, sqlite

from serve_app.usage_report import UsageQuery

Id = TypeVar("Id")

_IDS_PER_QUERY: Final = 500


def within(statement: Select[Any], hour: Any, query: UsageQuery) -> Select[Any]:
    """Return a statement of the hours of ``query`` only; ``hour`` is the column they are in."""
    if query.from_s is not None:
        statement = statement.where(hour >= query.from_s)
    return statement if query.to_s is None else statement.where(hour < query.to_s)


def upsert(connection: Connection, table: Table) -> Any:
    """Return an INSERT of the database's dialect, which can say what a conflict comes to."""
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def some_at_a_time(ids: list[Id]) -> Iterator[list[Id]]:
    """Yield ids in order, so many at a time as a query may name."""
    for start in range(0, len(ids), _IDS_PER_QUERY):
        yield ids[start : start + _IDS_PER_QUERY]
