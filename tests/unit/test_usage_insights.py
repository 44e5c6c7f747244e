"""`headrace usage` economics, anomalies, savings, reconcile, top and plot, as people see them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import text

from serve_app.cli import main
from serve_app.core.reconciliation import NodeBill
from serve_app.ledger.costs import write_bills
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.usage import UsageLedger
from tests.cost_records import Person, Town
from tests.usage_records import HOUR_S, START_S

pytestmark = pytest.mark.slow

TOWN = Town(
    (
        Person("acme", "ann", "small", 30, prompt=800, output=150, engine_ms=300),
        Person("bolt", "", "small", 20, prompt=6000, output=20, engine_ms=900),
        Person("coil", "cid", "large", 12, prompt=700, engine_ms=6000),
    ),
    {"small": 2, "large": 1},
    hours=5,
)
COSTS = {
    "instances": {"small": {"usd_per_hour": {"2025-01-01": 2.5}}, "large": {"usd_per_hour": 10}}
}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_URL", "HEADRACE_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


def configure(folder: Path, costs: dict[str, Any]) -> str:
    ours = {"route_prefix": None, "import_path": "serve_app.app:control"}
    router = {"name": "Router", "user_config": {"pools": {}}}
    gateway = {"route_prefix": "/", "import_path": "serve_app.app:gateway"}
    args = {"database": f"sqlite:///{folder}/books.db", "costs": costs}
    applications = [
        {"name": "control", **ours, "args": args},
        {"name": "gateway", **gateway, "deployments": [router]},
    ]
    file = folder / "some.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    return str(file)


@pytest.fixture
def config(tmp_path: Path) -> str:
    database = Database(f"sqlite:///{tmp_path}/books.db")
    prices = PriceStore(database)
    prices.replace([], "none")
    UsageLedger(database, prices).commit(list(TOWN.records()))
    bills = {"gpu-small-0": 2.5, "gpu-small-1": 2.5, "gpu-large-0": 10}
    with database.transaction() as connection:
        for hour in range(5):
            now = {**bills, "gpu-small-1": 2.6} if hour == 3 else bills
            nodes = [NodeBill(name, round(usd * 1e9), Fraction(1)) for name, usd in now.items()]
            write_bills(connection, START_S + hour * HOUR_S, nodes, 0.0)
    database.close()
    return configure(tmp_path, COSTS)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> tuple[str, str]:
    assert main(["usage", *arguments]) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_usage_shows_true_cost_beside_the_price(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, "--by", "tenant,model", "--config", config)
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][-6:] == ["COST", "USD", "IDLE", "USD", "FULL", "USD"]
    assert [line[0] for line in lines[1:]] == ["acme", "bolt", "coil", "(idle)", "TOTAL"]
    assert (lines[-1][-4], lines[-1][-1]) == ("54000.000", "75.000000")


def test_top_puts_the_dearest_first_and_as_many_as_asked(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, "top", "--by", "tenant", "-n", "2", "--config", config)
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["coil", "bolt"]
    out, _ = said(capsys, "top", "--sort", "tokens", "-n", "1", "--config", config)
    assert out.splitlines()[1].split()[0] == "bolt"


def test_economics_and_savings_are_tables_and_json(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = said(capsys, "economics", "--config", config)
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["large", "5.0"],
        ["small", "10.0"],
    ]
    out, _ = said(capsys, "savings", "--config", config)
    assert "smaller_pool" in out
    out, _ = said(capsys, "savings", "--format", "json", "--config", config)
    assert json.loads(out)["data"][0]["kind"] == "smaller_pool"


def test_what_has_no_price_is_not_shown_as_free(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Database(f"sqlite:///{tmp_path}/books.db").transaction() as connection:
        connection.execute(text("DELETE FROM node_bill WHERE node = 'gpu-large-0'"))
        connection.execute(
            text("DELETE FROM node_bill WHERE node = 'gpu-small-1' AND hour = :hour"),
            {"hour": START_S + 3 * HOUR_S},
        )
    config = configure(tmp_path, {})
    out, _ = said(capsys, "economics", "--config", config)
    large, small = out.splitlines()[1:]
    assert large.count("no price") == 7
    assert "no price" not in small
    assert small.split()[3].endswith("+")
    pytest.importorskip("matplotlib")
    _, err = said(capsys, "plot", "--out", f"{tmp_path}/spend.png", "--config", config)
    assert err == (
        "6.0 replica-hours have no price and are in no bar: 1 days, the first 2026-01-01\n"
    )


def test_a_ledger_without_anything_odd_says_so(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = said(capsys, "anomalies", "--config", config)
    assert err == "nothing was found\n"


def test_reconcile_names_the_node_and_the_hour_and_fails(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out, err = said(capsys, "reconcile", "--config", config, status=1)
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["gpu-large-0", "agrees"],
        ["gpu-small-0", "agrees"],
        ["gpu-small-1", "agrees"],
    ]
    assert "2026-01-01T03:00:00Z: gpu-small-1: gap 3.85%" in err
    assert "5 hours: the gap is 0.13%; alert above 1.00%" in err
    said(capsys, "reconcile", "--to", "2026-01-01T03:00Z", "--config", config)


def test_a_plot_is_a_picture(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "spend.png"
    out, _ = said(capsys, "plot", "--out", str(file), "--config", config)
    assert out == f"wrote {file}: 1 days\n"
    assert file.read_bytes().startswith(b"\x89PNG")
    _, err = said(capsys, "plot", "--out", f"{tmp_path}/no/x.png", "--config", config, status=1)
    assert "cannot be written" in err


def test_focus_rows_are_printed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = said(capsys, "--format", "focus-allocation", "--config", config)
    assert out.startswith("BilledCost,")
    assert len(out.splitlines()) > 20


@pytest.mark.parametrize(
    ("costs", "words"),
    [
        ({"instances": {"a": {"usd_per_hour": -1}}}, "costs.instances.a.usd_per_hour"),
        ({"instances": {"a": {"usd_per_hour": {"soon": 1}}}}, "write 2026-01-31"),
        ({"instances": {"a": {"usd_per_hour": 1.0000000001}}}, "usd_per_hour"),
        ({"opencost": {"url": "opencost:9003"}}, "costs.opencost.url"),
        ({"instances": {"a": {}}}, "usd_per_hour"),
    ],
)
def test_a_price_that_cannot_be_is_refused_with_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], costs: dict[str, Any], words: str
) -> None:
    config = configure(tmp_path, costs)
    assert main(["usage", "economics", "--config", config]) == 2
    assert words in capsys.readouterr().err
