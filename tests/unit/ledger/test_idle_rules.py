"""Who bears idle time, in the report: a column of its own, and nobody's cost changes by it."""

from __future__ import annotations

import csv
import io

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


BILL = 3 * (2 * nanousd("2.5") + nanousd("9.81"))


def csv_sums(text: str) -> dict[str, int]:
    """Return the sums of a CSV's dollars, rows of what is beside requests included."""
    rows = list(csv.DictReader(io.StringIO(text)))
    assert any(row["overhead"] == "idle" for row in rows)
    names = [name for name in rows[0] if name.endswith("cost_usd") and "wasted" not in name]
    return {name: sum(nanousd(row[name]) for row in rows) for name in names}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "by", ["tenant", "tenant,model", "model,tenant,hour", "hour", "model", "hour,tenant"]
)
def test_idle_is_a_column_wherever_tenants_can_bear_it_and_all_of_it_is_the_bill(
    town: Database, rules: str, by: str
) -> None:
    made = found(town, rules, by)
    idle = overhead(made, Overhead.IDLE)
    rows = sum(row["full_cost_nanousd"] for row in made["data"])
    borne = sum(row["idle_cost_nanousd"] for row in made["data"])
    assert borne + made["idle"]["unallocated_nanousd"] == idle > 0
    assert borne == sum(row["idle_cost_nanousd"] for row in made["idle"]["tenants"])
    rest = sum(row["cost_nanousd"] for row in made["overheads"]) - idle
    assert rows + rest + made["idle"]["unallocated_nanousd"] == BILL
    assert made["fleet"]["cost_nanousd"] == BILL
    header, lines = to_table(made)
    assert {len(row) for row in lines} == {len(header)}
    place = header.index("IDLE USD")
    assert header[place - 1 : place + 2] == ["COST USD", "IDLE USD", "FULL USD"]
    cells = {row[0]: row[place - 1 : place + 2] for row in lines}
    assert cells["(idle)"][0] == "0.000000"
    assert cells["TOTAL"][2] == "44.430000"
    assert [nanousd(cell) for cell in cells["TOTAL"]] == pytest.approx(
        [BILL - idle, idle, BILL], abs=1000
    )
    sums = csv_sums(to_csv(made))
    assert sums == {
        "cost_usd": BILL - idle,
        "idle_cost_usd": idle,
        "full_cost_usd": BILL,
    }


@pytest.mark.parametrize("by", ["user", "key", "tenant,user", "class", "tag", ""])
def test_idle_is_a_row_where_a_rule_says_nothing_and_all_of_it_is_the_bill(
    town: Database, by: str
) -> None:
    made = found(town, "one of each", by)
    header, rows = to_table(made)
    assert "IDLE USD" not in header
    assert rows[-1][header.index("COST USD")] == "44.430000"
    if by:
        assert "(idle)" in [row[0] for row in rows]
    assert csv_sums(to_csv(made)) == {"cost_usd": BILL}
    # Who bears it is said all the same.
    borne = sum(row["idle_cost_nanousd"] for row in made["idle"]["tenants"])
    assert borne + made["idle"]["unallocated_nanousd"] == overhead(made, Overhead.IDLE)


def test_a_tenants_idle_time_goes_with_its_models_and_with_the_hours_that_were_idle(
    town: Database,
) -> None:
    whole = {row["tenant"]: row["idle_cost_nanousd"] for row in found(town, "one of each")["data"]}
    made = found(town, "one of each", "tenant,model")
    by_model = {(row["tenant"], row["model"]): row["idle_cost_nanousd"] for row in made["data"]}
    assert by_model["corp", ""] == pytest.approx(whole["corp"], abs=9)
    # Each pool serves one model here: a tenant's part of the pool is its part of the model.
    assert by_model["bolt", "small"] == pytest.approx(whole["bolt"], abs=9)
    large = by_model["acme", "large"]
    assert large == pytest.approx(whole["corp"] / 3, abs=9)
    assert by_model["acme", "small"] == pytest.approx(whole["acme"] - large, abs=18)
    hours = found(town, "by use", "hour")["data"]
    plain = [found(town, "unallocated", "hour")["data"], hours]
    assert [row["cost_usd"] for row in plain[0]] == [row["cost_usd"] for row in plain[1]]
    # All is borne: each hour has the idle time that it had.
    prices = 2 * nanousd("2.5") + nanousd("9.81")
    assert [row["full_cost_nanousd"] for row in hours] == pytest.approx([prices] * 3, abs=9)


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
