"""``headrace budgets``: what it keeps, prints and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from serve_app.cli import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    document = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    document["applications"][0]["args"]["database"] = f"sqlite:///{tmp_path}/books.db"
    file = tmp_path / "sim.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def run(capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> tuple[int, str, str]:
    status = main(["budgets", *words, "--config", str(config)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_budget_is_set_topped_up_listed_and_removed(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    words = ("set", "tenant", "acme", "500", "--window", "month", "--alerts", "0.5,1")
    assert run(capsys, config, *words) == (0, "the budget of tenant acme, 500 dollars is set\n", "")
    assert run(capsys, config, "set", "user", "acme/ann", "0.25", "--window", "rolling:24h")[0] == 0
    assert run(capsys, config, "set", "key", "k1", "1", "--soft")[0] == 0
    assert (
        run(capsys, config, "add", "key", "k1", "0.5")[1] == "the budget of key k1, 1.5 dollars\n"
    )
    listed = [line.split() for line in run(capsys, config, "list")[1].splitlines()]
    assert listed[0][:4] == ["SCOPE", "ID", "DOLLARS", "WINDOW"]
    assert ["tenant", "acme", "500", "month", "0", "0", "hard", "0.5,1"] in listed
    assert ["user", "acme/ann", "0.25", "rolling:24h", "0", "0", "hard", "-"] in listed
    assert ["key", "k1", "1.5", "none", "0", "0", "soft", "-"] in listed
    assert run(capsys, config, "remove", "key", "k1")[0] == 0
    assert "k1" not in run(capsys, config, "list")[1]


def test_an_amount_may_be_large_and_together_with_more_has_a_bound(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    words = ("tenant", "acme", "5000")
    assert (
        run(capsys, config, "set", *words)[1] == "the budget of tenant acme, 5000 dollars is set\n"
    )
    status, _, err = run(capsys, config, "add", "tenant", "acme", "1e9")
    assert status == 1
    assert "1000005000 dollars in all are too much; at most 1000000000" in err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("set", "tenant", "acme", "-1"), 2, ""),
        (("set", "tenant", "acme", "0.0000000001"), 2, "multiple of 0.000000001"),
        (("set", "tenant", "acme", "much"), 2, "must be a number of dollars"),
        (("set", "tenant", "acme", "1e10"), 2, "is too large; at most 1000000000"),
        (("set", "tenant", "acme", "1", "--window", "year"), 2, "--window must be"),
        (("set", "tenant", "acme", "1", "--window", "rolling:0h"), 2, "--window must be"),
        (("set", "tenant", "acme", "1", "--alerts", "0"), 2, "--alerts must be"),
        (("set", "tenant", "acme", "1", "--alerts", "half"), 2, "--alerts"),
        (("set", "user", "ann", "1"), 2, "TENANT/USER"),
        (("add", "tenant", "acme", "1"), 1, "there is no budget of tenant 'acme'"),
        (("remove", "tenant", "acme"), 1, "there is no budget of tenant 'acme'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    words: tuple[str, ...],
    status: int,
    said: str,
) -> None:
    try:
        found, _, err = run(capsys, config, *words)
    except SystemExit as exit_:
        found, err = int(str(exit_.code)), capsys.readouterr().err
    assert found == status
    assert said in err
