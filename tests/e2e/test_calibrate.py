"""`headrace calibrate` against a running stack."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.stack import Stack


def test_a_live_pool_is_driven_and_reported(sim_stack: Stack, tmp_path: Path) -> None:
    told = sim_stack.headrace(
        *("calibrate", "--pool", "sim", "--url", sim_stack.url, "--key", sim_stack.key),
        *("--prompt-tokens", "64", "--output-tokens", "8", "--requests", "20"),
        *("--max-concurrency", "2", "--ttft-s", "5", "--tpot-s", "5", "--good-ratio", "0.5"),
        *("--usd-per-hour", "2", "--out", tmp_path),
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.startswith("knee: ")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [level["concurrency"] for level in report["results"]["levels"]] == [1, 2]
    assert report["profile"]["replicas"] == 2
    assert report["traffic"]["prompt_tokens"]["p50"] in range(58, 71)
    assert report["traffic"]["output_tokens"]["p99"] == 8
    settings = yaml.safe_load((tmp_path / "settings.yaml").read_text())
    assert settings["pools"]["sim"]["scaling"]["knee_concurrency"] in (0.5, 1.0)


def test_a_pool_that_is_not_there_is_said_with_those_that_are(sim_stack: Stack) -> None:
    told = sim_stack.headrace(
        *("calibrate", "--pool", "nope", "--url", sim_stack.url, "--key", sim_stack.key)
    )
    assert told.returncode == 1
    assert told.stderr == "headrace: there is no pool 'nope'; there is: sim\n"
