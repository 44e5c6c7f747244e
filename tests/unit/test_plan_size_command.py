"""``headrace plan size`` from its arguments to its lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from serve_app.cli import main
from tests.checkpoints import write_checkpoint
from tests.stack import ROOT

CHAT = ("--rate-per-s", "118", "--input-tokens", "1155", "--output-tokens", "211")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", "size", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_arithmetic_is_printed_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, error = run(capsys, *CHAT, "--usd-per-gpu-hour", "2.5")
    assert (status, error) == (0, "")
    heads = ["model", "engine", "traffic", "knee", "size", "cost"]
    assert [line.split()[0] for line in text.splitlines() if line[0] != " "] == heads
    assert "more would exceed TPOT (estimated)" in text
    assert "a month of 730 hours" in text
    assert "output" in text


def test_a_measured_knee_gives_the_playbooks_four_replicas(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("--rate-per-s", "6", "--input-tokens", "500", "--output-tokens", "230")
    status, text, _ = run(capsys, *words, "--knee-concurrency", "24", "--stay-s", "12", "--json")
    document = json.loads(text)
    assert status == 0
    assert document["size"]["replicas"] == 4
    assert document["size"]["queue_threshold"] == 6
    assert document["cost"] is None
    assert document["calibration"]["weights_s"] == 0.0057


def test_dollars_count_all_gpus_of_all_replicas(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = ("--model", str(write_checkpoint(tmp_path / "llama-70b")), "--gpu", "H200")
    status, text, _ = run(capsys, *CHAT, *model, "--usd-per-gpu-hour", "3", "--json")
    document = json.loads(text)
    assert status == 0
    assert document["gpus_per_replica"] == 2
    replicas = document["size"]["replicas"]
    assert document["cost"]["usd_per_hour"] == pytest.approx(replicas * 2 * 3.0)


def test_a_trace_is_summarised_and_its_gap_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "trace.csv"
    times = [*range(120), *range(1000, 1240)]
    rows = "".join(f"{at_s},{300},{50}\n" for at_s in times)
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    status, text, error = run(capsys, "--trace", str(trace), "--json")
    assert status == 0
    assert "silent for 881 s from 119 s on" in error
    traffic = json.loads(text)["traffic"]
    assert traffic["peak_per_s"] == pytest.approx(1.0, rel=0.05)
    assert traffic["input_tokens"] == 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--tpot-slo-s", "0.005"), "impossible TPOT SLO: alone on a replica"),
        (("--ttft-slo-s", "0.05"), "times --ttft-slo-s 0.05"),
        (("--max-replicas", "3"), "replicas are needed"),
    ],
)
def test_an_impossible_slo_says_what_and_by_how_much(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    status, text, error = run(capsys, *CHAT, *words)
    assert (status, text) == (1, "")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--min-replicas", "5", "--max-replicas", "4"), "--min-replicas 5 is above"),
        (("--min-replicas", "-1"), "--min-replicas must be from 0"),
        (("--ttft-slo-s", "-1"), "--ttft-slo-s must be above 0"),
        (("--tpot-slo-s", "nan"), "--tpot-slo-s must be above 0"),
        (("--safety-ratio", "1.2"), "--safety-ratio must be above 0"),
        (("--usd-per-gpu-hour", "-2"), "--usd-per-gpu-hour must be from 0"),
        (("--mean-rate-per-s", "200"), "--mean-rate-per-s 200 is above"),
        (("--cache-hit-ratio", "1"), "--cache-hit-ratio must be at least 0"),
        (("--knee-concurrency", "300"), "is more than --max-num-seqs 256"),
        (("--knee-concurrency", "-3"), "--knee-concurrency must be above 0"),
        (("--stay-s", "12"), "give --knee-concurrency"),
        (("--input-p95-tokens", "10"), "--input-p95-tokens 10 is below the mean"),
        (("--trace", "absent.csv"), "exclude each other"),
        (("--gpu", "V9"), "--gpu 'V9' is none of"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    status, text, error = run(capsys, *CHAT, *words)
    assert (status, text) == (2, "")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1\n0\n", "earlier than the row before"),
        ("-1\n0\n", "arrival at -1"),
        ("0\n", "have no rate"),
        ("", "have no rate"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: str, message: str
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s\n" + rows)
    status, _, error = run(capsys, "--trace", str(trace))
    assert status == 2
    assert message in error


def test_traffic_must_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = run(capsys, "--rate-per-s", "5")
    assert status == 2
    assert "--input-tokens is missing; give it, or a --trace" in error


def configuration(tmp_path: Path, **changes: object) -> Path:
    """Write one pool of a 70B model on two GPUs, with bounds, a price and a measured knee."""
    document = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    control, pool, gateway = document["applications"]
    model = str(write_checkpoint(tmp_path / "llama-70b"))
    control["args"]["costs"]["instances"]["sim"] = {"usd_per_hour": 7.0}
    pool["args"]["engine"] = {
        "kind": "vllm",
        "model": model,
        "quantization": "fp8",
        "tensor_parallel_size": 2,
        "max_num_seqs": 128,
        "max_model_len": 16_384,
    }
    pool["args"]["replicas"] = {
        "num_replicas": 3,
        "num_gpus": 2,
        "autoscale": {"min_replicas": 3, "max_replicas": 40},
    }
    policy = gateway["deployments"][0]["user_config"]["pools"]["sim"]
    policy["scaling"] = {"knee_concurrency": 40, "safety_ratio": 0.8} | changes
    file = tmp_path / "stack.yaml"
    file.write_text(yaml.safe_dump(document))
    return file


def test_a_pool_of_a_configuration_stands_for_the_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(configuration(tmp_path))
    status, text, error = run(capsys, *CHAT, "--config", file, "--json")
    assert (status, error) == (0, "")
    document = json.loads(text)
    assert document["gpus_per_replica"] == 2
    assert document["knee"]["concurrency"] == 40
    assert document["calibration"]["max_num_seqs"] == 128
    replicas = document["size"]["replicas"]
    # The price of the instance is that of both its GPUs.
    assert document["cost"]["usd_per_hour"] == pytest.approx(replicas * 7.0)
    _, same, _ = run(
        capsys, *CHAT, "--model", str(tmp_path / "llama-70b"), "--quantization", "fp8",
        "--tensor-parallel", "2", "--max-num-seqs", "128", "--context-tokens", "16384",
        "--knee-concurrency", "40", "--safety-ratio", "0.8", "--usd-per-gpu-hour", "3.5",
        "--min-replicas", "3", "--max-replicas", "40", "--concurrency", "1", "--json",
    )  # fmt: skip
    assert json.loads(same) == document


def test_an_option_counts_before_the_configuration_even_at_its_default(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("--config", str(configuration(tmp_path)), "--pool", "sim", "--json")
    own = ("--safety-ratio", "0.75", "--min-replicas", "1", "--usd-per-gpu-hour", "1")
    low = ("--rate-per-s", "0.1", "--input-tokens", "100", "--output-tokens", "10")
    least = json.loads(run(capsys, *low, *words)[1])
    assert least["size"]["replicas"] == 3, "the file's autoscale.min_replicas"
    told = json.loads(run(capsys, *low, *words, *own)[1])
    assert told["size"]["replicas"] == 1
    assert told["cost"]["usd_per_hour"] == pytest.approx(2.0)


def test_a_simulated_pools_engine_is_the_configured_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    document = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    document["applications"][1]["args"]["engine"] |= {"weights_s": 0.02, "kv_blocks": 9000}
    file = tmp_path / "stack.yaml"
    file.write_text(yaml.safe_dump(document))
    status, text, _ = run(capsys, *CHAT, "--config", str(file))
    assert status == 0
    assert text.startswith(f"pool     sim of {file}")
    assert "max(20.00 ms" in text
    assert "144,000 tokens of KV (configured)" in text


def test_a_pool_that_is_not_there_is_named_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prod = str(ROOT / "configs" / "prod.yaml")
    assert "which pool? --pool is one of llama-70b, llama-8b" in run(capsys, "--config", prod)[2]
    status, _, error = run(capsys, "--config", prod, "--pool", "x")
    assert (status, "there is no pool 'x'" in error) == (2, True)
    assert "--pool names a pool of a configuration" in run(capsys, *CHAT, "--pool", "x")[2]
