"""Reports on cost from a ledger of a month."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from serve_app.config_costs import CostSettings
from serve_app.core.pricing import nanousd
from serve_app.ledger.database import Database
from serve_app.ledger.insights import insight
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.usage import UsageLedger
from serve_app.usage_report import INSIGHTS, UsageQuery
from tests.cost_records import Person, Town
from tests.usage_records import HOUR_S, START_S

SETTINGS = CostSettings.model_validate(
    {"instances": {"small": {"usd_per_hour": 2.5}, "large": {"usd_per_hour": 10}}}
)
MONTH = Town(
    (
        Person("acme", "ann", "small", 400),
        Person("acme", "bob", "small", 100),
        Person("bolt", "", "small", 800, prompt=4000, engine_ms=700),
        Person("coil", "cid", "large", 60, engine_ms=9000),
    ),
    {"small": 3, "large": 1},
    hours=24 * 30,
)
LAST_DAY = 24 * 29


@pytest.fixture
def sqlite(tmp_path: Path) -> Database:
    """What is summed here is read the same from both databases: see test_costs."""
    return Database(f"sqlite:///{tmp_path}/month.db")


def ask(database: Database, name: str, query: UsageQuery | None = None) -> dict[str, Any]:
    return insight(database, name, query or UsageQuery(), SETTINGS)


def test_a_quiet_month_gives_no_alarm(sqlite: Database) -> None:
    MONTH.write_sums(sqlite)
    for day in range(15, 30):
        end_s = START_S + (day + 1) * 24 * HOUR_S
        found = ask(sqlite, "anomalies", UsageQuery((), end_s - 24 * HOUR_S, end_s))
        assert found["data"] == []
    assert found["unit"] == "USD"


def test_a_runaway_agent_is_found_and_named(sqlite: Database) -> None:
    def run_away(person: Person, hour: int) -> Person:
        mad = person.user == "bob" and hour >= LAST_DAY + 10
        return replace(person, hourly=person.hourly * 15) if mad else person

    replace(MONTH, change=run_away).write_sums(sqlite)
    (found,) = ask(sqlite, "anomalies")["data"]
    assert (found["kind"], found["subject"]) == ("spending_per_hour", "acme/bob")
    assert found["first_at"] == "2026-01-30T10:00:00Z"
    assert found["ratio"] > 10


def test_requests_that_cost_more_than_they_did_are_found_though_no_more_came(
    sqlite: Database,
) -> None:
    def dearer(person: Person, hour: int) -> Person:
        odd = person.user == "ann" and hour >= LAST_DAY + 12
        return replace(person, engine_ms=person.engine_ms * 4) if odd else person

    replace(MONTH, change=dearer).write_sums(sqlite)
    kinds = {(each["kind"], each["subject"]) for each in ask(sqlite, "anomalies")["data"]}
    assert ("cost_per_request", "acme/ann") in kinds
    assert not any(subject in ("bolt", "coil/cid", "acme/bob") for _, subject in kinds)


def test_a_unit_cost_that_drifts_to_its_double_is_found(sqlite: Database) -> None:
    def drift(person: Person, hour: int) -> Person:
        if person.model != "large":
            return person
        return replace(person, engine_ms=person.engine_ms * (1 + max(0, hour - 360) / 360))

    replace(MONTH, change=drift).write_sums(sqlite)
    (found,) = ask(sqlite, "anomalies")["data"]
    assert (found["kind"], found["subject"]) == ("cost_per_million_tokens", "large")
    assert 1.3 < found["ratio"] < 2.2


def test_without_prices_engine_time_is_what_is_watched(sqlite: Database) -> None:
    def run_away(person: Person, hour: int) -> Person:
        mad = person.user == "bob" and hour >= LAST_DAY + 10
        return replace(person, hourly=person.hourly * 15) if mad else person

    replace(MONTH, change=run_away).write_sums(sqlite)
    found = insight(sqlite, "anomalies", UsageQuery(), CostSettings())
    assert found["unit"] == "engine seconds"
    assert [each["subject"] for each in found["data"]] == ["acme/bob"]


def test_what_pools_cost_by_use_is_what_the_fleet_cost(database: Database) -> None:
    prices = PriceStore(database)
    prices.replace([], "none")
    town = replace(MONTH, hours=3, people=tuple(replace(p, hourly=20) for p in MONTH.people))
    UsageLedger(database, prices).commit(list(town.records()))
    found = ask(database, "economics")
    fleet = report(database, UsageQuery(), SETTINGS.prices())["fleet"]["cost_nanousd"]
    spent = [nanousd(cost) for pool in found["data"] for cost in pool["cost_by_use_usd"].values()]
    assert sum(spent) == fleet == nanousd("52.5")
    large, small = found["data"]
    assert (large["pool"], large["replica_hours"], small["replica_hours"]) == ("large", 3.0, 9.0)
    assert nanousd(small["cost_by_use_usd"]["cancelled"]) > 0
    tokens = small["input_tokens"] + small["output_tokens"]
    assert small["usd_per_million_total"] == pytest.approx(22.5 * 10**6 / tokens)
    assert small["usd_per_million_total_never_idle"] < small["usd_per_million_total"]
    assert small["slo_ratio"] == 0
    assert small["usd_per_million_total_at_slo"] is None
    assert small["usd_per_thousand_requests"] == pytest.approx(22500 / small["requests"])


def test_at_the_slo_only_what_came_in_time_counts(database: Database) -> None:
    prices = PriceStore(database)
    prices.replace([], "none")
    town = replace(MONTH, hours=1, people=(Person("acme", "ann", "small", 40),))
    records: list[Any] = []
    for number, each in enumerate(town.records()):
        if getattr(each, "witness", "") == "router":
            # Half of them in time; the class is Standard.
            each = structs.replace(each, first_token_s=1.9 if number % 4 else 2.1)
        records.append(each)
    UsageLedger(database, prices).commit(records)
    (small,) = [pool for pool in ask(database, "economics")["data"] if pool["pool"] == "small"]
    assert 0.3 < small["slo_ratio"] < 0.7
    dearer = small["usd_per_million_output_at_slo"] / small["usd_per_million_output"]
    assert dearer == pytest.approx(1 / small["slo_ratio"], rel=0.25)


def test_savings_name_the_pool_the_model_and_the_prompts(database: Database) -> None:
    prices = PriceStore(database)
    prices.replace([], "none")
    people = (
        Person("acme", "ann", "small", 40, prompt=800, output=150, engine_ms=300),
        Person("bolt", "", "small", 40, prompt=6000, output=20, engine_ms=900),
        Person("coil", "", "large", 15, prompt=700, engine_ms=6000),
    )
    town = Town(people, {"small": 4, "large": 1}, hours=6)
    UsageLedger(database, prices).commit(list(town.records()))
    found = ask(database, "savings")["data"]
    kinds = {(each["kind"], each["subject"]) for each in found}
    assert ("smaller_pool", "small") in kinds
    assert ("cheaper_model", "large") in kinds
    assert ("uncached_prompts", "bolt on small") in kinds
    amounts = [Fraction(each["saving_usd_per_month"]) for each in found]
    assert amounts == sorted(amounts, reverse=True)
    pool = next(each for each in found if each["kind"] == "smaller_pool")
    assert Fraction(pool["saving_usd_per_month"]) == Fraction("2.5") * 3 * 730


@pytest.mark.parametrize("name", INSIGHTS)
def test_an_empty_ledger_has_nothing_to_say(database: Database, name: str) -> None:
    found = ask(database, name)
    assert found.get("data", found.get("nodes")) == []
