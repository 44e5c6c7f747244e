"""Sums of usage for people and invoices, read from the rollups."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from sqlalchemy import Row, func, select

from serve_app.core.idle import IdleRule
from serve_app.core.pricing import CURRENCY, dollars
from serve_app.core.true_cost import InstancePrice
from serve_app.core.types import PriorityClass
from serve_app.ledger.costs import CostTally, read_costs
from serve_app.ledger.database import Database
from serve_app.ledger.idle import read_idle
from serve_app.ledger.schema import SUMS, USAGE_ROLLUP
from serve_app.ledger.statements import within
from serve_app.ledger.tally import NOTHING, Tally
from serve_app.usage_report import UsageQuery, iso_time, shows_idle

NO_PRICES: Final[Mapping[str, InstancePrice]] = MappingProxyType({})
NO_RULES: Final[Mapping[str, IdleRule]] = MappingProxyType({})

_COLUMNS: Final = {
    "tenant": "tenant",
    "model": "model",
    "user": "user_id",
    "key": "key_id",
    "class": "priority_class",
    "tag": "tag",
    "hour": "hour",
}


def report(
    database: Database,
    query: UsageQuery,
    instances: Mapping[str, InstancePrice] = NO_PRICES,
    idle_rules: Mapping[str, IdleRule] = NO_RULES,
) -> dict[str, Any]:
    """Return the report as a JSON object: its query, its rows in order, their total.

    ``overheads`` is what replicas' time went to beside requests, ``fleet`` all of it: the
    rows' cost and the overheads' are the fleet's, to the nano-dollar. ``idle`` says who
    bears the idle part of the overheads, by the rules of the pools; it is in nobody's cost.
    Where the report's columns can carry it (usage_report.shows_idle) it is a column of its
    own beside the cost, and both together are ``full_cost``: the rows' full cost, what idle
    time nobody bears and the other overheads are the fleet's.

    Raises:
        StoreUnavailable: the database failed.
    """
    columns = [_COLUMNS[name] for name in query.by]
    keys = [USAGE_ROLLUP.c[name] for name in columns]
    statement = select(*keys, *(func.sum(USAGE_ROLLUP.c[name]).label(name) for name in SUMS))
    statement = within(statement, USAGE_ROLLUP.c.hour, query)
    if keys:
        statement = statement.group_by(*keys)
    with database.snapshot() as connection:
        found = [row for row in connection.execute(statement) if row.requests is not None]
        costs = read_costs(connection, query, columns, instances)
        idle = read_idle(connection, query, instances, idle_rules, costs.idle)
    tallies = {tuple(row[: len(columns)]): _tally(row) for row in found}
    nothing = CostTally()
    keys_ = tallies.keys() | costs.rows.keys()
    shown = shows_idle(query.by)
    if shown:
        # Capacity may be kept for one who asked nothing.
        keys_ |= idle.rows.keys()
    data: list[dict[str, Any]] = []
    for key in sorted(keys_):
        cost = costs.rows.get(key, nothing)
        row = _keys(query, key) | _figures(tallies.get(key, NOTHING), cost)
        data.append(row | (_with_idle(cost, idle.rows.get(key, 0)) if shown else {}))
    whole = CostTally()
    for each in costs.rows.values():
        whole.add(each)
    return {
        "object": "usage_report",
        "currency": CURRENCY,
        "by": list(query.by),
        **query.window(),
        "data": data if query.by else [],
        "total": _figures(sum(tallies.values(), NOTHING), whole),
        "overheads": [
            {"what": each.value, **_spent(tally)} for each, tally in costs.overheads.items()
        ],
        "idle": {
            "tenants": [
                {"tenant": tenant, **_idle(idle.tenants[tenant])} for tenant in sorted(idle.tenants)
            ],
            "unallocated_usd": dollars(idle.unallocated),
            "unallocated_nanousd": idle.unallocated,
        },
        "fleet": _spent(costs.fleet),
    }


def _tally(row: Row[Any]) -> Tally:
    return Tally(*(int(getattr(row, name)) for name in SUMS))


def _keys(query: UsageQuery, key: tuple[Any, ...]) -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, value in zip(query.by, key, strict=True):
        if name == "class":
            keys[name] = PriorityClass(value).name.lower()
        else:
            keys[name] = iso_time(value) if name == "hour" else value
    return keys


def _figures(tally: Tally, cost: CostTally) -> dict[str, Any]:
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
        # Seconds in nanoseconds are written as dollars in nano-dollars are.
        "engine_s": dollars(cost.time_ns),
        "cost_usd": dollars(cost.cost_nanousd),
        "cost_nanousd": cost.cost_nanousd,
        "wasted_cost_usd": dollars(cost.wasted_nanousd),
        "unpriced_s": dollars(cost.unpriced_ns),
        "provisional_s": dollars(cost.provisional_ns),
        "kv_block_s": dollars(cost.kv_block_us * 1000),
    }


def _spent(cost: CostTally) -> dict[str, Any]:
    return {
        "time_s": dollars(cost.time_ns),
        "cost_usd": dollars(cost.cost_nanousd),
        "cost_nanousd": cost.cost_nanousd,
        "unpriced_s": dollars(cost.unpriced_ns),
        "provisional_s": dollars(cost.provisional_ns),
    }


def _idle(share: int) -> dict[str, Any]:
    return {"idle_cost_usd": dollars(share), "idle_cost_nanousd": share}


def _with_idle(cost: CostTally, share: int) -> dict[str, Any]:
    full = cost.cost_nanousd + share
    return _idle(share) | {"full_cost_usd": dollars(full), "full_cost_nanousd": full}
