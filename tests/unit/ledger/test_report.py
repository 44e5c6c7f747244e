"""Reports: the sums asked for, of the hours asked for, adding up to the total."""

from __future__ import annotations

import pytest

from serve_app.core.pricing import RateCard, Rates, nanousd
from serve_app.core.types import PriorityClass
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.usage import UsageLedger
from serve_app.usage import Witness
from serve_app.usage_report import BY, UsageQuery, to_csv, to_table, usage_query
from tests.usage_records import HOUR_S, START_S, charge, record, traffic


@pytest.fixture
def ledger(database: Database) -> UsageLedger:
    prices = PriceStore(database)
    prices.replace([RateCard("any", Rates(10, 1, 100, 7))], "test")
    return UsageLedger(database, prices)


def test_an_empty_ledger_has_an_empty_report(database: Database) -> None:
    found = report(database, usage_query("tenant,model", None, None))
    assert found["data"] == []
    assert found["total"]["amount_usd"] == "0"
    assert report(database, UsageQuery())["data"] == []


def test_a_row_says_what_was_used_and_what_it_cost(ledger: UsageLedger, database: Database) -> None:
    left = charge(1, price_version=1, user="ann", priority_class=PriorityClass.SHEDDABLE, tag="t1")
    ledger.commit(
        [
            record(charge(price_version=1)),
            record(left, outcome="cancelled", output_tokens=5),
            record(left, Witness.ENGINE, outcome="cancelled", output_tokens=9),
        ]
    )
    found = report(database, usage_query("class,user,tag", None, None))
    assert [(row["class"], row["user"], row["tag"]) for row in found["data"]] == [
        ("standard", "", ""),
        ("sheddable", "ann", "t1"),
    ]
    assert found["data"][1] == {
        "class": "sheddable",
        "user": "ann",
        "tag": "t1",
        "requests": 1,
        "billed_requests": 1,
        "prompt_tokens": 20,
        "cached_prompt_tokens": 8,
        "output_tokens": 9,
        "delivered_tokens": 5,
        "generated_tokens": 9,
        "wasted_tokens": 4,
        "wasted_usd": "0.0000004",
        "amount_usd": "0.000001035",
        "amount_nanousd": 1035,
        "engine_s": "0",
        "cost_usd": "0",
        "cost_nanousd": 0,
        "wasted_cost_usd": "0",
        "unpriced_s": "0",
        "provisional_s": "0",
        "kv_block_s": "0",
    }
    assert (found["currency"], found["by"]) == ("USD", ["class", "user", "tag"])


@pytest.mark.parametrize("by", [*BY, "tenant,model,class", ""])
def test_rows_add_up_to_the_total_however_they_are_grouped(
    ledger: UsageLedger, database: Database, by: str
) -> None:
    ledger.commit(list(traffic(300, price_version=1)))
    found = report(database, usage_query(by, None, None))
    whole = report(database, UsageQuery())
    assert found["total"] == whole["total"]
    assert whole["total"]["requests"] == 300
    if by:
        assert len(found["data"]) > 1
        for field in ("amount_nanousd", "requests", "output_tokens"):
            assert sum(row[field] for row in found["data"]) == found["total"][field]
        amounts = [nanousd(row["amount_usd"]) for row in found["data"]]
        assert amounts == [row["amount_nanousd"] for row in found["data"]]


def test_a_report_covers_the_first_hour_and_not_the_last(
    ledger: UsageLedger, database: Database
) -> None:
    for hour in range(4):
        ledger.commit([record(charge(hour, START_S + hour * HOUR_S + 3599))])
    query = usage_query("hour", "2026-01-01T01:00Z", "2026-01-01T03:00+00:00")
    found = report(database, query)
    hours = [row["hour"] for row in found["data"]]
    assert hours == ["2026-01-01T01:00:00Z", "2026-01-01T02:00:00Z"]
    assert (found["from"], found["to"]) == ("2026-01-01T01:00:00Z", "2026-01-01T03:00:00Z")
    # A date is its first hour, UTC; so is a time without a zone.
    assert usage_query("", "2026-01-01", None).from_s == START_S
    assert usage_query("", "2026-01-01T00:00", None).from_s == START_S
    assert usage_query("", "2026-01-01T02:00+02:00", None).from_s == START_S


def test_a_table_and_csv_have_a_line_for_each_row(ledger: UsageLedger, database: Database) -> None:
    odd = charge(tenant='a,"b"', price_version=1)
    ledger.commit([record(odd), record(charge(1, price_version=1))])
    found = report(database, usage_query("tenant,user", None, None))
    lines = to_csv(found).splitlines()
    assert lines[0].startswith("tenant,user,requests,billed_requests,")
    assert lines[1].startswith('"a,""b""",,1,1,20,8,5,5,0,0,0,')
    assert len(lines) == 3
    header, rows = to_table(found)
    assert header == ["TENANT", "USER", "REQUESTS", "INPUT", "OUTPUT", "WASTED", "USD"]
    assert rows[-1] == ["TOTAL", "", "2", "40", "10", "0", "0.00000127"]
    assert all(len(row) == len(header) for row in rows)
    bare, total = to_table(report(database, UsageQuery()))
    assert (len(bare), total) == (5, [["2", "40", "10", "0", "0.00000127"]])
