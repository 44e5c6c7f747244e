"""Two commands at once: neither's failure is lost, and nothing outlives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.stack import ROOT

SCRIPT = ROOT / "scripts" / "side_by_side.py"
# What a suite of tests does when it is interrupted, and a shell's child does not.
HEARS_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def side_by_side(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *command], capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.parametrize(("first", "second", "status"), [(0, 0, 0), (3, 0, 1), (0, 3, 1)])
def test_it_fails_when_either_does(first: int, second: int, status: int) -> None:
    commands = ["sh", "-c", f"exit {first}", "--", "sh", "-c", f"exit {second}"]
    assert side_by_side(*commands).returncode == status


def test_the_firsts_output_comes_in_one_piece(tmp_path: Path) -> None:
    """The second writes between the first's lines: each waits for the other."""
    os.mkfifo(tmp_path / "go")
    os.mkfifo(tmp_path / "gone")
    first = f"echo one; echo > {tmp_path}/go; read line < {tmp_path}/gone; echo two >&2"
    second = f"read line < {tmp_path}/go; echo three; echo > {tmp_path}/gone"
    done = side_by_side("sh", "-c", first, "--", "sh", "-c", second)
    assert done.stdout.split() == ["three", "one", "two"]


def test_the_first_has_the_lower_priority() -> None:
    base = os.nice(0)
    lower = min(base + 10, 19)
    code = f"import os, time\nwhile os.nice(0) != {lower}: time.sleep(0.01)"
    ours = f"import os; raise SystemExit(os.nice(0) != {base})"
    done = side_by_side(sys.executable, "-c", code, "--", sys.executable, "-c", ours)
    assert done.returncode == 0


def test_interrupted_it_ends_both() -> None:
    sleeper = [sys.executable, "-c", HEARS_SIGINT + "import time; print(1); time.sleep(300)"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *sleeper, "--", "sh", "-c", "echo up; exec sleep 300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    both = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(both, timeout=120)
    assert len(both) == 2
    assert not alive


@pytest.mark.parametrize("command", [["true"], ["true", "--"], ["--", "true"]])
def test_it_wants_two(command: list[str]) -> None:
    done = side_by_side(*command)
    assert done.returncode == 2
    assert "COMMAND... -- COMMAND..." in done.stderr
