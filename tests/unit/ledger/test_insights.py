"""Reports on cost from a ledger of a month."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import update

from serve_app.config_costs import CostSettings
from serve_app.core.anomalies import median
from serve_app.core.calendar import DAY_S
from serve_app.core.pricing import nanousd
from serve_app.core.reconciliation import NodeBill
from serve_app.ledger.anomalies import _of_users
from serve_app.ledger.cost_sums import HourSums, Spent
from serve_app.ledger.costs import write_bills
from serve_app.ledger.database import Database
from serve_app.ledger.insights import insight
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.schema import REPLICA_HOUR
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


def test_looking_for_what_starts_from_nothing_grows_as_the_users_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = [0]

    def counted(of: Sequence[float]) -> float:
        values[0] += len(of)
        return median(of)

    monkeypatch.setattr("serve_app.core.anomalies.median", counted)
    looked = []
    usual, dear = Spent(10, 10**9, 10**9), Spent(10, 10**11, 10**11)
    # Nobody has hours enough of their own to be judged by.
    hours = {hour * HOUR_S: usual for hour in range(20)}
    hours |= {hour * HOUR_S: dear for hour in range(188, 192)}
    for users in (100, 400):
        sums = HourSums({("acme", f"user-{number}"): hours for number in range(users)})
        values[0] = 0
        found = list(_of_users(sums, 188 * HOUR_S))
        assert len(found) == users
        looked.append(values[0])
    assert looked[1] < 5 * looked[0]


def test_a_quiet_month_gives_no_alarm(sqlite: Database) -> None:
    MONTH.write_sums(sqlite)
    found = ask(sqlite, "anomalies", UsageQuery((), START_S + 15 * DAY_S, START_S + 30 * DAY_S))
    assert (found["data"], found["unit"]) == ([], "USD")
    for day in (16, 22, 29):
        end_s = START_S + (day + 1) * DAY_S
        assert ask(sqlite, "anomalies", UsageQuery((), end_s - DAY_S, end_s))["data"] == []


# With half of the batch a request takes 1.7 times as long, with a fifth nearly four times.
BATCHED = replace(MONTH, batched=0.7)


def test_a_month_in_which_quiet_hours_cost_more_a_token_gives_no_alarm(sqlite: Database) -> None:
    BATCHED.write_sums(sqlite)
    quiet, busy = (unit_cost_of_small(sqlite, day_of(day, days=2)) for day in (26, 23))
    assert quiet > 1.6 * busy
    # Days 5 and 6 of each week are its weekend; the first comes before there was any.
    for day in (6, 12, 13, 20, 26, 27, 29):
        assert ask(sqlite, "anomalies", day_of(day))["data"] == [], day
    whole = UsageQuery((), START_S + 15 * DAY_S, START_S + 30 * DAY_S)
    assert ask(sqlite, "anomalies", whole)["data"] == []


def test_a_holiday_quieter_than_any_day_before_gives_no_alarm(sqlite: Database) -> None:
    def holiday(person: Person, hour: int) -> Person:
        return replace(person, hourly=person.hourly // 6) if hour >= 24 * 28 else person

    replace(BATCHED, change=holiday).write_sums(sqlite)
    assert ask(sqlite, "anomalies", day_of(29))["data"] == []


@pytest.mark.parametrize("start", [12 * 24, 26 * 24, 28 * 24], ids=["weekend", "later", "weekday"])
def test_twice_the_unit_cost_at_the_same_load_is_found_whatever_the_load(
    sqlite: Database, start: int
) -> None:
    def double(person: Person, hour: int) -> Person:
        dear = person.model == "large" and hour >= start
        return replace(person, engine_ms=2 * person.engine_ms) if dear else person

    replace(BATCHED, change=double).write_sums(sqlite)
    found = ask(sqlite, "anomalies", day_of(start // 24 + 1))["data"]
    (found,) = [each for each in found if each["kind"] == "cost_per_million_tokens"]
    assert found["subject"] == "large"
    assert 1.6 < found["ratio"] < 2.4
    assert found["usual"] == pytest.approx(found["value"] / found["ratio"], rel=0.01)


def test_a_runaway_agent_is_found_though_it_makes_requests_cheaper(sqlite: Database) -> None:
    replace(BATCHED, change=run_away).write_sums(sqlite)
    (found,) = ask(sqlite, "anomalies")["data"]
    assert (found["kind"], found["subject"]) == ("spending_per_hour", "acme/bob")


def run_away(person: Person, hour: int) -> Person:
    """From ten o'clock of the last day on, Bob's agent asks fifteen times as much."""
    mad = person.user == "bob" and hour >= LAST_DAY + 10
    return replace(person, hourly=person.hourly * 15) if mad else person


def unit_cost_of_small(database: Database, query: UsageQuery) -> float:
    rows = report(database, replace(query, by=("model",)), SETTINGS.prices())["data"]
    (row,) = [row for row in rows if row["model"] == "small"]
    return float(row["cost_nanousd"] / (row["prompt_tokens"] + row["output_tokens"]))


def day_of(day: int, days: int = 1) -> UsageQuery:
    begun_s = START_S + day * DAY_S
    return UsageQuery((), begun_s, begun_s + days * DAY_S)


def test_a_runaway_agent_is_found_and_named(sqlite: Database) -> None:
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
    replace(MONTH, change=run_away).write_sums(sqlite)
    found = insight(sqlite, "anomalies", UsageQuery(), CostSettings())
    assert found["unit"] == "engine seconds"
    assert [each["subject"] for each in found["data"]] == ["acme/bob"]


def test_one_hour_without_a_price_leaves_the_rest_in_dollars_and_hides_nothing(
    sqlite: Database,
) -> None:
    replace(MONTH, change=run_away).write_sums(sqlite)
    unpriced = (START_S + (LAST_DAY + 12) * HOUR_S, START_S + 40 * HOUR_S)
    with sqlite.transaction() as connection:
        for hour in unpriced:
            connection.execute(
                update(REPLICA_HOUR)
                .where(REPLICA_HOUR.c.hour == hour, REPLICA_HOUR.c.pool == "small")
                .values(instance="unlisted")
            )
    report = ask(sqlite, "anomalies")
    assert report["unit"] == "USD"
    found = {(each["subject"], each["unit"]): each for each in report["data"]}
    assert set(found) == {("acme/bob", "USD"), ("acme/bob", "engine seconds")}
    assert found["acme/bob", "engine seconds"]["times"] == 1
    assert found["acme/bob", "engine seconds"]["at"] == "2026-01-30T12:00:00Z"


@pytest.mark.slow
def test_a_runaway_that_starts_from_nothing_is_found_and_a_newcomer_is_none(
    sqlite: Database,
) -> None:
    def arrive(person: Person, hour: int) -> Person:
        there = {
            "new": hour >= LAST_DAY + 3,
            "agent": hour >= LAST_DAY + 10,
            "weekly": hour % 168 == 30,
        }
        return person if there.get(person.user, True) else replace(person, hourly=0)

    people = (
        *MONTH.people,
        Person("acme", "new", "small", 400),
        Person("bolt", "weekly", "small", 600),
        Person("bolt", "agent", "large", 180, engine_ms=9000),
    )
    replace(MONTH, people=people, change=arrive).write_sums(sqlite)
    (found,) = ask(sqlite, "anomalies")["data"]
    assert (found["kind"], found["subject"]) == ("spending_from_nothing", "bolt/agent")
    assert found["first_at"] == "2026-01-30T10:00:00Z"
    # Before it came there was nothing, with a newcomer and one who comes once a week.
    before = UsageQuery((), START_S + 10 * DAY_S, START_S + (LAST_DAY + 10) * HOUR_S)
    assert ask(sqlite, "anomalies", before)["data"] == []


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


def test_hours_without_a_price_are_in_no_unit_cost(database: Database) -> None:
    prices = PriceStore(database)
    prices.replace([], "none")
    town = replace(MONTH, hours=4, people=tuple(replace(p, hourly=20) for p in MONTH.people))
    records = [
        structs.replace(each, first_token_s=0.5) if hasattr(each, "witness") else each
        for each in town.records()
    ]
    UsageLedger(database, prices).commit(records)
    bills = CostSettings.model_validate({"instances": {"large": {"usd_per_hour": 10}}})
    whole = ask(database, "economics")["data"][1]
    nothing = insight(database, "economics", UsageQuery(), bills)["data"][1]
    units = [name for name in nothing if name.startswith("usd_per_")]
    assert len(units) == 8
    assert all(whole[name] for name in units)
    assert {nothing[name] for name in units} == {None}
    assert (nothing["unpriced_ratio"], nothing["slo_ratio"]) == (1, whole["slo_ratio"])
    with database.transaction() as connection:
        for hour, count in ((0, 3), (1, 3), (2, 2)):
            nodes = [NodeBill(f"gpu-small-{n}", 2_500_000_000, Fraction(1)) for n in range(count)]
            write_bills(connection, START_S + hour * HOUR_S, nodes, 0.0)
    partly = insight(database, "economics", UsageQuery(), bills)["data"][1]
    first = UsageQuery((), START_S, START_S + 2 * HOUR_S)
    priced = ask(database, "economics", first)["data"][1]
    assert {name: partly[name] for name in units} == {name: priced[name] for name in units}
    assert partly["requests"] == whole["requests"]
    assert partly["unpriced_ratio"] == pytest.approx(4 / 12)


def test_days_say_how_much_of_them_has_no_price(database: Database) -> None:
    prices = PriceStore(database)
    prices.replace([], "none")
    UsageLedger(database, prices).commit(list(replace(MONTH, hours=2, people=()).records()))
    (day,) = ask(database, "spending")["data"]
    assert day["unpriced_s"] == "0"
    large = CostSettings.model_validate({"instances": {"large": {"usd_per_hour": 10}}})
    (day,) = insight(database, "spending", UsageQuery(), large)["data"]
    assert (day["unpriced_s"], day["overheads_usd"]["idle"]) == (f"{2 * 3 * HOUR_S}", "20")


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


def test_savings_go_by_the_hours_that_have_a_price(database: Database) -> None:
    prices = PriceStore(database)
    prices.replace([], "none")
    people = (
        Person("acme", "ann", "small", 40, prompt=800, output=150, engine_ms=300),
        Person("coil", "", "large", 15, prompt=700, engine_ms=6000),
    )
    town = Town(people, {"small": 1, "large": 1}, hours=6)
    UsageLedger(database, prices).commit(list(town.records()))

    def saved(query: UsageQuery) -> dict[str, Any]:
        found = insight(database, "savings", query, SETTINGS)["data"]
        (one,) = [each for each in found if each["kind"] == "cheaper_model"]
        return dict(one)

    known = saved(UsageQuery((), START_S, START_S + 4 * HOUR_S))
    with database.transaction() as connection:
        connection.execute(
            update(REPLICA_HOUR)
            .where(REPLICA_HOUR.c.hour >= START_S + 4 * HOUR_S)
            .values(instance="unlisted")
        )
    partly = saved(UsageQuery())
    # The same dollars, of six hours and not of four.
    assert Fraction(partly["saving_usd_per_month"]) == pytest.approx(
        Fraction(known["saving_usd_per_month"]) * 4 / 6, rel=1e-9
    )
    assert "33.3% of large's time and 33.3% of small's time, which has no price" in partly["why"]
    assert "no price" not in known["why"]


@pytest.mark.parametrize("name", INSIGHTS)
def test_an_empty_ledger_has_nothing_to_say(database: Database, name: str) -> None:
    found = ask(database, name)
    assert found.get("data", found.get("nodes")) == []
