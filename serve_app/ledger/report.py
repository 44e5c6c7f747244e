"""Sums of usage for people and invoices, read from the rollups."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import Row, func, select

from serve_app.core.pricing import CURRENCY, dollars
from serve_app.core.types import PriorityClass
from serve_app.ledger.database import Database
from serve_app.ledger.schema import SUMS, USAGE_ROLLUP
from serve_app.ledger.tally import NOTHING, Tally
from serve_app.usage_report import UsageQuery, iso_time

_COLUMNS: Final = {
    "tenant": "tenant",
    "model": "model",
    "user": "user_id",
    "key": "key_id",
    "class": "priority_class",
    "tag": "tag",
    "hour": "hour",
}


def report(database: Database, query: UsageQuery) -> dict[str, Any]:
    """Return the report as a JSON object: its query, its rows in order, their total.

    Raises:
        StoreUnavailable: the database failed.
    """
    keys = [USAGE_ROLLUP.c[_COLUMNS[name]] for name in query.by]
    statement = select(*keys, *(func.sum(USAGE_ROLLUP.c[name]).label(name) for name in SUMS))
    if query.from_s is not None:
        statement = statement.where(USAGE_ROLLUP.c.hour >= query.from_s)
    if query.to_s is not None:
        statement = statement.where(USAGE_ROLLUP.c.hour < query.to_s)
    if keys:
        statement = statement.group_by(*keys).order_by(*keys)
    with database.transaction() as connection:
        found = [row for row in connection.execute(statement) if row.requests is not None]
    tallies = [_tally(row) for row in found]
    total = sum(tallies, NOTHING)
    data = [
        {**_keys(query, row), **_figures(tally)} for row, tally in zip(found, tallies, strict=True)
    ]
    return {
        "object": "usage_report",
        "currency": CURRENCY,
        "by": list(query.by),
        "from": None if query.from_s is None else iso_time(query.from_s),
        "to": None if query.to_s is None else iso_time(query.to_s),
        "data": data if query.by else [],
        "total": _figures(total),
    }


def _tally(row: Row[Any]) -> Tally:
    return Tally(*(int(getattr(row, name)) for name in SUMS))


def _keys(query: UsageQuery, row: Row[Any]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, value in zip(query.by, row, strict=False):
        if name == "class":
            keys[name] = PriorityClass(value).name.lower()
        else:
            keys[name] = iso_time(value) if name == "hour" else value
    return keys


def _figures(tally: Tally) -> dict[str, Any]:
    return {
        "requests": tally.requests,
        "billed_requests": tally.billed_requests,
        "prompt_tokens": tally.billed_prompt_tokens,
        "cached_prompt_tokens": tally.billed_cached_tokens,
        "output_tokens": tally.billed_output_tokens,
        "delivered_tokens": tally.delivered_tokens,
        "generated_tokens": tally.generated_tokens,
        "wasted_tokens": tally.wasted_tokens,
        "wasted_usd": dollars(tally.wasted_nanousd),
        "amount_usd": dollars(tally.amount_nanousd),
        "amount_nanousd": tally.amount_nanousd,
    }
