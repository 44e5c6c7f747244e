"""Who bears idle time, in the report: a column of its own, and nobody's cost changes by it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from serve_app.config_costs import CostSettings
from serve_app.core.pricing import nanousd
from serve_app.core.true_cost import Overhead
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.usage import UsageLedger
from serve_app.usage_report import to_csv, to_table, usage_query
from tests.cost_records import Person, Town

TOWN = Town(
    (
        Person("acme", "ann", "small", 40),
        Person("acme", "bob", "large", 10, engine_ms=3000),
        Person("bolt", "", "small", 25, prompt=8000),
    ),
    {"small": 2, "large": 1},
    hours=3,
)
PRICES = {"small": {"usd_per_hour": 2.5}, "large": {"usd_per_hour": 9.81}}
RULES = {
    "unallocated": {},
    "by use": {"small": {"policy": "by_use"}, "large": {"policy": "by_use"}},
    "one of each": {
        "small": {"policy": "by_use"},
        "large": {"policy": "by_reservation", "reserved": {"corp": 3, "acme": 1}},
    },
}


@pytest.fixture
def town(database: Database) -> Database:
    prices = PriceStore(database)
    prices.replace([], "none")
    ledger = UsageLedger(database, prices)
    ledger.commit(list(TOWN.records()))
    return database


def found(database: Database, rules: str, by: str = "tenant") -> dict:
    settings = CostSettings.model_validate({"instances": PRICES, "idle": RULES[rules]})
    return report(database, usage_query(by, None, None), settings.prices(), settings.idle_rules())


def borne(made: dict) -> dict[str, int]:
    return {row["tenant"]: row["idle_cost_nanousd"] for row in made["data"]}


def overhead(made: dict, what: str) -> int:
    return int(next(row["cost_nanousd"] for row in made["overheads"] if row["what"] == what))


@pytest.mark.parametrize("rules", RULES)
def test_what_tenants_bear_and_what_nobody_does_is_the_idle_time(
    town: Database, rules: str
) -> None:
    made = found(town, rules)
    borne = sum(row["idle_cost_nanousd"] for row in made["data"])
    assert borne + made["idle"]["unallocated_nanousd"] == overhead(made, Overhead.IDLE) > 0
    assert borne == sum(row["idle_cost_nanousd"] for row in made["idle"]["tenants"])
    assert (borne == 0) == (rules == "unallocated")
    # It is a column of its own: no cost and no sum has it.
    plain = found(town, "unallocated")
    for key in ("total", "overheads", "fleet"):
        assert made[key] == plain[key]
    costs = {row["tenant"]: row["cost_usd"] for row in made["data"]}
    assert {name: costs[name] for name in ("acme", "bolt")} == {
        row["tenant"]: row["cost_usd"] for row in plain["data"]
    }


def test_each_pool_goes_by_its_own_rule(town: Database) -> None:
    by_pool = {
        row["tenant"]: row["idle_cost_nanousd"] for row in found(town, "one of each")["data"]
    }
    by_use = {row["tenant"]: row["idle_cost_nanousd"] for row in found(town, "by use")["data"]}
    # Only acme uses the large pool, and corp, which asks nothing, reserved three parts of it.
    assert by_use["bolt"] == by_pool["bolt"]
    large = by_pool["corp"] * 4 // 3
    assert by_use["acme"] - by_pool["acme"] == pytest.approx(large * 3 // 4, abs=2)
    assert "corp" not in by_use
    assert by_use["acme"] > by_use["bolt"] > 0


def test_the_table_and_the_csv_have_the_column_by_tenant_and_no_other_report_has(
    town: Database,
) -> None:
    made = found(town, "one of each")
    header, rows = to_table(made)
    assert header[-1] == "IDLE USD"
    assert {len(row) for row in rows} == {len(header)}
    cells = {row[0]: row[-1] for row in rows}
    assert cells["corp"] != "0.000000"
    assert cells["(idle)"] == "0.000000"
    assert to_csv(made).splitlines()[0].endswith(",idle_cost_usd")
    assert "IDLE USD" not in to_table(found(town, "unallocated"))[0]
    other = found(town, "one of each", "model")
    assert "IDLE USD" not in to_table(other)[0]
    assert "idle_cost_usd" not in to_csv(other)
    assert nanousd(other["idle"]["unallocated_usd"]) == other["idle"]["unallocated_nanousd"]


@pytest.mark.parametrize(
    "rule",
    [
        {"policy": "by_reservation"},
        {"policy": "by_use", "reserved": {"acme": 1}},
        {"policy": "by_reservation", "reserved": {"acme": 0}},
        {"policy": "evenly"},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule: dict) -> None:
    with pytest.raises(ValidationError):
        CostSettings.model_validate({"idle": {"small": rule}})
