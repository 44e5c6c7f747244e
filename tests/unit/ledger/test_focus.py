"""FOCUS rows: every mandatory column of its type, amounts and ratios to the last digit."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from decimal import Decimal

import pytest

from serve_app.config_costs import CostSettings
from serve_app.core.calendar import HOUR_NS
from serve_app.core.pricing import RateCard, Rates, nanousd
from serve_app.core.types import TenantId
from serve_app.ledger.database import Database
from serve_app.ledger.focus import MANDATORY, focus_problems
from serve_app.ledger.insights import insight
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.usage import UsageLedger
from serve_app.usage import Witness
from serve_app.usage_report import UsageQuery, focus_csv
from tests.cost_records import Person, Town, period
from tests.usage_records import START_S, charge, record

SETTINGS = CostSettings.model_validate(
    {"instances": {"small": {"usd_per_hour": 2.55}, "large": {"usd_per_hour": 9.81}}}
)
TOWN = Town(
    (
        Person("acme", "ann", "small", 30, cached=300),
        Person("bolt", "", "large", 10),
        Person("coil", "", "small", 7),
    ),
    {"small": 2, "large": 1},
    hours=4,
)


@pytest.fixture
def full(database: Database) -> Database:
    prices = PriceStore(database)
    prices.replace([RateCard("any", Rates(3, 1, 17, 1001))], "test")
    ledger = UsageLedger(database, prices)
    # The last hours of a year: the billing period ends in the next one.
    late = replace(TOWN, start_s=START_S - 2 * 3600)
    ledger.commit([*late.records(), record(charge(10**6, price_version=1))])
    ledger.reverse(charge(10**6).request_id, "a mistake")
    return database


@pytest.mark.parametrize("name", ["focus", "focus_allocation"])
def test_rows_have_every_mandatory_column_and_type_and_ratios_that_sum_to_one(
    full: Database, name: str
) -> None:
    found = insight(full, name, UsageQuery(), SETTINGS)
    assert found["data"]
    assert list(focus_problems(found["data"])) == []
    assert set(MANDATORY) <= set(found["columns"])
    assert all(set(row) == set(found["columns"]) for row in found["data"])
    read = list(csv.DictReader(io.StringIO(focus_csv(found))))
    assert read == found["data"]


def test_price_rows_are_what_was_billed_corrections_apart(full: Database) -> None:
    rows = insight(full, "focus", UsageQuery(), SETTINGS)["data"]
    billed = report(full, UsageQuery())["total"]["amount_usd"]
    assert sum(Decimal(row["BilledCost"]) for row in rows) == Decimal(billed)
    back = [row for row in rows if row["ChargeClass"] == "Correction"]
    assert {row["x_TokenKind"] for row in back} == {"input", "cached_input", "output", "request"}
    assert sum(nanousd(row["BilledCost"].removeprefix("-")) for row in back) == 1001 + 36 + 8 + 85
    assert all(row["BilledCost"].startswith("-") for row in back)
    kinds = {row["x_TokenKind"]: row for row in rows if row["x_Model"] == "small"}
    assert kinds["input"]["PricingUnit"] == "1000000 Tokens"
    assert kinds["request"]["PricingUnit"] == "Requests"
    for row in rows:
        cost = Decimal(row["PricingQuantity"]) * Decimal(row["ListUnitPrice"])
        assert cost == Decimal(row["BilledCost"])


def test_a_billing_period_is_the_calendar_month_of_the_hour(full: Database) -> None:
    rows = insight(full, "focus", UsageQuery(), SETTINGS)["data"]
    periods = {(row["BillingPeriodStart"], row["BillingPeriodEnd"]) for row in rows}
    assert periods == {
        ("2025-12-01T00:00:00Z", "2026-01-01T00:00:00Z"),
        ("2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"),
    }


def test_allocation_rows_are_what_the_fleet_cost(full: Database) -> None:
    rows = insight(full, "focus_allocation", UsageQuery(), SETTINGS)["data"]
    fleet = report(full, UsageQuery(), SETTINGS.prices())["fleet"]["cost_usd"]
    assert sum(Decimal(row["EffectiveCost"]) for row in rows) == Decimal(fleet)
    assert {row["x_Use"] for row in rows} == {"requests", "idle"}
    (element,) = json.loads(rows[0]["AllocatedMethodDetails"])["Elements"]
    assert set(element) == {"AllocatedRatio", "UsageUnit", "UsageQuantity"}


def test_open_time_below_zero_is_taken_from_the_requests_of_the_hour(database: Database) -> None:
    prices = PriceStore(database)
    prices.replace([], "none")
    tenth_ns = HOUR_NS // 10
    # Nine tenths of requests that ended, two of which were in the hour before.
    uses_ns = {"useful": 9 * tenth_ns, "idle": 3 * tenth_ns, "open": -2 * tenth_ns}
    records = [
        record(
            charge(number, tenant=TenantId(tenant)),
            Witness.ENGINE,
            engine_ns=tenths * tenth_ns,
            engine_hour=START_S,
            replica="r1",
        )
        for number, tenant, tenths in ((1, "acme", 6), (2, "bolt", 3))
    ]
    UsageLedger(database, prices).commit([period(instance="small", uses_ns=uses_ns), *records])
    rows = insight(database, "focus_allocation", UsageQuery(), SETTINGS)["data"]
    assert list(focus_problems(rows)) == []
    shares = {row["BillingAccountId"]: Decimal(row["PricingQuantity"]) for row in rows}
    acme, bolt, ours = (shares[name] for name in ("acme", "bolt", "Headrace"))
    assert acme + bolt + ours == 1
    assert float(acme) == pytest.approx(0.7 * 6 / 9)
    assert float(ours) == pytest.approx(0.3)
    assert sum(Decimal(row["EffectiveCost"]) for row in rows) == Decimal("2.55")
    assert all(Decimal(row["EffectiveCost"]) >= 0 for row in rows)


def test_a_replica_hour_without_a_price_is_no_charge(full: Database) -> None:
    found = insight(full, "focus_allocation", UsageQuery(), CostSettings())
    assert found["data"] == []


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("BilledCost", "NaN", "BilledCost is not a number"),
        ("ListCost", "a lot", "ListCost is not a number"),
        ("ChargePeriodEnd", "2026-01-01", "ChargePeriodEnd is not a time"),
        ("ServiceName", "", "ServiceName is empty"),
        ("ChargeClass", "Other", "ChargeClass is neither"),
        ("ProviderName", None, "ProviderName is missing"),
        ("AllocatedMethodDetails", '{"Elements":[{"AllocatedRatio":0.5}]}', "sum to"),
        ("AllocatedMethodDetails", '{"Elements":[{"AllocatedRatio":-0.5}]}', "is below 0"),
    ],
)
def test_what_is_wrong_with_a_row_is_found(
    full: Database, column: str, value: str | None, words: str
) -> None:
    rows = insight(full, "focus_allocation", UsageQuery(), SETTINGS)["data"]
    broken = {**rows[0], column: value or ""}
    if value is None:
        del broken[column]
    assert any(words in line for line in focus_problems([broken, *rows[1:]]))
