"""``headrace plan replay`` from its arguments to its table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_app.cli import main
from tests.stack import ROOT

FLEET = ("--min-replicas", "1", "--max-replicas", "4", "--cold-start-s", "10")


@pytest.fixture
def trace(tmp_path: Path) -> str:
    file = tmp_path / "trace.csv"
    rows = "".join(f"{number / 5},1000,100\n" for number in range(300))
    file.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    return str(file)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", "replay", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_table_has_the_baseline_the_fixed_sizes_and_every_what_if(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    whats = ("--what-if", "quantization=fp8", "--what-if", "cache-hit=0.5,price=2")
    words = ("--trace", trace, *FLEET, "--usd-per-gpu-hour", "2.5", "--fixed", "2", *whats)
    status, text, error = run(capsys, *words)
    assert (status, error) == (0, "")
    rows = text.split("\n\n")[1].splitlines()
    assert rows[0].startswith("case")
    cases = [row.split("  ")[0] for row in rows[1:]]
    assert cases == ["autoscaled", "fixed 2", "quantization=fp8", "cache-hit=0.5,price=2"]
    assert "$/1M good" in rows[0]


def test_json_holds_every_case_with_its_calibration(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    whats = ("--what-if", "gpu=H200,price=3.5", "--what-if", "step-time=2", "--what-if", "kv=fp8")
    words = ("--trace", trace, *FLEET, "--usd-per-gpu-hour", "2.5", "--json", *whats)
    status, text, _ = run(capsys, *words)
    assert status == 0
    first, _, faster, slower, small = json.loads(text)["cases"]
    assert first["slo_ratio"] == 1.0
    assert first["usd"] == pytest.approx(2.5 * first["replica_hours"])
    assert faster["usd"] == pytest.approx(3.5 * faster["replica_hours"])
    weights_s = first["calibration"]["weights_s"]
    assert faster["calibration"]["weights_s"] == pytest.approx(weights_s * 3.35 / 4.8)
    assert faster["calibration"]["kv_blocks"] > 2 * first["calibration"]["kv_blocks"]
    assert slower["calibration"]["weights_s"] == pytest.approx(2 * weights_s)
    assert slower["knee_concurrency"] < first["knee_concurrency"]
    assert small["calibration"]["kv_blocks"] > 1.9 * first["calibration"]["kv_blocks"]


def test_without_a_price_there_are_no_dollars(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    status, text, _ = run(capsys, "--trace", trace, *FLEET)
    assert status == 0
    assert "$" not in text


def test_a_gap_is_replayed_as_silence_and_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "gap.csv"
    times = [*range(30), *range(1000, 1030)]
    file.write_text("arrival_s,prompt_tokens\n" + "".join(f"{at_s},100\n" for at_s in times))
    status, text, error = run(capsys, "--trace", str(file), "--json", "--fixed", "1")
    assert status == 0
    assert "silent for 971 s from 29 s on" in error
    assert json.loads(text)["cases"][0]["requests"] == 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--what-if", "gpu"), "'gpu' is not KEY=VALUE"),
        (("--what-if", "gqu=H200"), "did you mean gpu?"),
        (("--what-if", "gpu=H9,price=2"), "--gpu 'H9' is none of"),
        (("--what-if", "gpu=H200"), "another GPU has another price"),
        (("--what-if", "price=-1"), "price must be a number from 0"),
        (("--what-if", "price=2,price=3"), "price is given twice"),
        (("--what-if", "cache-hit=1.5"), "cache-hit must be a number from 0 to 0.99"),
        (("--what-if", "discount=0.5"), "give spot=SHARE"),
        (("--what-if", "spot=0.5,interruptions=nan"), "interruptions must be a number"),
        (("--what-if", "quantization=int2"), "quantization is none of"),
        (("--what-if", "kv=int2"), "kv is none of"),
        (("--fixed", "0"), "--fixed must be above 0"),
        (("--cold-start-s", "-5"), "--cold-start-s must be from 0"),
        (("--time-scale", "-1"), "--time-scale must be above 0"),
        (("--min-replicas", "5", "--max-replicas", "4"), "--min-replicas 5 is above"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], trace: str, words: tuple[str, ...], message: str
) -> None:
    status, text, error = run(capsys, "--trace", trace, "--usd-per-gpu-hour", "2", *words)
    assert (status, text) == (2, "")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [("3\n1\n", "earlier than the row before"), ("-2\n1\n", "arrival at -2"), ("", "no rate")],
)
def test_a_trace_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: str, message: str
) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s\n" + rows)
    status, _, error = run(capsys, "--trace", str(file))
    assert status == 2
    assert message in error


def test_an_slo_that_an_idle_replica_misses_is_impossible(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    status, _, error = run(capsys, "--trace", trace, "--tpot-slo-s", "0.001")
    assert status == 1
    assert "impossible TPOT SLO" in error
    status, _, error = run(capsys, "--trace", trace, "--what-if", "step-time=20")
    assert status == 1
    assert "--what-if step-time=20: impossible TPOT SLO" in error


def test_a_pool_of_a_configuration_is_replayed(
    capsys: pytest.CaptureFixture[str], trace: str
) -> None:
    words = ("--trace", trace, "--config", str(ROOT / "configs" / "sim.yaml"), "--fixed", "1")
    status, text, error = run(capsys, *words, "--cold-start-s", "10", "--max-replicas", "4")
    assert (status, error) == (0, "")
    assert text.startswith("pool     sim of")
    assert "0.85 of it planned with; 1 to 4 replicas, cold start 10 s" in text
    assert "$ vs first" in text, "the file has the price"
