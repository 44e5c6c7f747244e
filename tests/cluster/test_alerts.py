"""The alerts, judged by Prometheus' own tool: the rules load, and each fires when it should."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import Render
from tests.cluster.manifests import ROOT

# What Prometheus would have scraped for half an hour: nothing is wrong.
CALM = {
    'headrace_build_info{version="1"}': "1x40",
    "headrace_scrape_age_seconds": "2x40",
    "headrace_control_heartbeat_age_seconds": "1x40",
    "headrace_usage_backlog": "0x40",
    'headrace_requests_total{pool="p",class="standard",outcome="completed"}': "0+600x40",
    'headrace_requests_total{pool="p",class="standard",outcome="failed"}': "0+6x40",
    'headrace_rejected_total{pool="p",class="standard",reason="queue_full"}': "0+6x40",
    'headrace_rejected_total{pool="p",class="sheddable",reason="brownout"}': "0+500x40",
    'headrace_replicas{pool="p"}': "2x40",
    'headrace_replicas{pool="asleep"}': "0x40",
    'headrace_queue_depth{pool="p",class="standard"}': "9x40",
    'headrace_queue_depth{pool="asleep",class="standard"}': "0x40",
    'headrace_time_to_first_token_seconds_bucket{pool="p",class="critical",le="1"}': "0+100x40",
    'headrace_time_to_first_token_seconds_bucket{pool="p",class="critical",le="10"}': "0+100x40",
    'headrace_time_to_first_token_seconds_bucket{pool="p",class="critical",le="+Inf"}': "0+100x40",
}
# For each alert what is wrong, and when it is to be heard; before that it is not.
WRONG: dict[str, tuple[dict[str, str], str]] = {
    "HeadraceErrors": (
        {'headrace_requests_total{pool="p",class="standard",outcome="failed"}': "0+60x40"},
        "5m",
    ),
    "HeadraceNoReplica": ({'headrace_replicas{pool="p"}': "0x40"}, "11m"),
    "HeadraceSlowFirstToken": (
        {
            'headrace_time_to_first_token_seconds_bucket{pool="p",class="critical",le="1"}': (
                "0+90x40"
            )
        },
        "13m",
    ),
    "HeadraceRefusing": (
        {'headrace_rejected_total{pool="p",class="standard",reason="queue_full"}': "0+60x40"},
        "13m",
    ),
    "HeadraceLedgerBehind": ({"headrace_control_heartbeat_age_seconds": "90x40"}, "6m"),
    "HeadraceBlind": ({"headrace_scrape_age_seconds": "200x40"}, "6m"),
}
FIRING = 'count by (alertname) (ALERTS{alertstate="firing"})'


@pytest.fixture(scope="module")
def rules(render: Render, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as a file of Prometheus'; both clouds render the same."""
    done = render("eks")
    assert done.returncode == 0, done.stderr
    documents = yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)
    [rule] = [each for each in documents if each and each["kind"] == "PrometheusRule"]
    path = tmp_path_factory.mktemp("rules") / "rules.yaml"
    path.write_text(yaml.safe_dump(rule["spec"]))
    return path


def names(rules: Path) -> set[str]:
    groups = yaml.safe_load(rules.read_text())["groups"]
    return {rule["alert"] for group in groups for rule in group["rules"]}


def run(promtool: Path, *arguments: str | Path) -> str:
    """Return what promtool has to complain of, nothing if nothing."""
    command = [promtool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_prometheus_takes_the_rules(promtool: Path, rules: Path) -> None:
    files = sorted((ROOT / "cluster" / "alerts").glob("*.yaml"))
    assert files
    assert not run(promtool, "check", "rules", rules, *files)


def test_the_chart_sets_where_first_tokens_are_slow(render: Render) -> None:
    done = render("eks", "--set-json", "monitoring.firstTokenSeconds=1.5")
    assert "> 1.5\n" in done.stdout
    assert "firstTokenSeconds" not in done.stdout


def test_each_alert_is_heard_when_its_thing_is_wrong_and_no_other(
    promtool: Path, rules: Path
) -> None:
    assert names(rules) == WRONG.keys()
    cases = [case({}, "40m", [])]
    for name, (wrong, when) in WRONG.items():
        cases += [case(wrong, when, [name]), case(wrong, "1m", [])]
    cases.append(case(dict.fromkeys(CALM, ""), "6m", ["HeadraceBlind"]))
    file = rules.with_name("cases.yaml")
    file.write_text(
        yaml.safe_dump(
            {"rule_files": [str(rules)], "evaluation_interval": "30s", "tests": cases},
            default_flow_style=False,
        )
    )
    assert not run(promtool, "test", "rules", file)


def case(wrong: dict[str, str], when: str, heard: list[str]) -> dict[str, Any]:
    """Return a test of promtool: with these series, these alerts fire at that time."""
    assert wrong.keys() <= CALM.keys()
    series = {name: values for name, values in {**CALM, **wrong}.items() if values}
    samples = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in heard]
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": FIRING, "eval_time": when, "exp_samples": samples}],
    }
