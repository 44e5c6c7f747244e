"""Bills read from a live OpenCost, compared and told; and what its absence changes: nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from serve_app.bill_reader import BillReader
from serve_app.config_costs import CostSettings
from serve_app.core.reconciliation import Finding, NodeBill, bills_by_node
from serve_app.ledger.costs import read_bills
from serve_app.ledger.database import Database
from serve_app.ledger.insights import insight
from serve_app.ledger.opencost import OpenCost, OpenCostUnavailable
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.usage import UsageLedger
from serve_app.telemetry.bill_metrics import BillMetrics
from serve_app.usage_report import UsageQuery
from tests.cost_records import Person, Town, period
from tests.usage_records import HOUR_S, START_S

pytestmark = pytest.mark.slow

ANSWERS = Path(__file__).parent / "ledger" / "opencost_answers"
HOURS = 24
END_S = START_S + HOURS * HOUR_S
TOWN = Town((Person("acme", "ann", "small", 20),), {"small": 2}, hours=HOURS)
PRICE = {"instances": {"small": {"usd_per_hour": 2.5}}}

Answer = Callable[[str], tuple[int, str]]


class FakeOpenCost:
    """A server that answers each query as it is told, or never."""

    def __init__(self) -> None:
        self.answer: Answer | None = None
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        target = head.split()[1].decode()
        self.asked.append(target)
        self.was_asked.set()
        if self.answer is None:
            await reader.read()
            writer.close()
            return
        status, body = self.answer(target)
        writer.write(f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n".encode())
        writer.write(b"connection: close\r\n\r\n" + body.encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def opencost() -> AsyncIterator[FakeOpenCost]:
    fake = FakeOpenCost()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield fake
    server.close()
    await server.wait_closed()


@pytest.fixture
def database(tmp_path: Path) -> Database:
    database = Database(f"sqlite:///{tmp_path}/bills.db")
    prices = PriceStore(database)
    prices.replace([], "none")
    UsageLedger(database, prices).commit(list(TOWN.records()))
    return database


def settings(url: str, **fields: Any) -> CostSettings:
    opencost = {"url": url, "timeout_s": 300, "look_back_hours": HOURS, **fields}
    return CostSettings.model_validate({**PRICE, "opencost": opencost})


def reader(database: Database, costs: CostSettings) -> tuple[BillReader, CollectorRegistry]:
    assert costs.opencost is not None
    registry = CollectorRegistry()
    bills = OpenCost(costs.opencost.url, timeout_s=costs.opencost.timeout_s)
    return BillReader(bills, database, costs, BillMetrics(registry), lambda: END_S + 60), registry


def bills(totals: dict[str, object], gpu_hours: object = 1.0) -> str:
    nodes = {
        f"c/Node/Kubernetes/{name}": {
            "type": "Node",
            "properties": {"name": name},
            "GPUHours": gpu_hours,
            "totalCost": total,
        }
        for name, total in totals.items()
    }
    return json.dumps({"code": 200, "data": [nodes]})


def both(total: object = 2.5) -> Answer:
    return lambda _: (200, bills({"gpu-small-0": total, "gpu-small-1": 2.5}))


async def test_bills_that_agree_raise_no_alarm(opencost: FakeOpenCost, database: Database) -> None:
    opencost.answer = both()
    bill_reader, registry = reader(database, settings(opencost.url))
    found = await bill_reader.read()
    assert [each.finding for each in found.nodes] == [Finding.AGREES] * 2
    assert registry.get_sample_value("headrace_cost_gap_ratio") == 0
    assert registry.get_sample_value("headrace_cost_gap_alert") == 0
    assert registry.get_sample_value("headrace_cost_nodes", {"finding": "agrees"}) == 2
    assert len(opencost.asked) == HOURS
    # Hours that may still change are asked for again, and those that are settled are not.
    await bill_reader.read()
    assert len(opencost.asked) == HOURS + 6
    await bill_reader.stop()


async def test_an_injected_gap_of_three_percent_is_found_named_and_alerted(
    opencost: FakeOpenCost, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "window=2026-01-01T09%3A00%3A00Z"
    opencost.answer = lambda target: both(2.577319588 if wrong in target else 2.5)(target)
    bill_reader, registry = reader(database, settings(opencost.url))
    with caplog.at_level(logging.WARNING, "headrace.bills"):
        await bill_reader.read()
    assert "node gpu-small-0 and its bill disagree in the hour 2026-01-01T09:00:00Z" in caplog.text
    assert registry.get_sample_value("headrace_cost_gap_alert") == 1
    told = insight(database, "reconciliation", UsageQuery(), settings(opencost.url))
    (hour,) = told["alerts"]
    assert hour["hour"] == "2026-01-01T09:00:00Z"
    assert [(each["node"], each["finding"]) for each in hour["nodes"]] == [("gpu-small-0", "gap")]
    assert hour["nodes"][0]["gap_ratio"] == pytest.approx(0.03)
    assert told["alert"]
    caplog.clear()
    await bill_reader.read()
    assert "disagree" not in caplog.text
    await bill_reader.stop()


@pytest.mark.parametrize(
    ("answer", "finding"),
    [
        (both(None), Finding.NO_BILL),
        (both("NaN"), Finding.NO_BILL),
        (lambda _: (200, bills({"gpu-small-1": 2.5})), Finding.NO_BILL),
        (both(0), Finding.FREE),
        (both(2.6), Finding.GAP),
        (lambda _: (200, bills({"gpu-small-0": 2.5}, gpu_hours=0)), Finding.NO_GPU),
    ],
    ids=["null", "NaN", "missing", "zero", "a gap", "no GPU"],
)
async def test_nonsense_is_named_and_changes_no_cost(
    opencost: FakeOpenCost, database: Database, answer: Answer, finding: Finding
) -> None:
    before = report(database, UsageQuery(("tenant",)), settings("http://x").prices())
    opencost.answer = answer
    bill_reader, _ = reader(database, settings(opencost.url))
    found = await bill_reader.read()
    assert found.nodes[0].node == "gpu-small-0"
    assert found.nodes[0].finding is finding
    assert found.alert
    after = report(database, UsageQuery(("tenant",)), settings("http://x").prices())
    assert after == before
    await bill_reader.stop()


async def test_a_dead_opencost_is_said_once_and_asked_twice_a_period(
    opencost: FakeOpenCost, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    opencost.answer = lambda _: (503, "down")
    bill_reader, registry = reader(database, settings(opencost.url))
    with caplog.at_level(logging.WARNING, "headrace.bills"):
        await bill_reader.read()
        await bill_reader.read()
    assert caplog.text.count("OpenCost is away") == 1
    assert len(opencost.asked) == 4
    assert registry.get_sample_value("headrace_opencost_reads_total", {"outcome": "failed"}) == 4
    opencost.answer = both()
    await bill_reader.read()
    with database.transaction() as connection:
        assert len(read_bills(connection, UsageQuery())) == 2 * HOURS
    await bill_reader.stop()


async def test_an_hour_that_opencost_has_lost_holds_up_no_other(
    opencost: FakeOpenCost, database: Database
) -> None:
    lost = "window=2026-01-01T09%3A00%3A00Z"
    opencost.answer = lambda target: (500, "no data") if lost in target else both()(target)
    bill_reader, _ = reader(database, settings(opencost.url))
    await bill_reader.read()
    with database.transaction() as connection:
        assert len(read_bills(connection, UsageQuery())) == 2 * (HOURS - 1)
    await bill_reader.stop()


async def test_while_an_answer_does_not_come_everything_else_goes_on(
    opencost: FakeOpenCost, database: Database
) -> None:
    bill_reader, _ = reader(database, settings(opencost.url, timeout_s=300))
    bill_reader.start()
    await opencost.was_asked.wait()
    # The ledger takes records and answers while the reader waits for a server that is silent.
    ledger = UsageLedger(database, PriceStore(database))
    more = period(1, END_S, replica="later")
    assert (await asyncio.to_thread(ledger.commit, [more])).new == 1
    assert report(database, UsageQuery())["total"]["requests"] > 0
    await bill_reader.stop()


async def test_without_a_listed_price_the_bill_is_the_price(
    opencost: FakeOpenCost, database: Database
) -> None:
    opencost.answer = both(3)
    bill_reader, _ = reader(database, settings(opencost.url))
    await bill_reader.read()
    fleet = report(database, UsageQuery(), {})["fleet"]
    assert fleet["cost_nanousd"] == HOURS * 5_500_000_000
    assert fleet["unpriced_s"] == "0"
    await bill_reader.stop()


@pytest.mark.parametrize(
    "later",
    [
        lambda _: (200, json.dumps({"code": 200, "data": [{}]})),
        both(None),
        lambda _: (200, bills({"gpu-small-1": 2.5})),
        lambda _: (200, bills({"gpu-small-0": 3, "gpu-small-1": 2.5}, gpu_hours=None)),
    ],
    ids=["nothing", "null", "a node less", "no GPU-hours"],
)
async def test_nonsense_after_a_good_answer_leaves_the_bill_that_is_the_price(
    opencost: FakeOpenCost, database: Database, later: Answer
) -> None:
    opencost.answer = both(3)
    bill_reader, _ = reader(database, settings(opencost.url))
    await bill_reader.read()
    opencost.answer = later
    await bill_reader.read()
    assert len(opencost.asked) > HOURS
    fleet = report(database, UsageQuery(), {})["fleet"]
    assert (fleet["cost_nanousd"], fleet["unpriced_s"]) == (HOURS * 5_500_000_000, "0")
    await bill_reader.stop()


async def test_clocks_of_two_nodes_five_seconds_apart_raise_no_alarm(
    opencost: FakeOpenCost, tmp_path: Path
) -> None:
    database = Database(f"sqlite:///{tmp_path}/skewed.db")
    prices = PriceStore(database)
    prices.replace([], "none")
    skew_ns = 5 * 10**9
    accounts = []
    for hour in range(HOURS):
        right = period(hour + 1, START_S + hour * HOUR_S, node="gpu-small-0", instance="small")
        late = replace(right, node="gpu-small-1", replica="r2")
        # Its clock is ahead: it thinks that it began later, and its hours lie so.
        if hour == 0:
            late = replace(late, from_ns=late.from_ns + skew_ns, uses_ns={})
        accounts += [right, late]
    UsageLedger(database, prices).commit(accounts)
    opencost.answer = both()
    bill_reader, _ = reader(database, settings(opencost.url))
    found = await bill_reader.read()
    assert [each.finding for each in found.nodes] == [Finding.AGREES] * 2
    assert found.nodes[1].gap_ratio == pytest.approx(Fraction(5, HOURS * HOUR_S), rel=1e-3)
    assert not found.alert
    told = insight(database, "reconciliation", UsageQuery(), settings(opencost.url))
    assert (told["alert"], told["alerts"]) == (False, [])
    await bill_reader.stop()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("opencost_2023_assets.json", {"gpu-1": (2_578_350_000, 1)}),
        (
            "opencost_2024_assets.json",
            {
                "ip-10-0-0-1.ec2.internal": (38_712_350_000, 8),
                "ip-10-0-0-2.ec2.internal": (None, None),
                # 50 minutes of a node: GPUs that were held for the hour will show as a gap.
                "ip-10-0-0-3.ec2.internal": (670_000_000, Fraction(833_333, 10**6)),
            },
        ),
        ("kubecost_2023_assets.json", {"gpu-1": (2_578_350_000, 1), "gpu-2": (2_500_000_000, 0)}),
    ],
)
async def test_answers_of_several_versions_come_to_the_same_bills(
    opencost: FakeOpenCost, file: str, expected: dict[str, tuple[int | None, int | Fraction | None]]
) -> None:
    body = (ANSWERS / file).read_text()
    under_a_ui = "kubecost" in file
    opencost.answer = lambda target: (
        (404, "no") if under_a_ui and not target.startswith("/model/") else (200, body)
    )
    client = OpenCost(opencost.url, timeout_s=300)
    found = bills_by_node(await client.node_bills(START_S, START_S + HOUR_S))
    assert found == {
        name: NodeBill(name, total, None if hours is None else Fraction(hours))
        for name, (total, hours) in expected.items()
    }
    await client.close()


async def test_costs_of_workloads_are_not_taken_for_nodes_bills(opencost: FakeOpenCost) -> None:
    body = (ANSWERS / "opencost_2025_allocation.json").read_text()
    opencost.answer = lambda _: (200, body)
    client = OpenCost(opencost.url, timeout_s=300)
    with pytest.raises(OpenCostUnavailable, match="no assets"):
        await client.node_bills(START_S, START_S + HOUR_S)
    await client.close()
