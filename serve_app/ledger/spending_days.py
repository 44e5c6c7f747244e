"""What was spent and billed by the day: the curve of a month."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy import Connection, func, select

from serve_app.config_costs import CostSettings
from serve_app.core.calendar import day_start_s
from serve_app.core.pricing import CURRENCY, dollars
from serve_app.core.true_cost import Overhead
from serve_app.ledger.costs import split_hours
from serve_app.ledger.schema import USAGE_ROLLUP
from serve_app.ledger.statements import within
from serve_app.usage_report import UsageQuery, iso_time


def spending_days(
    connection: Connection, query: UsageQuery, settings: CostSettings
) -> dict[str, Any]:
    """Return by day, UTC, what was billed, and what each model and the rest of the time cost.

    Days in which nothing happened are not there. Amounts add up to the fleet's cost exactly;
    ``unpriced_s`` is replicas' time that has no price and is in none of them.
    """
    models: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    overheads: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    unpriced_ns: dict[int, int] = defaultdict(int)
    for each in split_hours(connection, query, ("model",), settings.prices()):
        day = day_start_s(each.cost.hour.hour)
        if each.cost.cost_nanousd is None:
            unpriced_ns[day] += each.cost.lasted_ns
        for part in each.cost.parts:
            if isinstance(part.key, Overhead):
                overheads[day][part.key.value] += part.cost_nanousd or 0
            else:
                models[day][str(part.key[0])] += part.cost_nanousd or 0
    used = USAGE_ROLLUP.c
    amounts = select(used.hour, func.sum(used.amount_nanousd))
    billed: dict[int, int] = defaultdict(int)
    for row in connection.execute(within(amounts, used.hour, query).group_by(used.hour)):
        billed[day_start_s(row[0])] += int(row[1])
    return {
        "object": "spending",
        "currency": CURRENCY,
        "data": [
            {
                "day": iso_time(day)[:10],
                "billed_usd": dollars(billed[day]),
                "models_usd": {name: dollars(cost) for name, cost in sorted(models[day].items())},
                "overheads_usd": {name: dollars(cost) for name, cost in overheads[day].items()},
                "unpriced_s": dollars(unpriced_ns[day]),
            }
            for day in sorted(overheads.keys() | {day for day, cost in billed.items() if cost})
        ],
    }
