"""FOCUS rows: what tenants are billed, and how replicas' cost is allocated to them.

Price rows: one per hour, tenant, model, class and kind of token. Allocation rows: the cost
of every replica-hour, its origin charge, split over tenants and models and over what was
nobody's; their ratios are in [0, 1] and sum to exactly 1. The two are exports of their own,
since adding the one to the other would count everything twice.

Where more time of open requests came from the hour before than goes on to the next, those
that ended have more than the hour: what is over is taken from each in proportion.

Source: FinOps Open Cost and Usage Specification 1.2; the Allocated columns are of 1.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, Final

from sqlalchemy import Connection, Row, func, select

from serve_app.config_costs import CostSettings
from serve_app.core.calendar import HOUR_NS, HOUR_S
from serve_app.core.pricing import CURRENCY, dollars
from serve_app.core.true_cost import Overhead, Part, split
from serve_app.core.types import PriorityClass
from serve_app.ledger.costs import SplitHour, split_hours
from serve_app.ledger.schema import USAGE_EVENT
from serve_app.ledger.statements import within
from serve_app.usage import Witness
from serve_app.usage_report import UsageQuery, iso_time

METHOD: Final = "headrace-measured-engine-time"
RATIO_DIGITS: Final = 12
NAME: Final = "Headrace"
TOKENS_UNIT: Final = "1000000 Tokens"
REQUESTS_UNIT: Final = "Requests"

# Of every row; those whose values are numbers or times come first.
DECIMALS: Final = ("BilledCost", "ContractedCost", "EffectiveCost", "ListCost", "PricingQuantity")
TIMES: Final = (
    *("BillingPeriodStart", "BillingPeriodEnd", "ChargePeriodStart", "ChargePeriodEnd"),
)
TEXTS: Final = (
    *("BillingAccountId", "BillingAccountName", "BillingCurrency", "ChargeCategory"),
    *("ChargeDescription", "InvoiceIssuerName", "PricingUnit", "ProviderName"),
    *("PublisherName", "ServiceCategory", "ServiceName"),
)
# Present in every row, and null for what is no correction.
NULLABLE: Final = ("ChargeClass",)
MANDATORY: Final = (*DECIMALS, *TIMES, *TEXTS, *NULLABLE)
PRICE_COLUMNS: Final = (
    *sorted(MANDATORY),
    *("ConsumedQuantity", "ConsumedUnit", "ListUnitPrice", "ContractedUnitPrice"),
    *("x_Model", "x_TokenKind", "x_PriorityClass"),
)
ALLOCATION_COLUMNS: Final = (
    *sorted(MANDATORY),
    *("ResourceId", "ResourceName", "ResourceType", "AllocatedMethodId"),
    *("AllocatedMethodDetails", "AllocatedResourceId", "AllocatedResourceName"),
    *("x_Model", "x_Use", "x_Pool", "x_Node"),
)

_KINDS: Final = ("input", "cached_input", "output", "request")


def price_rows(connection: Connection, query: UsageQuery, settings: CostSettings) -> dict[str, Any]:
    """Return what was billed as FOCUS rows, exactly; corrections are rows of their own."""
    event = USAGE_EVENT.c
    is_correction = (event.witness == Witness.OPERATOR.value).label("correction")
    rates = [event[f"{name}_rate_nanousd"] for name in ("input", "cached", "output", "request")]
    keys = [event.hour, event.tenant, event.model, event.priority_class, is_correction, *rates]
    names = ("billed_prompt_tokens", "billed_cached_tokens", "billed_output_tokens")
    sums = [func.sum(event[name]).label(name) for name in (*names, "billed_requests")]
    statement = within(select(*keys, *sums), event.hour, query).group_by(*keys).order_by(*keys)
    rows = [row for each in connection.execute(statement) for row in _of_prices(each)]
    return {"object": "focus", "columns": list(PRICE_COLUMNS), "data": rows}


def allocation_rows(
    connection: Connection, query: UsageQuery, settings: CostSettings
) -> dict[str, Any]:
    """Return every priced replica-hour split over tenants, models and the rest, exactly."""
    hours = split_hours(connection, query, ("tenant", "model"), settings.prices())
    rows = [row for each in hours for row in _of_allocation(each)]
    return {"object": "focus_allocation", "columns": list(ALLOCATION_COLUMNS), "data": rows}


def focus_problems(rows: Iterable[Mapping[str, str]]) -> Iterator[str]:
    """Yield what is wrong with rows: mandatory columns, types, and ratios of origin charges."""
    ratios: dict[tuple[str, str], Decimal] = {}
    for number, row in enumerate(rows):
        yield from (f"row {number}: {problem}" for problem in _problems(row))
        if row.get("AllocatedMethodDetails"):
            (element,) = json.loads(row["AllocatedMethodDetails"], parse_float=Decimal)["Elements"]
            key = row["ResourceId"], row["ChargePeriodStart"]
            ratios[key] = ratios.get(key, Decimal()) + element["AllocatedRatio"]
            if element["AllocatedRatio"] < 0:
                yield f"row {number}: its ratio is below 0"
    for key, ratio in ratios.items():
        if ratio != 1:
            yield f"origin charge {'/'.join(key)}: its ratios sum to {ratio}"


def _problems(row: Mapping[str, str]) -> Iterator[str]:
    for name in MANDATORY:
        if name not in row:
            yield f"{name} is missing"
    for name in DECIMALS:
        try:
            finite = Decimal(row.get(name, "0")).is_finite()
        except InvalidOperation:
            finite = False
        if not finite:
            yield f"{name} is not a number"
    for name in TIMES:
        try:
            datetime.strptime(row.get(name, ""), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        except ValueError:
            yield f"{name} is not a time"
    for name in TEXTS:
        if not row.get(name):
            yield f"{name} is empty"
    if row.get("ChargeClass") not in ("", "Correction"):
        yield "ChargeClass is neither null nor Correction"


def _of_prices(row: Row[Any]) -> Iterator[dict[str, str]]:
    cached = int(row.billed_cached_tokens)
    counts = (
        int(row.billed_prompt_tokens) - cached,
        cached,
        int(row.billed_output_tokens),
        int(row.billed_requests),
    )
    rates = (
        row.input_rate_nanousd,
        row.cached_rate_nanousd,
        row.output_rate_nanousd,
        row.request_rate_nanousd,
    )
    for kind, count, rate in zip(_KINDS, counts, rates, strict=True):
        if not count or (kind == "request" and not rate):
            continue
        per = 1 if kind == "request" else 10**6
        cost = dollars(count * rate)
        what = "requests" if kind == "request" else f"{kind.replace('_', ' ')} tokens"
        yield {
            **_common(row.hour, row.tenant, row.model, cost),
            "ChargeClass": "Correction" if row.correction else "",
            "ChargeDescription": f"{what} of {row.model}",
            "PricingQuantity": _decimal(Decimal(count) / per),
            "PricingUnit": REQUESTS_UNIT if kind == "request" else TOKENS_UNIT,
            "ConsumedQuantity": str(count),
            "ConsumedUnit": "Requests" if kind == "request" else "Tokens",
            "ListUnitPrice": dollars(rate * per),
            "ContractedUnitPrice": dollars(rate * per),
            "x_Model": row.model,
            "x_TokenKind": kind,
            "x_PriorityClass": PriorityClass(row.priority_class).name.lower(),
        }


def _of_allocation(each: SplitHour) -> Iterator[dict[str, str]]:
    hour = each.cost.hour
    if each.cost.cost_nanousd is None:
        # Without a price there is no charge to allocate.
        return
    parts = [part for part in _netted(each.cost.parts) if part.time_ns]
    times = [part.time_ns for part in parts]
    costs, ratios = split(each.cost.cost_nanousd, times), _ratios(times)
    for part, cost, ratio in zip(parts, costs, ratios, strict=True):
        tenant, model, use = NAME, "", "requests"
        if isinstance(part.key, Overhead):
            use = part.key.value
        else:
            tenant, model = map(str, part.key)
        element = {
            "AllocatedRatio": "@",
            "UsageUnit": "Seconds",
            "UsageQuantity": "#",
        }
        details = json.dumps({"Elements": [element]})
        details = details.replace('"@"', ratio).replace('"#"', dollars(part.time_ns))
        yield {
            **_common(hour.hour, tenant, hour.instance, dollars(cost)),
            "ChargeClass": "",
            "ChargeDescription": f"engine time of {hour.pool}: {use.replace('_', ' ')}",
            "PricingQuantity": f"{Decimal(part.time_ns) / HOUR_NS:.12f}",
            "PricingUnit": "Hours",
            "ResourceId": hour.replica,
            "ResourceName": hour.replica,
            "ResourceType": "Replica",
            "AllocatedMethodId": METHOD,
            "AllocatedMethodDetails": details,
            "AllocatedResourceId": "" if isinstance(part.key, Overhead) else f"{tenant}/{model}",
            "AllocatedResourceName": "" if isinstance(part.key, Overhead) else tenant,
            "x_Model": model,
            "x_Use": use,
            "x_Pool": hour.pool,
            "x_Node": hour.node,
        }


def _common(hour: int, tenant: str, service: str, cost: str) -> dict[str, str]:
    start, end = _month(hour)
    return {
        "BilledCost": cost,
        "ContractedCost": cost,
        "EffectiveCost": cost,
        "ListCost": cost,
        "BillingAccountId": tenant,
        "BillingAccountName": tenant,
        "BillingCurrency": CURRENCY,
        "BillingPeriodStart": start,
        "BillingPeriodEnd": end,
        "ChargeCategory": "Usage",
        "ChargePeriodStart": iso_time(hour),
        "ChargePeriodEnd": iso_time(hour + HOUR_S),
        "InvoiceIssuerName": NAME,
        "ProviderName": NAME,
        "PublisherName": NAME,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": service or "-",
    }


def _month(hour: int) -> tuple[str, str]:
    start = datetime.fromtimestamp(hour, UTC).replace(day=1, hour=0, minute=0, second=0)
    year, month = divmod(start.year * 12 + start.month, 12)
    end = start.replace(year=year, month=month + 1)
    return iso_time(start.timestamp()), iso_time(end.timestamp())


def _netted(parts: Sequence[Part]) -> list[Part]:
    """Return parts none of whose times is below zero: that is taken from the requests' times."""
    times = [max(0, part.time_ns) for part in parts]
    over_ns = sum(times) - sum(part.time_ns for part in parts)
    bearing = [
        time_ns if part.key is Overhead.CUT_OFF or not isinstance(part.key, Overhead) else 0
        for part, time_ns in zip(parts, times, strict=True)
    ]
    if sum(bearing) < over_ns:
        bearing = times
    less = split(over_ns, bearing)
    return [
        replace(part, time_ns=time_ns - less_ns)
        for part, time_ns, less_ns in zip(parts, times, less, strict=True)
    ]


def _ratios(times: Sequence[int]) -> list[str]:
    """Return decimals in proportion to times that sum to 1 to their last digit."""
    parts = split(10**RATIO_DIGITS, times)
    return [f"{Decimal(part).scaleb(-RATIO_DIGITS):.{RATIO_DIGITS}f}" for part in parts]


def _decimal(value: Decimal) -> str:
    return format(value, "f")
