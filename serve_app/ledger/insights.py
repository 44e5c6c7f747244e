"""Reports on cost by name: what each says, of which hours, and in which shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, func, select

from serve_app.config_costs import CostSettings
from serve_app.core.anomalies import Anomaly, Point, Sensitivity, jumps, rise
from serve_app.core.attribution import Use
from serve_app.core.calendar import DAY_S, HOUR_NS, HOUR_S, day_start_s
from serve_app.core.pricing import CURRENCY, dollars
from serve_app.core.savings import (
    Suggestion,
    cheaper_models,
    fit_token_cost,
    repeated_prompts,
    smaller_pools,
)
from serve_app.core.unit_economics import PoolUse, unit_cost
from serve_app.ledger.cost_sums import (
    HourSums,
    add_good,
    hour_sums,
    model_uses,
    pool_sums,
    repetitions,
    token_rows,
    tokens_by_hour,
)
from serve_app.ledger.database import Database
from serve_app.ledger.focus import allocation_rows, price_rows
from serve_app.ledger.reconcile import reconciliation
from serve_app.ledger.schema import ENGINE_TIME
from serve_app.ledger.spending_days import spending_days
from serve_app.usage_report import UsageQuery, iso_time

HISTORY_S: Final = 28 * DAY_S

# A user's hour, a user's requests, and a model's tokens, each against what they were.
_SPENDING: Final = Sensitivity(6.0, 4.0, history_min=24, history_span_s=7 * DAY_S)
_PER_REQUEST: Final = Sensitivity(6.0, 2.5, history_min=24, history_span_s=7 * DAY_S)
_UNIT_COST: Final = Sensitivity(score_min=4.0, ratio_min=1.3, history_min=5)
_REQUESTS_MIN: Final = 5
_RECENT_DAYS: Final = 2
_NANO: Final = 10**9


def economics(connection: Connection, query: UsageQuery, settings: CostSettings) -> dict[str, Any]:
    """Return what every pool's tokens and requests cost, and what idle and waste do."""
    sums = pool_sums(connection, query, settings.prices())
    add_good(connection, query, sums, settings.ttft_slo_s.items())
    return {
        "object": "economics",
        "currency": CURRENCY,
        **query.window(),
        "hours": sums.hours,
        "data": [_pool(sums.pools[name]) for name in sorted(sums.pools)],
    }


def anomalies(connection: Connection, query: UsageQuery, settings: CostSettings) -> dict[str, Any]:
    """Return who and what cost unlike before in the hours of ``query``: the last day's if open."""
    latest = connection.execute(select(func.max(ENGINE_TIME.c.hour))).scalar_one() or 0
    until_s = query.to_s if query.to_s is not None else int(latest) + HOUR_S
    from_s = query.from_s if query.from_s is not None else until_s - DAY_S
    read = UsageQuery((), from_s - HISTORY_S, until_s)
    sums = hour_sums(connection, read, settings.prices())
    data = [*_of_users(sums, from_s), *_of_models(connection, read, sums, from_s)]
    data.sort(key=lambda each: -each["score"])
    return {
        "object": "anomalies",
        **replace(query, from_s=from_s, to_s=until_s).window(),
        "unit": CURRENCY if sums.priced else "engine seconds",
        "data": data,
    }


def savings(connection: Connection, query: UsageQuery, settings: CostSettings) -> dict[str, Any]:
    """Return what could be saved in a month, the largest first."""
    sums = pool_sums(connection, query, settings.prices())
    pools = list(sums.pools.values())
    models = model_uses(connection, query, sums)
    rows = token_rows(connection, query)
    fits = {model: fit_token_cost(each) for model, each in rows.items()}
    prices = {
        each.model: Fraction(each.cost_nanousd, each.engine_ns) for each in models if each.engine_ns
    }
    found = [
        *smaller_pools(pools, sums.hours),
        *cheaper_models(models, pools, sums.hours),
        *repeated_prompts(
            repetitions(connection, query),
            {model: fit for model, fit in fits.items() if fit is not None},
            prices,
            sums.hours,
        ),
    ]
    found.sort(key=lambda each: -each.saving_nanousd)
    return {
        "object": "savings",
        "currency": CURRENCY,
        **query.window(),
        "hours": sums.hours,
        "data": [_suggestion(each) for each in found],
    }


