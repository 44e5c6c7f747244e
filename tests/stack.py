"""A whole Headrace of a test's own: started by `headrace up`, gone without a trace.

    with running_stack(ROOT / "configs" / "sim.yaml") as stack:
        stack.openai().chat.completions.create(...)

The stack has process ids of its own (a namespace), so that everything in it ends with it,
and with the test process if that is killed. The network is the test session's, which
`scripts/isolated` makes a private one; ports are chosen free all the same. Where
namespaces cannot be had, the stack's processes are found by descent and killed.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import yaml

from serve_app import ray_env

if TYPE_CHECKING:
    import openai

ROOT = Path(__file__).resolve().parents[1]
RAY_ENV = ROOT / "configs" / "ray.env"
KEY = "stack-bootstrap-key-0123456789"
POLL_S = 0.1
# Ray Serve 2.60 never gives back the port of a replica that was killed.
ROUTER_PORTS = 200
# Between those of token channels and those of routers, below what the kernel picks from.
OWN_PORTS = range(22_000, 30_000)
_GIVEN: set[int] = set()
STOP_TIMEOUT_S = 30.0
# What a busy machine starts slowly is started no sooner by being killed.
PATIENT = {
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
TAIL_CHARACTERS = 6000
HAPROXY_SOCKET_PATH_CHARACTERS = 97


class StackFailed(Exception):
    """The stack did not start; the message ends with what it printed."""


@dataclass
class Stack:
    """A running stack. ``root`` is its first process, ``folder`` holds all its files."""

    url: str
    key: str
    folder: Path
    environment: Mapping[str, str]
    root: psutil.Process
    start_s: float = field(default=0.0)

    def openai(self, **options: Any) -> openai.OpenAI:
        """Return a client with the admin key that does not retry by itself."""
        import openai  # takes a second

        settings = {"api_key": self.key, "max_retries": 0, "timeout": 120.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        """Return an asynchronous client with the admin key that does not retry by itself."""
        import openai  # takes a second

        settings = {"api_key": self.key, "max_retries": 0, "timeout": 120.0, **options}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **settings)

    def http(self, key: str | None = KEY, **options: Any) -> httpx.Client:
        """Return a plain HTTP client; ``key=None`` sends none."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **options)

    def command(
        self, *arguments: str | Path, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run a command among the stack's processes and with its environment."""
        return subprocess.run(
            [*self._enter(), *map(str, arguments)],
            cwd=self.folder,
            env=dict(self.environment),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def headrace(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a `headrace` subcommand against this stack."""
        return self.command(sys.executable, "-m", "serve_app.cli", *arguments)

    def deploy(self, config: Mapping[str, Any]) -> subprocess.CompletedProcess[str]:
        """Hand the running stack another configuration with Ray's own `serve deploy`."""
        file = self.folder / "next.yaml"
        document = {**config, "http_options": {"host": "127.0.0.1", "port": self.port}}
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        serve = Path(sys.executable).with_name("serve")
        return self.command(serve, "deploy", file, "--address", self._dashboard())

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        return int(self.environment["HEADRACE_PORT"])

    def processes(self, *words: str) -> list[psutil.Process]:
        """Return the stack's live processes whose command line has all these words."""
        found = []
        for process in self.root.children(recursive=True):
            try:
                line = " ".join(process.cmdline()) or process.name()
            except psutil.Error:
                continue
            if all(word in line for word in words):
                found.append(process)
        return found

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that carry these labels; 0 if there is none."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.http().get("/metrics").raise_for_status().text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def output(self) -> str:
        """Return what `headrace up` has printed so far."""
        return (self.folder / "up.log").read_text(errors="replace")

    def worker_lines(self) -> list[str]:
        """Return the lines that our processes under Ray have logged."""
        logs = (self.folder / "r").glob("ray/session_2*/logs/worker-*.err")
        return [line for log in logs for line in log.read_text(errors="replace").splitlines()]

    def ray_logs(self) -> str:
        """Return the end of every log file of Ray and Serve that is not empty."""
        logs = sorted((self.folder / "r").glob("ray/session_2*/logs/**/*.*"))
        parts = [
            f"--- {path.name}\n{path.read_text(errors='replace')[-TAIL_CHARACTERS:]}"
            for path in logs
            if path.is_file() and path.suffix in {".log", ".err", ".out"} and path.stat().st_size
        ]
        return "\n".join(parts)

    def _dashboard(self) -> str:
        """Return the address of Ray's dashboard, through which Serve takes configurations."""
        [log] = (self.folder / "r").glob("ray/session_2*/logs/dashboard.log")
        found = re.findall(r"address: (127\.0\.0\.1:\d+)", log.read_text(errors="replace"))
        return f"http://{found[-1]}"

    def _enter(self) -> list[str]:
        if not can_isolate():
            return []
        first = self.root.children()[0].pid
        return ["nsenter", f"--target={first}", "--pid", "--mount", f"--wdns={self.folder}", "--"]


@contextmanager
def running_stack(
    config: Path | Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    command: Sequence[str] = (sys.executable, "-m", "serve_app.cli", "up"),
    fast_path: bool = True,
    prepare: Callable[[Path], None] = lambda folder: None,
    beside: Callable[[Stack], AbstractContextManager[object]] = nullcontext,
    ready_timeout_s: float = 480,
) -> Iterator[Stack]:
    """Start a configuration, yield it once it is ready, and end every process of it.

    ``config`` is a file or a document to write as one. Its relative paths (the database)
    lie in the stack's folder. ``command`` is what starts it, given the file. Without
    ``fast_path`` Ray's flags of configs/ray.env are not set here, as in a plain `serve run`.
    ``prepare`` is called with the stack's folder before it starts; ``beside`` is entered with the
    stack as soon as it runs, before it is ready, and left before it ends.
    A port in ``environment`` (HEADRACE_PORT) is taken in place of a free one.

    Raises:
        StackFailed: it ended, or was not ready in time.
    """
    folder = Path(tempfile.mkdtemp(prefix="s"))
    file = _write_config(folder, config)
    prepare(folder)
    port = int((environment or {}).get("HEADRACE_PORT", free_port()))
    settings = {
        **os.environ,
        **(ray_flags() if fast_path else {}),
        **PATIENT,
        **_private_paths(folder),
        **_private_ports(),
        "HEADRACE_PORT": str(port),
        "HEADRACE_BOOTSTRAP_KEY": KEY,
        "PYTHONPATH": str(ROOT),
        **(environment or {}),
    }
    started_at_s = time.monotonic()
    with open(folder / "up.log", "wb") as log:
        process = subprocess.Popen(
            [*_namespace(), *command, str(file)],
            cwd=folder,
            env=settings,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stack = Stack(
        url=f"http://127.0.0.1:{port}",
        key=settings["HEADRACE_BOOTSTRAP_KEY"],
        folder=folder,
        environment=settings,
        root=psutil.Process(process.pid),
    )
    try:
        with beside(stack):
            _wait_until_ready(stack, process, started_at_s + ready_timeout_s)
            stack.start_s = time.monotonic() - started_at_s
            yield stack
    finally:
        _end(process, stack.root, command)
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a TCP port that nothing on loopback listens on right now.

    It is none that the kernel gives to whoever asks for any: half a minute passes until HAProxy
    has it, and Ray asks for a hundred meanwhile. No port is returned twice.
    """
    while True:
        port = secrets.choice(OWN_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _GIVEN:
                _GIVEN.add(port)
                return port


def ray_flags() -> dict[str, str]:
    """Return the settings of configs/ray.env, and HAProxy's program."""
    return ray_env.missing(RAY_ENV, {})


@cache
def can_isolate() -> bool:
    """Tell whether this process may make process-id namespaces."""
    try:
        probe = [*_unshare(), "true"]
        return subprocess.run(probe, capture_output=True, timeout=120, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _unshare() -> list[str]:
    flags = ["--pid", "--fork", "--mount", "--mount-proc", "--kill-child"]
    return ["setpriv", "--pdeathsig", "KILL", "--", "unshare", *flags, "--"]


def _namespace() -> Sequence[str]:
    """Return what to put before a command so that all it starts ends with us.

    The bash in between is process 1 of the namespace and reaps orphans.
    """
    if not can_isolate():
        return ()
    return [*_unshare(), "bash", "-c", '"$@"; exit $?', "bash"]


def _write_config(folder: Path, config: Path | Mapping[str, Any]) -> Path:
    if isinstance(config, Path):
        return config.resolve()
    file = folder / "stack.yaml"
    file.write_text(yaml.safe_dump(dict(config), sort_keys=False))
    return file


def _private_paths(folder: Path) -> dict[str, str]:
    """Return the environment that keeps a stack's files in its folder.

    Models are shared, and what vLLM has found out about their classes, in twenty seconds.
    """
    paths = {name: folder / name for name in ("r", "t", "h", "p")}
    for path in paths.values():
        path.mkdir()
    models = os.environ.get("HEADRACE_HOME") or str(Path.home() / ".cache" / "headrace")
    return {
        "RAY_TMPDIR": str(paths["r"]),
        "TMPDIR": str(paths["t"]),
        "HOME": str(paths["h"]),
        "HEADRACE_HOME": models,
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT")
        or str(Path.home() / ".cache" / "vllm"),
        **_haproxy_paths(paths["p"]),
    }


def _haproxy_paths(folder: Path) -> dict[str, str]:
    """Return where HAProxy's files go, or nothing where its sockets' paths grew too long.

    Ray puts a folder named by the node's 56-character id below it.
    """
    longest = folder / ("n" * 56) / "metrics.sock"
    if len(str(longest)) > HAPROXY_SOCKET_PATH_CHARACTERS:
        return {}
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def _private_ports() -> dict[str, str]:
    """Return the environment by which two stacks in one network do not meet.

    Routers and Serve's fallback proxy share a port with whoever listens there already, so
    that one stack's HAProxy would send to the other's.
    """
    blocks = list(range(30_000, 32_000, ROUTER_PORTS))
    random.shuffle(blocks)
    first = next(block for block in blocks if _all_free(block, ROUTER_PORTS))
    return {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + ROUTER_PORTS - 1),
    }


def _all_free(first: int, count: int) -> bool:
    for port in range(first, first + count):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                return False
    return True


def _wait_until_ready(stack: Stack, process: subprocess.Popen[bytes], deadline_s: float) -> None:
    with stack.http(key=None) as client:
        while True:
            if process.poll() is not None:
                raise StackFailed(f"it ended with {process.returncode}:\n{_story(stack)}")
            if time.monotonic() > deadline_s:
                raise StackFailed(f"it was not ready in time:\n{_story(stack)}")
            try:
                if client.get("/ready", timeout=2).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(POLL_S)


def _story(stack: Stack) -> str:
    return stack.output()[-TAIL_CHARACTERS:] + "\n" + stack.ray_logs()[-2 * TAIL_CHARACTERS :]


def _end(process: subprocess.Popen[bytes], root: psutil.Process, command: Sequence[str]) -> None:
    """Ask the stack to stop, then kill whatever is left of it."""
    try:
        descendants = root.children(recursive=True)
    except psutil.NoSuchProcess:
        descendants = []
    asked = [child for child in descendants if " ".join(command) in _command_line(child)]
    for child in asked or [root]:
        try:
            child.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            continue
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()  # unshare's child is killed with it, and the namespace with that
        process.wait()
    for child in descendants:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(descendants, timeout=60)


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
