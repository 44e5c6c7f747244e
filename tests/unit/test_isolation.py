"""Nothing that a test starts outlives it, however it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.stack import ROOT, can_isolate

pytestmark = pytest.mark.slow

ISOLATED = ROOT / "scripts" / "isolated"
PLAIN = {name: value for name, value in os.environ.items() if name != "HEADRACE_ISOLATED"}

# Starts a process that leaves its session, as Ray's daemons do, in a stack's namespace.
STARTER = """
import subprocess, sys
sys.path.insert(0, sys.argv[1])
from tests.stack import _namespace
daemon = 'setsid sleep 300 & echo up; sleep 300'
child = subprocess.Popen([*_namespace(), 'sh', '-c', daemon], stdout=subprocess.PIPE)
child.stdout.readline()
print('up', flush=True)
child.wait()
"""

needs_namespaces = pytest.mark.skipif(not can_isolate(), reason="no namespaces on this machine")


def isolated(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ISOLATED, *command], env=PLAIN, capture_output=True, text=True, timeout=240, check=False
    )


def descendants_once_up(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Wait for the process's first line, and for its sleeper, then return everything below it."""
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    give_up_at_s = time.monotonic() + 120
    while True:
        below = psutil.Process(process.pid).children(recursive=True)
        # A shell is forked before it becomes what it was asked to run.
        if any("sleep" in child.name() for child in below):
            return below
        assert time.monotonic() < give_up_at_s, below
        time.sleep(0.01)


def test_the_exit_status_is_the_commands() -> None:
    assert isolated("sh", "-c", "exit 7").returncode == 7


def test_the_temporary_folder_is_short_private_and_removed() -> None:
    folder = Path(isolated("sh", "-c", 'echo x > "$TMPDIR/file"; echo "$TMPDIR"').stdout.strip())

    assert len(str(folder)) <= 15
    assert not folder.exists()


@needs_namespaces
def test_the_network_is_an_own_loopback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        reach = f"import socket; socket.create_connection({address}, 5)"
        take = f"import socket; socket.create_server({address})"

        assert isolated(sys.executable, "-c", reach).returncode != 0
        assert isolated(sys.executable, "-c", take).returncode == 0


@needs_namespaces
@pytest.mark.parametrize(
    "command",
    [
        [str(ISOLATED), "sh", "-c", "setsid sleep 300 & echo up; sleep 300"],
        [sys.executable, "-c", STARTER, str(ROOT)],
    ],
    ids=["scripts/isolated", "tests/stack.py"],
)
def test_everything_ends_when_its_starter_is_killed(command: list[str]) -> None:
    process = subprocess.Popen(command, env=PLAIN, stdout=subprocess.PIPE)
    below = descendants_once_up(process)

    process.kill()
    process.communicate()

    _, alive = psutil.wait_procs(below, timeout=120)
    assert alive == []


@needs_namespaces
def test_a_folder_left_by_a_kill_is_removed_by_the_next_run() -> None:
    script = 'echo up; echo "$TMPDIR" >&2; sleep 300'
    process = subprocess.Popen(
        [ISOLATED, "sh", "-c", script],
        env=PLAIN,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    left = Path(process.stderr.readline().strip())
    below = psutil.Process(process.pid).children(recursive=True)
    assert isolated("true").returncode == 0
    assert left.exists(), "a folder in use is left alone"

    process.kill()
    process.communicate()
    psutil.wait_procs(below, timeout=120)
    isolated("true")

    assert not left.exists()
