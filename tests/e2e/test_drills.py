"""Drills end to end: two quick ones on a stack that runs, and all of them on their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from serve_app import cli
from serve_app.drills.frame import DRILLS
from tests.stack import ROOT, Stack


def test_drills_of_a_running_stack_pass_and_leave_it_as_it_was(
    sim_stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--url", sim_stack.url, "--admin-key", sim_stack.key)
    root = ("--root", str(sim_stack.root.pid), "--i-mean-it")
    status = cli.main(["drill", "cancel-stream", "stale-metrics", "--json", *where, *root])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert status == 0, printed.err
    assert [each["passed"] for each in found["drills"]] == [True, True]


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_every_drill_passes_on_one_simulated_stack_within_ten_minutes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve_app.cli", "drill", "--all", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [each["drill"] for each in found["drills"]] == list(DRILLS)
    assert found["took_s"] < 600
