"""``headrace plan fit`` from its arguments to its lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serve_app.cli import main
from tests.checkpoints import LLAMA_70B, write_checkpoint


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_checkpoint(tmp_path / "llama-70b"))


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", "fit", *words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_reasoning_is_printed_line_by_line(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    status, text, _ = run(capsys, "--model", model, "--gpu", "h200")
    assert status == 0
    assert "327,680 bytes a token" in text
    assert "1 x H200: 125.7 - 131.4 weights" in text
    assert "does not fit: 9.7 GiB short before any KV" in text
    assert "-> 2 x H200, TP 2 in a node a replica" in text
    assert "tensor_parallel_size: 2" in text
    assert "With fp8 weights 1 x H200 would do (21 sequences)" in text


def test_fewer_bits_fit_one_gpu(capsys: pytest.CaptureFixture[str], model: str) -> None:
    status, text, _ = run(capsys, "--model", model, "--gpu", "H200", "--quantization", "fp8")
    assert status == 0
    assert "-> one H200 a replica" in text
    assert "quantization: fp8" in text


def test_json_is_one_object(capsys: pytest.CaptureFixture[str], model: str) -> None:
    status, text, _ = run(capsys, "--model", model, "--gpu", "H200", "--json")
    document = json.loads(text)
    assert status == 0
    assert document["chosen"]["gpus"] == document["chosen"]["tensor_parallel"] == 2
    assert [trial["verdict"] for trial in document["trials"]] == ["no room", "fits"]
    assert document["alternatives"] == [{"weights": "fp8", "kv": "bf16", "gpus": 1}]
    assert document["engine"]["tensor_parallel_size"] == 2


def test_what_fits_nowhere_ends_with_status_one_and_says_what_would_help(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    one = ("--gpus-per-node", "1", "--nodes", "1")
    status, text, _ = run(capsys, "--model", model, "--gpu", "H100", *one)
    assert status == 1
    assert "No layout of up to 1 GPUs fits: allow more" in text
    assert "With int4 weights and fp8 KV 1 x H100 would do" in text


def test_an_unknown_gpu_is_answered_with_the_known_ones(
    capsys: pytest.CaptureFixture[str], model: str
) -> None:
    status, _, error = run(capsys, "--model", model, "--gpu", "H20O")
    assert status == 2
    assert "'H20O' is none of: A100-40GB" in error
    assert "did you mean H200?" in error
    assert "--gpu-memory-gib" in error
    assert error.count("\n") == 1
    status, text, _ = run(
        capsys, "--model", model, "--gpu", "X1", "--gpu-memory-gib", "300", "--json"
    )
    assert status == 0
    assert json.loads(text)["chosen"]["gpus"] == 1


def test_a_quantized_checkpoint_is_not_quantized_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {**LLAMA_70B, "quantization_config": {"quant_method": "fp8"}}
    model = str(write_checkpoint(tmp_path / "fp8", config, 72_000_000_000))
    status, text, _ = run(capsys, "--model", model, "--gpu", "H200")
    assert status == 0
    assert "quantization:" not in text
    status, _, error = run(capsys, "--model", model, "--gpu", "H200", "--quantization", "awq")
    assert status == 2
    assert "is stored in fp8 already" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context-tokens", "200000"), "more than llama-70b takes: 131072"),
        (("--context-tokens", "-1"), "--context-tokens must be above 0"),
        (("--concurrency", "0"), "--concurrency must be above 0"),
        (("--concurrency", "300"), "more than --max-num-seqs 256"),
        (("--tensor-parallel", "3"), "64 attention heads do not divide by 3"),
        (("--tensor-parallel", "16"), "more than a node's 8"),
        (("--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization must be above 0"),
        (("--gpu-memory-utilization", "nan"), "--gpu-memory-utilization must be above 0"),
        (("--gpu-memory-gib", "-80"), "--gpu-memory-gib must be from 1"),
        (("--overhead-gib", "-2"), "--overhead-gib must be from 0"),
        (("--nodes", "0"), "--nodes must be above 0"),
        (("--dtype", "bf16", "--quantization", "fp8"), "--dtype is for unquantized weights"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    capsys: pytest.CaptureFixture[str], model: str, words: tuple[str, ...], message: str
) -> None:
    status, text, error = run(capsys, "--model", model, "--gpu", "H200", *words)
    assert (status, text) == (2, "")
    assert message in error
    assert error.count("\n") == 1
