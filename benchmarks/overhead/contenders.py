"""What is compared: each started fresh, alone, and ended completely."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from benchmarks.overhead import config
from benchmarks.overhead.peers import LITELLM, VLLM_ROUTER, program
from benchmarks.overhead.usage import Roles
from benchmarks.real_model.servers import MODEL_NAME, bare_vllm
from serve_app import models
from serve_app.errors import ConfigError
from tests.stack import ROOT, free_port, running_stack

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
LITELLM_KEY = "sk-3f9c1e7a5b2d4860-bench-overhead"

OURS, OURS_OFF, BARE = "headrace", "headrace, governance off", "bare server"
VLLM = "vllm serve, real model"
OURS_HANDLE, OURS_TWO = "headrace, handle transport", "headrace, 2 routers"


@dataclass(frozen=True, slots=True)
class Contender:
    """A server that has answered. ``roles`` finds its processes anew at each call.

    ``models`` are those it serves; a real model is not ``simulated``.
    """

    url: str
    key: str
    roles: Callable[[], Roles]
    models: frozenset[str] = frozenset(config.ENGINES)
    simulated: bool = True


@contextmanager
def headrace(document: dict[str, Any]) -> Iterator[Contender]:
    """The whole chain: HAProxy, router, engine, as `headrace up` starts it."""
    with running_stack(document, ready_timeout_s=READY_TIMEOUT_S) as stack:

        def roles() -> Roles:
            found: dict[str, list[psutil.Process]] = {}
            for process in stack.root.children(recursive=True):
                found.setdefault(_headrace_role(process), []).append(process)
            return found

        _first_answers(stack.url, stack.key)
        yield Contender(stack.url, stack.key, roles)


@contextmanager
def bare() -> Iterator[Contender]:
    """The simulated engine behind uvicorn, and nothing between."""
    with _bare_server() as (url, process):
        yield Contender(url, "none", lambda: {"engine": [process]})


@contextmanager
def litellm() -> Iterator[Contender]:
    """LiteLLM's proxy with a master key, in front of the bare server."""
    with _bare_server() as (upstream, engine), tempfile.TemporaryDirectory() as folder:
        models = [
            {
                "model_name": name,
                "litellm_params": {
                    "model": f"openai/{name}",
                    "api_base": f"{upstream}/v1",
                    "api_key": "none",
                },
            }
            for name in config.ENGINES
        ]
        file = Path(folder) / "litellm.yaml"
        settings = {"model_list": models, "general_settings": {"master_key": LITELLM_KEY}}
        file.write_text(yaml.safe_dump(settings))
        port = free_port()
        command = [
            *(str(program(LITELLM)), "--config", str(file), "--host", "127.0.0.1"),
            *("--port", str(port), "--num_workers", "1"),
        ]
        url = f"http://127.0.0.1:{port}"
        environment = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        with _server(command, f"{url}/health/liveliness", environment) as process:
            _first_answers(url, LITELLM_KEY)
            yield Contender(url, LITELLM_KEY, lambda: _two_roles("proxy", process, engine))


@contextmanager
def vllm_router() -> Iterator[Contender]:
    """The Rust router of vLLM, round robin, in front of the bare server."""
    with _bare_server() as (upstream, engine):
        port = free_port()
        command = [
            *(str(program(VLLM_ROUTER)), "--worker-urls", upstream, "--policy", "round_robin"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            *("--log-level", "warning"),
        ]
        url = f"http://127.0.0.1:{port}"
        with _server(command, f"{url}/health", {}) as process:
            _first_answers(url, "none")
            yield Contender(url, "none", lambda: _two_roles("router", process, engine))


@contextmanager
def vllm_serve() -> Iterator[Contender]:
    """Bare ``vllm serve`` on the default model, real: what computing takes, beside serving it."""
    folder = models.resolve(MODEL_NAME, models.default_cache_dir())
    with bare_vllm(folder, name="sim") as server:

        def roles() -> Roles:
            children = server.root.children(recursive=True)
            return {"server": [server.root], "engine": children}

        yield Contender(server.url, server.key, roles, frozenset({"sim"}), simulated=False)


def model_is_there() -> bool:
    """Tell whether the default model has been prepared."""
    try:
        models.resolve(MODEL_NAME, models.default_cache_dir())
    except ConfigError:
        return False
    return True


CONTENDERS: Mapping[str, Callable[[], AbstractContextManager[Contender]]] = {
    BARE: bare,
    OURS: lambda: headrace(config.stack()),
    OURS_OFF: lambda: headrace(config.stack(governance=False)),
    OURS_HANDLE: lambda: headrace(config.stack(transport="handle")),
    OURS_TWO: lambda: headrace(config.stack(routers=2)),
    VLLM_ROUTER: vllm_router,
    LITELLM: litellm,
    VLLM: vllm_serve,
}
"""By name, in the order they run and stand in the table."""


def _headrace_role(process: psutil.Process) -> str:
    try:
        line = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return "ray"
    if "ServeReplica:gateway:Router" in line:
        return "router"
    if "ServeReplica:pool-" in line:
        return "engine"
    if "ServeReplica:control" in line:
        return "control"
    return "haproxy" if "haproxy" in line.split(" ", 1)[0] else "ray"


def _two_roles(name: str, front: psutil.Process, engine: psutil.Process) -> Roles:
    return {name: [front, *front.children(recursive=True)], "engine": [engine]}


@contextmanager
def _bare_server() -> Iterator[tuple[str, psutil.Process]]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "benchmarks.overhead.bare", "--port", str(port)]
    with _server(command, f"{url}/health", {}) as process:
        _first_answers(url, "none")
        yield url, process


@contextmanager
def _server(
    command: Sequence[str], ready_url: str, environment: Mapping[str, str]
) -> Iterator[psutil.Process]:
    """Start a command, yield it once its URL answers, end it and its children."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with open(log, "wb") as output:
            process = psutil.Popen(
                command,
                cwd=ROOT,
                env={**_plain_environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(ready_url, process, log)
            yield process
        finally:
            try:
                descendants = process.children(recursive=True)
                process.terminate()
            except psutil.NoSuchProcess:
                descendants = []
            _, alive = psutil.wait_procs([process, *descendants], timeout=STOP_TIMEOUT_S)
            for each in alive:
                each.kill()
            psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)


def _plain_environment() -> dict[str, str]:
    kept = ("PATH", "LANG", "TMPDIR", "HOME")
    return {name: os.environ[name] for name in kept if name in os.environ}


def _wait(url: str, process: psutil.Popen, log: Path) -> None:
    deadline_s = time.monotonic() + READY_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{process.args[0]} did not start:\n{tail}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)


def _first_answers(url: str, key: str) -> None:
    """Ask every engine for one token."""
    headers = {"authorization": f"Bearer {key}"}
    for model in config.ENGINES:
        message = {"role": "user", "content": "Hi"}
        body = {"model": model, "messages": [message], "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60)
        if answer.status_code != 200:
            raise RuntimeError(f"{model} answered {answer.status_code}: {answer.text}")
