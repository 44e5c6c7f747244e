"""``headrace simulate`` from its arguments to its files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from serve_app.commands import simulate
from serve_app.errors import ConfigError

pytestmark = pytest.mark.slow


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
    assert document["knee_concurrency"] > document["queue_threshold"] > 1
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
        (("--scenario", "overload", "--replicas", "100000"), "--replicas"),
        (("--scenario", "overload", "--routers", "0"), "--routers"),
        (("--scenario", "overload", "--tenants", "3"), "--tenants is for --trace"),
        (("--scenario", "overload", "--classes", "1/1/1"), "--classes is for --trace"),
        (("--scenario", "overload", "--pool", "chat"), "--pool names a pool of --config"),
        (("--scenario", "overload", "--out", "/dev/null/x"), "--out /dev/null/x: Not a directory"),
        (("--scenario", "overload", "--config", "absent.yaml"), "absent.yaml: cannot be read"),
        (("--trace", "absent.csv"), "--trace: absent.csv: No such file"),
        (("--trace", "tests"), "--trace: tests: Is a directory"),
        (("--trace", "absent.csv", "--find-knee"), "needs --scenario"),
    ],
)
def test_bad_arguments_are_refused_by_name(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*words)


def test_what_a_traces_columns_lack_comes_from_the_flags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s\n" + "".join(f"{second / 10}\n" for second in range(300)))
    words = ("--prompt-tokens", "40", "--output-tokens", "7", "--time-scale", "0.5")
    assert (
        run("--trace", str(trace), *words, "--warmup-s", "2", "--knee-per-s", "10", "--json") == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert document["requests"] == 300
    assert document["goodput_per_s"] == pytest.approx(20.0, rel=0.1)
    assert document["goodput_ratio"] == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize(
    "text",
    [
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,0\n",
        "timestamp_ms,prompt_tokens,output_tokens\n6011,178,8\n6917,258,0\n",
        '{"timestamp": 0, "input_length": 1500, "output_length": 7, "hash_ids": [4, 5]}\n'
        '{"timestamp": 3000, "input_length": 1500, "output_length": 7, "hash_ids": [4, 5]}\n',
    ],
)
def test_published_traces_run_as_they_are(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / ("trace.jsonl" if text.startswith("{") else "trace.csv")
    trace.write_text(text)
    assert run("--trace", str(trace), "--warmup-s", "0", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["questions"] == 2
    assert document["good_ratio"]["standard"] == 1.0


@pytest.mark.ray  # Reading a configuration imports Ray's own schema.
def test_load_goes_to_the_named_pool_and_long_contexts_where_it_sends_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,100,5\n1,20000,5\n")
    config = ("--config", "configs/policies.yaml", "--warmup-s", "0", "--json")
    assert run("--trace", str(trace), *config, "--pool", "chat") == 0
    pools = list(json.loads(capsys.readouterr().out)["calibration"])
    assert pools[0] == "chat"
    assert run("--trace", str(trace), *config, "--pool", "chat-small") == 0
    document = json.loads(capsys.readouterr().out)
    assert next(iter(document["calibration"])) == "chat-small"
    assert document["good_ratio"]["standard"] == 1.0
    with pytest.raises(ConfigError, match="--pool 'absent' is none of"):
        run("--trace", str(trace), *config, "--pool", "absent")


def test_the_bar_is_drawn_on_standard_error_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert run("--scenario", "overload", *QUICK, "--json") == 0
    shown = capsys.readouterr()
    assert "100 %" in shown.err or "##" in shown.err
    json.loads(shown.out)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s\n")
    with pytest.raises(ConfigError, match="empty"):
        run("--trace", str(trace))