_Report: TypeAlias = Callable[[Connection, UsageQuery, CostSettings], dict[str, Any]]
_REPORTS: Final[Mapping[str, _Report]] = MappingProxyType(
    {
        "economics": economics,
        "anomalies": anomalies,
        "savings": savings,
        "reconciliation": reconciliation,
        "spending": spending_days,
        "focus": price_rows,
        "focus_allocation": allocation_rows,
    }
)


def insight(
    database: Database, name: str, query: UsageQuery, settings: CostSettings
) -> dict[str, Any]:
    """Return one of usage_report.INSIGHTS as a JSON object, all of it of one moment.

    Raises:
        KeyError: there is none of that name.
        StoreUnavailable: the database failed.
    """
    make = _REPORTS[name]
    with database.snapshot() as connection:
        return make(connection, query, settings)


def _pool(pool: PoolUse) -> dict[str, Any]:
    whole = unit_cost(pool.product, pool.total_nanousd)
    busy = unit_cost(pool.product, pool.busy_nanousd)
    at_slo = unit_cost(pool.good, pool.total_nanousd)
    return {
        "pool": pool.pool,
        "requests": pool.requests,
        "input_tokens": pool.input_tokens,
        "cached_input_tokens": pool.cached_tokens,
        "output_tokens": pool.output_tokens,
        "replica_hours": round(pool.total_ns / HOUR_NS, 3),
        "busy_ratio": round(pool.busy_ratio, 4),
        "cost_usd": dollars(pool.total_nanousd),
        "amount_usd": dollars(pool.amount_nanousd),
        "unpriced_s": dollars(pool.unpriced_ns),
        "usd_per_million_input": whole.input_usd,
        "usd_per_million_output": whole.output_usd,
        "usd_per_million_total": whole.total_usd,
        "usd_per_thousand_requests": whole.requests_usd,
        "usd_per_million_total_never_idle": busy.total_usd,
        "slo_ratio": round(pool.good.requests / pool.requests, 4) if pool.requests else None,
        "usd_per_million_input_at_slo": at_slo.input_usd,
        "usd_per_million_output_at_slo": at_slo.output_usd,
        "usd_per_million_total_at_slo": at_slo.total_usd,
        "cost_by_use_usd": {use.value: dollars(pool.cost_nanousd[use]) for use in Use},
    }


def _suggestion(suggestion: Suggestion) -> dict[str, Any]:
    return {
        "kind": suggestion.kind,
        "subject": suggestion.subject,
        "saving_usd_per_month": dollars(suggestion.saving_nanousd),
        "why": suggestion.why,
    }


def _of_users(sums: HourSums, from_s: int) -> Iterable[dict[str, Any]]:
    for (tenant, user), hours in sorted(sums.users.items()):
        subject = f"{tenant}/{user}" if user else tenant
        series = sorted(hours.items())
        spent = [Point(at_s, value / _NANO) for at_s, (_, value) in series]
        yield from _worst("spending_per_hour", subject, jumps(spent, from_s, _SPENDING))
        each = [
            Point(at_s, value / requests / _NANO)
            for at_s, (requests, value) in series
            if requests >= _REQUESTS_MIN
        ]
        yield from _worst("cost_per_request", subject, jumps(each, from_s, _PER_REQUEST))


def _of_models(
    connection: Connection, query: UsageQuery, sums: HourSums, from_s: int
) -> Iterable[dict[str, Any]]:
    tokens = tokens_by_hour(connection, query)
    for model, costs in sorted(sums.models.items()):
        days: dict[int, list[float]] = {}
        for hour, value in costs.items():
            day = days.setdefault(day_start_s(hour), [0.0, 0.0])
            day[0] += value / _NANO
            day[1] += tokens.get((model, hour), 0)
        points = [
            Point(day, cost * 10**6 / count) for day, (cost, count) in sorted(days.items()) if count
        ]
        if points and points[-1].at_s >= from_s - DAY_S:
            found = rise(points, _RECENT_DAYS, _UNIT_COST)
            yield from _worst("cost_per_million_tokens", model, [found] if found else [])


def _worst(kind: str, subject: str, found: Sequence[Anomaly]) -> Iterable[dict[str, Any]]:
    if found:
        worst = max(found, key=lambda each: each.score)
        yield {
            "kind": kind,
            "subject": subject,
            "at": iso_time(worst.at_s),
            "first_at": iso_time(found[0].at_s),
            "times": len(found),
            "value": worst.value,
            "usual": worst.usual,
            "ratio": round(worst.ratio, 3),
            "score": round(worst.score, 1),
        }
