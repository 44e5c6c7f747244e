"""The simulated stack of `headrace drill`: configs/drills.yaml, started and ended with it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import yaml

from serve_app import ray_env
from serve_app.terminal import CommandFailed

CONFIG: Final = Path(__file__).resolve().parents[2] / "configs" / "drills.yaml"
READY_S: Final = 240.0
STOP_S: Final = 30.0
_TAIL: Final = 2000


@dataclass(frozen=True, slots=True)
class SimulatedStack:
    """A stack that is up. ``root`` is the process id of its `headrace up`."""

    url: str
    key: str
    root: int
    dashboard: str
    document: dict[str, Any]
    environment: dict[str, str]
    folder: Path


@contextmanager
def simulated_stack(say: Callable[[str], None], config: Path = CONFIG) -> Iterator[SimulatedStack]:
    """Start the stack on free ports of this machine, yield it when ready, end it.

    Raises:
        CommandFailed: it has no configuration, or did not start.
    """
    if not config.is_file():
        raise CommandFailed(f"{config} is missing: run it in a checkout, or give --url")
    folder = Path(tempfile.mkdtemp(prefix="drill"))
    key, port = secrets.token_hex(16), _free_port()
    environment = {
        **os.environ,
        **ray_env.missing(config.with_name(ray_env.FILE_NAME), os.environ),
        "HEADRACE_PORT": str(port),
        "HEADRACE_BOOTSTRAP_KEY": key,
    }
    say(f"starting the simulated stack of {config.name}")
    log = folder / "up.log"
    with log.open("wb") as printed:
        process = subprocess.Popen(  # noqa: S603  # this program itself
            [sys.executable, "-m", "serve_app.cli", "up", str(config)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(process, url, log)
        say("the stack serves")
        document = yaml.safe_load(config.read_text())
        document["http_options"] = {"host": "127.0.0.1", "port": port}
        yield SimulatedStack(url, key, process.pid, _dashboard(log), document, environment, folder)
    finally:
        say("ending the stack")
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while "endpoint " not in (printed := log.read_text(errors="replace")):
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise CommandFailed(f"the simulated stack did not start:\n{printed[-_TAIL:]}")
        time.sleep(0.2)
    # `up` waits for one pool; drills use every one.
    while time.monotonic() < deadline_s:
        with suppress(httpx.HTTPError, ValueError, KeyError):
            pools = httpx.get(f"{url}/ready", timeout=5).json()["pools"]
            if all(each["ready"] for each in pools.values()):
                return
        time.sleep(0.2)
    raise CommandFailed("the simulated stack's pools did not become ready")


def _dashboard(log: Path) -> str:
    found = re.search(r"dashboard (http://\S+)", log.read_text(errors="replace"))
    return found[1] if found else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        _, alive = psutil.wait_procs(below, timeout=5)
        for each in alive:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    if process.poll() is None:
        process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
