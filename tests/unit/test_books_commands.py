"""`headrace prices` and `headrace usage`: from a file to a bill, and what is said on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from sqlalchemy import text

from serve_app.cli import main
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.usage import UsageLedger
from tests.usage_records import charge, record

PRICES = "currency: USD\ncards:\n  all: {input: 1, cached_input: 0.1, output: 10, request: 0.001}\n"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_URL", "HEADRACE_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/books.db"


@pytest.fixture
def config(tmp_path: Path, url: str) -> str:
    ours = {"route_prefix": None, "import_path": "serve_app.app:control"}
    router = {"name": "Router", "user_config": {"pools": {}}}
    gateway = {"route_prefix": "/", "import_path": "serve_app.app:gateway"}
    applications = [
        {"name": "control", **ours, "args": {"database": url}},
        {"name": "gateway", **gateway, "deployments": [router]},
    ]
    file = tmp_path / "some.yaml"
    file.write_text(yaml.safe_dump({"applications": applications}))
    return str(file)


@pytest.fixture
def prices(tmp_path: Path) -> str:
    file = tmp_path / "prices.yaml"
    file.write_text(PRICES)
    return str(file)


def bill_one(url: str) -> None:
    database = Database(url)
    store = PriceStore(database)
    UsageLedger(database, store).commit([record(charge(price_version=store.version()))])
    database.close()


def test_a_price_book_is_checked_imported_listed_and_shown(
    config: str, prices: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prices", "check", prices]) == 0
    assert "1 cards, no problem" in capsys.readouterr().out
    assert main(["prices", "list", "--config", config]) == 0
    assert "everything is free" in capsys.readouterr().err
    assert main(["prices", "import", prices, "--note", "January", "--config", config]) == 0
    assert "version 1 is in force: 1 cards" in capsys.readouterr().out
    assert main(["prices", "import", prices, "--config", config]) == 0
    assert "version 1 has these 1 cards already" in capsys.readouterr().out
    assert main(["prices", "list", "--config", config]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["VERSION", "SINCE", "CARDS", "NOTE"]
    assert line.startswith("1* ")
    assert line.endswith(" January")
    assert main(["prices", "show", "--config", config]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert main(["prices", "import", str(shown), "--config", config]) == 0
    assert "already" in capsys.readouterr().out
    assert main(["prices", "show", "7", "--config", config]) == 1
    assert "there is no version 7" in capsys.readouterr().err


def test_a_wrong_price_book_is_refused_and_changes_nothing(
    config: str, prices: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(prices).write_text(PRICES.replace("output: 10", "output: -10"))
    assert main(["prices", "import", prices, "--config", config]) == 2
    assert "cards.all.output: must not be negative" in capsys.readouterr().err
    main(["prices", "list", "--config", config])
    assert "everything is free" in capsys.readouterr().err


def test_usage_is_shown_as_a_table_csv_and_json(
    config: str, prices: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["prices", "import", prices, "--config", config])
    bill_one(url)
    capsys.readouterr()
    asked = ["usage", "--by", "tenant,model", "--from", "2026-01-01", "--config", config]
    assert main(asked) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # 0.001 a request, 12 fresh tokens, 8 cached, 5 out.
    assert lines[1] == ["acme", "small", "1", "20", "5", "0", "0.0010628"]
    assert lines[2] == ["TOTAL", "1", "20", "5", "0", "0.0010628"]
    assert main([*asked, "--format", "csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith(",0.0010628,0,0,0,0,0,0,0,0,")
    assert main([*asked, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["total"]["amount_nanousd"] == 1_062_800
    assert main([*asked, "--to", "2025-01-01"]) == 2
    assert "--to: must be later than from" in capsys.readouterr().err


def test_verify_prints_every_difference_and_its_status_tells(
    config: str, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bill_one(url)
    assert main(["usage", "--verify", "--config", config]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert "1 events of 1 requests, 1 rollups, 0 USD: no differences" in said.err
    database = Database(url)
    with database.transaction() as connection:
        connection.execute(text("UPDATE usage_rollup SET amount_nanousd = 5"))
    database.close()
    assert main(["usage", "--verify", "--config", config]) == 1
    said = capsys.readouterr()
    assert "amount_nanousd is 5, events add to 0" in said.out
    assert "USD: no differences" not in said.err


def test_the_books_are_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["usage"]) == 2
    assert "say where the books are" in capsys.readouterr().err
    there = ["--url", "http://127.0.0.1:9", "--admin-key", "x"]
    assert main(["usage", "--verify", *there]) == 2
    assert "needs the database" in capsys.readouterr().err
    assert main(["usage", *there]) == 1
    assert "is it running?" in capsys.readouterr().err


def test_a_bill_is_taken_back_once_and_the_books_still_agree(
    config: str, url: str, prices: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["prices", "import", prices, "--config", config])
    bill_one(url)
    name = charge().request_id
    place = ["--config", config]
    capsys.readouterr()
    assert main(["usage", "reverse", name, "--reason", "goodwill", *place]) == 0
    assert capsys.readouterr().out == f"took back 0.0010628 USD of request {name}\n"
    assert main(["usage", "reverse", name, "--reason", "again", *place]) == 0
    assert capsys.readouterr().out == f"nothing is left to take back of request {name}\n"
    assert main(["usage", "--verify", *place]) == 0
    assert "2 events of 1 requests" in capsys.readouterr().err
    assert main(["usage", "--format", "json", *place]) == 0
    assert json.loads(capsys.readouterr().out)["total"]["amount_usd"] == "0"
    assert main(["audit", "--subject", "request", *place]) == 0
    assert "amount_usd 0.0010628 -> 0 (goodwill)" in capsys.readouterr().out
    assert main(["usage", "reverse", "req_none", "--reason", "x", *place]) == 1
    assert "the ledger has no request 'req_none'" in capsys.readouterr().err
    assert main(["usage", "reverse", name, "--reason", " ", *place]) == 2
    assert "--reason: must say why" in capsys.readouterr().err
