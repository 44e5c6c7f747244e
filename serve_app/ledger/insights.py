"""Reports on cost by name: what each says, of which hours, and in which shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection

from serve_app.config_costs import CostSettings
from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS
from serve_app.core.pricing import CURRENCY, dollars
from serve_app.core.savings import (
    Suggestion,
    cheaper_models,
    fit_token_cost,
    repeated_prompts,
    smaller_pools,
)
from serve_app.core.unit_economics import PoolUse, unit_cost
from serve_app.ledger.anomalies import anomalies
from serve_app.ledger.cost_sums import (
    add_good,
    model_uses,
    pool_sums,
    repetitions,
    token_rows,
)
from serve_app.ledger.database import Database
from serve_app.ledger.focus import allocation_rows, price_rows
from serve_app.ledger.reconcile import reconciliation
from serve_app.ledger.spending_days import spending_days
from serve_app.usage_report import UsageQuery


def economics(connection: Connection, query: UsageQuery, settings: CostSettings) -> dict[str, Any]:
    """Return what every pool's tokens and requests cost, and what idle and waste do."""
    sums = pool_sums(connection, query, settings.prices())
    add_good(connection, query, sums, settings.ttft_slo_s.items())
    return {
        "object": "economics",
        "currency": CURRENCY,
        **query.window(),
        "hours": sums.hours,
        "data": [_pool(sums.pools[name], sums.priced.get(name)) for name in sorted(sums.pools)],
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


def _pool(pool: PoolUse, priced: PoolUse | None) -> dict[str, Any]:
    known = priced or PoolUse(pool.pool)
    whole = unit_cost(known.product, known.total_nanousd)
    busy = unit_cost(known.product, known.busy_nanousd)
    at_slo = unit_cost(known.good, known.total_nanousd)
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
        "unpriced_ratio": pool.unpriced_ratio,
        "provisional_s": dollars(pool.provisional_ns),
        "provisional_ratio": round(pool.provisional_ratio, 4),
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
