"""`headrace drill`: names, the stack that must not be hurt by mistake, exit status, JSON."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve_app import cli
from serve_app.config_file import load
from serve_app.drills.frame import DRILLS
from serve_app.drills.stack import CONFIG
from serve_app.drills.target import Names

pytestmark = pytest.mark.slow


@pytest.fixture
def stack(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server whose one replica is simulated or not, with no process and no request.

    Like one that has just started it says nothing the first time.
    """
    simulated = request.param
    asked = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            text = f"headrace_replica_up 1\nheadrace_engine_simulated {simulated}\n"
            if self.path == "/metrics" and next(asked) == 0:
                text = ""
            body = b'{"pools": {}}' if self.path == "/ready" else text.encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def drill(*words: str) -> int:
    return cli.main(["drill", *words])


def test_the_list_says_what_each_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert drill("--list") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in DRILLS)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "name a drill"),
        (("engine-kil",), "no drill engine-kil; there are: "),
        (("engine-kill", "--url", "ftp://x", "--admin-key", "k"), "must start with http"),
        (("engine-kill", "--url", "http://x"), "HEADRACE_ADMIN_KEY"),
    ],
)
def test_a_mistake_is_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    why: str,
) -> None:
    monkeypatch.delenv("HEADRACE_ADMIN_KEY", raising=False)
    assert drill(*words) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("stack", [0], indirect=True)
def test_what_is_not_simulated_is_left_alone_unless_it_is_meant(
    capsys: pytest.CaptureFixture[str], stack: str
) -> None:
    words = ("rollback", "--url", stack, "--admin-key", "k")
    assert drill(*words) == 1
    assert "--i-mean-it" in capsys.readouterr().err
    assert drill(*words, "--i-mean-it") == 1
    assert "cannot be run here: it needs --dashboard" in capsys.readouterr().out


@pytest.mark.parametrize("stack", [1], indirect=True)
def test_a_drill_that_fails_is_status_1_and_one_object(
    capsys: pytest.CaptureFixture[str], stack: str
) -> None:
    where = ("--url", stack, "--admin-key", "k", "--root", str(os.getpid()))
    assert drill("engine-kill", "rollback", "--json", *where) == 1
    assert "another stack" in capsys.readouterr().err
    assert drill("engine-kill", "rollback", "--json", *where, "--i-mean-it") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert [each["drill"] for each in found["drills"]] == ["engine-kill", "rollback"]
    assert all(each["why"].startswith("cannot be run here") for each in found["drills"])


def test_a_stack_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert drill("rollback", "--url", "http://127.0.0.1:1", "--admin-key", "k") == 1
    assert "cannot reach http://127.0.0.1:1" in capsys.readouterr().err


def test_the_stack_of_the_drills_has_what_they_use() -> None:
    file, names = load(CONFIG), Names()
    assert {names.pool, names.tight} <= file.pools.keys()
    assert {names.model, names.tight_model} <= file.router.aliases.keys()
    assert file.router.tenants[names.quota_tenant].limits.requests_per_min
    assert file.pools[names.tight].replicas.num_replicas == 1


# A stack and drills that say on stdout what they do, and what they are told. They have put
# things back once they were told to end as often as they are going to be.
ENDED = """
import asyncio, contextlib, os, pathlib, signal, sys, time, types
if "nohup" not in sys.argv:  # these tests may run under one
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
from serve_app import cli
from serve_app.commands import drill
from serve_app.drills import frame, stack

told, times = [], 1 if "nohup" in sys.argv else 2
heed = drill._Ending._heed

def counted(self, *of):
    told.append(of)
    os.write(1, b"told\\n")
    heed(self, *of)

@contextlib.contextmanager
def simulated_stack(say):
    try:
        if "starts" in sys.argv:
            print("starting", flush=True)
            time.sleep(600)
        yield stack.SimulatedStack("http://x", "k", 1, "", {}, {}, pathlib.Path())
    finally:
        say("ending the stack")
        if "ends" in sys.argv:
            print("ending", flush=True)
        while len(told) < times:
            time.sleep(0.01)
        print("ended", flush=True)

async def run(stage):
    if "ends" in sys.argv:
        return
    print("broken", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        stage.say("back")
        while len(told) < times:
            await asyncio.sleep(0.01)
        print("back", flush=True)
        if "fails" in sys.argv:
            raise frame.DrillImpossible("not quite")

async def may_be_hurt(*_, **__):
    pass

stack.simulated_stack, drill._may_be_hurt = simulated_stack, may_be_hurt
drill._Ending._heed = counted
frame.load = lambda _: types.SimpleNamespace(run=run)
sys.exit(cli.main(["drill", "rollback", "brownout"]))
"""


def ended_while(what: str, signum: int, stderr: int | None = None) -> tuple[list[str], str, int]:
    """Have it told twice, as a group is; return what it printed and its status."""
    command = [sys.executable, "-c", ENDED, what]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=pipe, stderr=stderr or said, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            printed = [process.stdout.readline().strip()]
            for _ in range(2):
                process.send_signal(signum)
                while (line := process.stdout.readline().strip()) not in ("told", ""):
                    printed.append(line)
            printed += process.stdout.read().split()
            status = process.wait(240)
        finally:
            process.kill()
        said.seek(0)
        return printed, said.read(), status


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("what", "printed"),
    [
        ("starts", ["starting", "ended"]),
        ("runs", ["broken", "back", "ended"]),
        ("fails", ["broken", "back", "ended"]),
        ("ends", ["ending", "ended"]),
    ],
)
def test_a_drill_that_is_told_to_end_puts_back_what_it_broke(
    what: str, printed: list[str], signum: int
) -> None:
    found, said, status = ended_while(what, signum)
    assert (found, status) == (printed, cli.EXIT_INTERRUPTED), said
    assert "headrace: interrupted" in said
    assert ("not quite" in said) == (what == "fails")


def test_a_terminal_that_hung_up_keeps_nothing_from_being_put_back() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        found, _, _ = ended_while("runs", signal.SIGHUP, stderr=writer)
    finally:
        os.close(writer)
    assert found == ["broken", "back", "ended"]


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    command = ["nohup", sys.executable, "-c", ENDED, "starts", "nohup"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == cli.EXIT_INTERRUPTED
