"""True cost in the ledger: engines' time by request and by replica, and what it comes to."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import msgspec
import pytest
from sqlalchemy import text

from serve_app.config_costs import CostSettings
from serve_app.core.attribution import Use
from serve_app.core.pricing import nanousd
from serve_app.core.reconciliation import NodeBill, Rate
from serve_app.core.true_cost import InstancePrice, Overhead
from serve_app.core.types import TenantId
from serve_app.ledger.costs import read_bills, write_bills
from serve_app.ledger.database import Database
from serve_app.ledger.insights import insight
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.schema import LEDGER_VERSION
from serve_app.ledger.usage import UsageLedger
from serve_app.ledger.verify import verify
from serve_app.usage import Witness, decode, encode
from serve_app.usage_report import BY, UsageQuery, to_csv, to_table, usage_query
from tests.cost_records import HOUR_NS, Person, Town, period
from tests.usage_records import HOUR_S, START_S, charge, record

PRICES = {
    "small": InstancePrice((Rate(0, nanousd("2.5")),)),
    # Cheaper from the middle of the second hour on.
    "large": InstancePrice((Rate(0, nanousd("9.81")), Rate((START_S + 5400) * 10**9, 7_777_777))),
}
TOWN = Town(
    (
        Person("acme", "ann", "small", 40),
        Person("acme", "bob", "large", 10, engine_ms=3000),
        Person("bolt", "", "small", 25, prompt=8000),
    ),
    {"small": 2, "large": 1},
    hours=3,
)


@pytest.fixture
def ledger(database: Database) -> UsageLedger:
    prices = PriceStore(database)
    prices.replace([], "none")
    return UsageLedger(database, prices)


def nano(text_: str) -> int:
    return nanousd(text_) if not text_.startswith("-") else -nanousd(text_[1:])


@pytest.mark.parametrize("by", [*BY, "tenant,model,hour", ""])
def test_requests_idle_and_the_rest_are_the_replicas_seconds_at_their_price(
    ledger: UsageLedger, database: Database, by: str
) -> None:
    records = list(TOWN.records())
    random.Random(1).shuffle(records)
    for start in range(0, len(records), 50):
        ledger.commit(records[start : start + 50])
    found = report(database, usage_query(by, None, None), PRICES)
    rows, total = sum(row["cost_nanousd"] for row in found["data"]), found["total"]["cost_nanousd"]
    assert rows == (total if by else 0)
    over = {row["what"]: row["cost_nanousd"] for row in found["overheads"]}
    assert total + sum(over.values()) == found["fleet"]["cost_nanousd"]
    small = 2 * 3 * nanousd("2.5")
    large = (5400 * nanousd("9.81") + 5400 * 7_777_777) // 3600
    assert found["fleet"]["cost_nanousd"] == small + large
    assert found["fleet"]["time_s"] == str(9 * HOUR_S)
    assert found["fleet"]["unpriced_s"] == "0"
    assert over[Overhead.IDLE] > 0
    assert over[Overhead.CUT_OFF] == 0
    assert 0 < nano(found["total"]["wasted_cost_usd"]) < total
    assert verify(database).lines == []


def test_what_comes_twice_or_late_is_counted_once(ledger: UsageLedger, database: Database) -> None:
    records = list(TOWN.records())
    ledger.commit(records)
    again = ledger.commit([decode(encode(each)) for each in records])
    assert (again.new, again.known) == (0, len(records))
    before = report(database, UsageQuery(("tenant",)), PRICES)
    ledger.rebuild()
    assert report(database, UsageQuery(("tenant",)), PRICES) == before
    assert verify(database).lines == []


def test_a_derived_row_that_was_changed_is_found_and_made_anew(
    ledger: UsageLedger, database: Database
) -> None:
    ledger.commit(list(TOWN.records()))
    with database.change(LEDGER_VERSION) as connection:
        connection.execute(text("UPDATE engine_time SET engine_ns = engine_ns + 1"))
        connection.execute(text("DELETE FROM replica_hour WHERE replica = 'large-0'"))
    lines = verify(database).lines
    assert any(line.startswith("engine_time") for line in lines)
    assert any("replica_hour" in line and "missing" in line for line in lines)
    ledger.rebuild()
    assert verify(database).lines == []


def test_only_the_engines_word_counts_and_a_correction_takes_no_time_back(
    ledger: UsageLedger, database: Database
) -> None:
    of = charge(price_version=1)
    both: list[Any] = [
        record(of, engine_ns=7 * 10**9),
        record(of, Witness.ENGINE, engine_ns=7 * 10**9, engine_hour=START_S, replica="r1"),
    ]
    uses = {Use.USEFUL.value: 7 * 10**9, Use.IDLE.value: HOUR_NS - 7 * 10**9}
    ledger.commit([*both, period(uses_ns=uses)])
    ledger.reverse(of.request_id, "a mistake")
    found = report(database, UsageQuery(("tenant",)), {"h100": InstancePrice((Rate(0, 3600),))})
    assert (found["total"]["engine_s"], found["total"]["cost_nanousd"]) == ("7", 7)
    assert verify(database).lines == []
    with database.transaction() as connection:
        row = connection.execute(text("SELECT * FROM usage_reconciliation")).one()
    assert (row.router_engine_ns, row.engine_ns) == (7 * 10**9, 7 * 10**9)


def test_a_request_counts_in_the_account_it_was_booked_on_not_when_it_came(
    ledger: UsageLedger, database: Database
) -> None:
    of = charge(1, START_S + HOUR_S - 1)
    late = record(of, Witness.ENGINE, engine_ns=5, engine_hour=START_S + HOUR_S, replica="r1")
    uses = {Use.USEFUL.value: 5, Use.IDLE.value: HOUR_NS - 5}
    ledger.commit([late, period(), period(2, START_S + HOUR_S, uses_ns=uses)])
    found = report(database, UsageQuery(("hour",)), {"h100": InstancePrice((Rate(0, 1),))})
    hours = [(row["hour"], row["requests"], row["engine_s"]) for row in found["data"]]
    assert hours == [
        ("2026-01-01T00:00:00Z", 1, "0"),
        ("2026-01-01T01:00:00Z", 0, "0.000000005"),
    ]
    assert {row["what"]: row["time_s"] for row in found["overheads"]}["cut_off"] == "0"


def test_what_requests_held_of_the_kv_cache_is_a_second_figure_by_tenant(
    ledger: UsageLedger, database: Database
) -> None:
    held_us = {"acme": (250_000, 4_000_000), "bolt": (1_500_000,)}
    records: list[Any] = []
    for tenant, each in held_us.items():
        for number, kv_block_us in enumerate(each):
            of = charge(len(records), START_S + number * HOUR_S, tenant=TenantId(tenant))
            said = {"engine_ns": 10**9, "replica": "r1", "kv_block_us": kv_block_us}
            hour = {"engine_hour": START_S + number * HOUR_S}
            records += [record(of, **said), record(of, Witness.ENGINE, **said, **hour)]
    # What an engine wrote before it said so: its requests are there, and held nothing known.
    old = record(charge(90), Witness.ENGINE, engine_ns=5, replica="r1")
    raw = msgspec.msgpack.decode(encode(old))
    assert "kv_block_us" not in raw
    records.append(decode(msgspec.msgpack.encode(raw)))
    uses = {Use.USEFUL.value: 2 * 10**9 + 5, Use.IDLE.value: HOUR_NS - 2 * 10**9 - 5}
    ledger.commit([*records, period(uses_ns=uses)])
    ledger.commit(records)
    prices = {"h100": InstancePrice((Rate(0, 3600 * 10**9),))}
    found = report(database, usage_query("tenant", None, None), prices)
    assert [row["kv_block_s"] for row in found["data"]] == ["4.25", "1.5"]
    assert found["total"]["kv_block_s"] == "5.75"
    hours = report(database, usage_query("hour,tenant", None, None), prices)
    assert [row["kv_block_s"] for row in hours["data"]] == ["0.25", "1.5", "4"]
    header, rows = to_table(found)
    place = header.index("KV BLOCK S")
    assert [row[place] for row in rows] == ["4.250", "1.500", "", "5.750"]
    assert {len(row) for row in rows} == {len(header)}
    lines = [line.split(",") for line in to_csv(found).splitlines()]
    assert [line[lines[0].index("kv_block_s")] for line in lines[:3]] == [
        *("kv_block_s", "4.25", "1.5")
    ]
    # No cost has it.
    assert [row["cost_nanousd"] for row in found["data"]] == [2 * 10**9 + 5, 10**9]
    ledger.reverse(charge(0).request_id, "a mistake")
    ledger.rebuild()
    again = report(database, usage_query("tenant", None, None), prices)
    assert [row["kv_block_s"] for row in again["data"]] == ["4.25", "1.5"]
    assert verify(database).lines == []
    with database.change(LEDGER_VERSION) as connection:
        connection.execute(text("UPDATE engine_time SET kv_block_us = kv_block_us + 1"))
    assert any(line.startswith("engine_time") for line in verify(database).lines)


def test_what_default_coefficients_split_is_marked_in_every_report(
    ledger: UsageLedger, database: Database
) -> None:
    uses = {Use.USEFUL.value: 8 * 10**9, Use.IDLE.value: HOUR_NS - 8 * 10**9}
    records: list[Any] = [
        record(charge(n), Witness.ENGINE, engine_ns=n * 10**9, engine_hour=START_S, replica="r1")
        for n in (2, 6)
    ]
    marked = period(uses_ns=uses, provisional_ns=4 * 10**9)
    ledger.commit([*records, marked, period(2, START_S + HOUR_S)])
    found = report(database, usage_query("hour", None, None), {})
    assert (found["total"]["provisional_s"], found["fleet"]["provisional_s"]) == ("4", "4")
    assert {row["what"] for row in found["overheads"] if row["provisional_s"] != "0"} == set()
    header, rows = to_table(found)
    assert (header[-1], rows[0][-1], rows[-1][-1]) == ("PROVISIONAL S", "4.000", "4.000")
    assert {len(row) for row in rows} == {len(header)}
    assert to_csv(found).splitlines()[1].endswith(",8,4,0,0,0,")
    (pool,) = insight(database, "economics", UsageQuery(), CostSettings())["data"]
    assert (pool["provisional_s"], pool["provisional_ratio"]) == ("4", 0.5)
    ledger.rebuild()
    assert report(database, usage_query("hour", None, None), {}) == found
    assert verify(database).lines == []


def test_a_period_from_before_there_was_the_mark_has_none(
    ledger: UsageLedger, database: Database
) -> None:
    raw = msgspec.msgpack.decode(encode(period())[1:])
    assert "provisional_ns" not in raw
    ledger.commit([decode(b"P" + msgspec.msgpack.encode(raw))])
    found = report(database, UsageQuery(("tenant",)), {})
    assert found["fleet"]["provisional_s"] == "0"
    assert "PROVISIONAL S" not in to_table(found)[0]


def test_time_without_a_price_is_said_and_not_free(ledger: UsageLedger, database: Database) -> None:
    ledger.commit(list(TOWN.records()))
    found = report(database, UsageQuery(("model",)), {"small": PRICES["small"]})
    large, small = found["data"]
    assert (large["cost_usd"], large["unpriced_s"]) == ("0", large["engine_s"])
    assert small["unpriced_s"] == "0"
    assert found["fleet"]["unpriced_s"] == str(3 * HOUR_S)
    header, rows = to_table(found)
    assert header[-4:] == ["ENGINE S", "COST USD", "IDLE USD", "FULL USD"]
    assert rows[0][-1] == rows[0][-3] == "no price"
    assert rows[-1][-1] == "15.000000+"
    assert [row[0] for row in rows[2:]] == ["(idle)", "TOTAL"]
    assert (
        to_csv(found)
        .splitlines()[0]
        .endswith(
            "engine_s,cost_usd,wasted_cost_usd,unpriced_s,provisional_s,kv_block_s,"
            "idle_cost_usd,full_cost_usd,overhead"
        )
    )


def test_a_replica_without_any_account_is_proved_by_its_requests(
    ledger: UsageLedger, database: Database
) -> None:
    ledger.commit([record(charge(), Witness.ENGINE, engine_ns=11, replica="gone")])
    found = report(database, UsageQuery(("tenant",)), PRICES)
    assert (found["fleet"]["time_s"], found["fleet"]["unpriced_s"]) == ("0.000000011",) * 2


def test_an_hour_that_has_just_begun_costs_what_the_last_one_did(
    ledger: UsageLedger, database: Database
) -> None:
    begun = charge(at_s=START_S + HOUR_S + 1.0)
    ledger.commit(
        [period(instance="small"), record(begun, Witness.ENGINE, engine_ns=3600, replica="r1")]
    )
    found = report(database, UsageQuery(("tenant",), from_s=START_S + HOUR_S), PRICES)
    (row,) = found["data"]
    assert (row["cost_nanousd"], row["unpriced_s"]) == (2, "0")
    assert found["fleet"]["cost_nanousd"] == 2


def test_bills_are_kept_by_hour_and_replaced_by_a_later_reading(database: Database) -> None:
    query = UsageQuery((), START_S, START_S + HOUR_S)
    with database.transaction() as connection:
        write_bills(connection, START_S, [NodeBill("a", 5), NodeBill("b", None)], 1.0)
        write_bills(connection, START_S, [NodeBill("a", 7), NodeBill("a", 2)], 2.0)
        write_bills(connection, START_S + HOUR_S, [NodeBill("a", 1)], 2.0)
        assert read_bills(connection, query) == {
            (START_S, "a"): NodeBill("a", 9),
            (START_S, "b"): NodeBill("b", None),
        }


def test_a_later_reading_that_says_nothing_destroys_no_bill(database: Database) -> None:
    query = UsageQuery((), START_S, START_S + HOUR_S)
    good = [NodeBill(name, 5, Fraction(1)) for name in "abc"]
    with database.transaction() as connection:
        write_bills(connection, START_S, good, 1.0)
        write_bills(connection, START_S, [], 2.0)
        # Half of the hours beside no amount would be half a bill at twice the price.
        later = [NodeBill("a", None, Fraction(1, 2)), NodeBill("b", 6)]
        write_bills(connection, START_S, later, 3.0)
        assert read_bills(connection, query) == {
            (START_S, "a"): good[0],
            (START_S, "b"): NodeBill("b", 6, Fraction(1)),
            (START_S, "c"): good[2],
        }
