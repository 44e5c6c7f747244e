"""``headrace simulate`` from its arguments to its files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from serve_app.commands import simulate
from serve_app.errors import ConfigError


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    simulate.add_parser(parser.add_subparsers())
    args = parser.parse_args(["simulate", *words])
    return args.run(args)


QUICK = ("--duration-s", "5", "--warmup-s", "1")


def test_json_is_one_object_with_the_figures_and_every_baseline(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    policies = ("--policy", "headrace", "--policy", "least-loaded", "--policy", "gie-scorer")
    folder = tmp_path / "out"
    assert run("--scenario", "overload", *policies, *QUICK, "--json", "--out", str(folder)) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["policy"] == "headrace"
    assert set(document["baselines"]) == {"least-loaded", "gie-scorer"}
    for figures in (document, *document["baselines"].values()):
        assert set(figures["ttft_p99_s"]) == {"critical", "standard", "sheddable"}
        assert set(figures["shed_ratio"]) == {"critical", "standard", "sheddable"}
        for key in ("goodput_ratio", "jain", "wasted_token_ratio", "requests_per_wall_s"):
            assert isinstance(figures[key], float)
    assert document["calibration"]["chat"]["prefill_s_per_token"] == 30e-6
    assert json.loads((folder / "results.json").read_text()) == document
    pictures = {file.name for file in folder.glob("*.png")}
    assert pictures == {"goodput.png", "ttft.png", "service.png", "queue.png", "rung.png"}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in folder.glob("*.png"))


def test_the_table_has_a_line_per_contender(capsys: pytest.CaptureFixture[str]) -> None:
    policies = ("--policy", "least-loaded", "--policy", "headrace+round_robin")
    assert run("--scenario", "overload", *policies, *QUICK) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("policy")
    assert first.startswith("least-loaded")
    assert second.startswith("headrace+round_robin")


def test_a_trace_is_replayed_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{second / 10},{second % 3 + 50},5\n" for second in range(200))
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    words = ("--warmup-s", "2", "--tenants", "4", "--classes", "20/30/50", "--json")
    assert run("--trace", str(trace), *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["requests"] == 200
    assert document["good_ratio"] == {"critical": 1.0, "standard": 1.0, "sheddable": 1.0}


@pytest.mark.ray  # Reading a configuration imports Ray's own schema.
def test_pools_come_from_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    trace_free = ("--scenario", "overload", "--config", "configs/sim.yaml", "--find-knee")
    assert run(*trace_free, "--warmup-s", "1", "--replicas", "1", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["knee_per_s"] > 1
    (pool,) = document["calibration"].values()
    assert pool["replicas"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scenario", "storm"), "none of"),
        (("--scenario", "overload", "--policy", "best"), "none of"),
        (("--scenario", "overload", "--policy", "headrace+best"), "none of"),
        (("--scenario", "overload", "--seeds", "0"), "--seeds"),
        (("--scenario", "overload", "--duration-s", "nan"), "--duration-s"),
        (("--scenario", "overload", "--duration-s", "10"), "--warmup-s"),
        (("--scenario", "overload", "--replicas", "-1"), "--replicas"),
        (("--trace", "absent.csv"), "absent.csv"),
        (("--trace", "absent.csv", "--find-knee"), "needs --scenario"),
    ],
)
def test_bad_arguments_are_refused_by_name(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*words)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s\n")
    with pytest.raises(ConfigError, match="empty"):
        run("--trace", str(trace))
