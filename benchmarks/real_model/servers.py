"""The two servers that are compared, each started fresh and ended completely."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.stack import ROOT, free_port, running_stack

CONFIG = ROOT / "configs" / "local.yaml"
MODEL_NAME = "smollm2"
READY_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
VLLM_VERSION = "0.32.0+cpu"


@dataclass(frozen=True, slots=True)
class Server:
    """A server that has answered once. ``start_s`` is from its command to that answer.

    ``root`` is its first process, all others descend from it.
    """

    url: str
    key: str
    model: str
    start_s: float
    root: psutil.Process


@contextmanager
def headrace() -> Iterator[Server]:
    """The whole chain: HAProxy, router, in-process engine; `headrace up configs/local.yaml`."""
    started_at_s = time.monotonic()
    settings = {"VLLM_CACHE_ROOT": str(_vllm_cache())}
    with running_stack(CONFIG, environment=settings, ready_timeout_s=READY_TIMEOUT_S) as stack:
        first_answer(stack.url, stack.key, MODEL_NAME)
        start_s = time.monotonic() - started_at_s
        yield Server(stack.url, stack.key, MODEL_NAME, start_s, stack.root)


@contextmanager
def bare_vllm(model_folder: Path, name: str = MODEL_NAME) -> Iterator[Server]:
    """``vllm serve`` with the engine settings that configs/local.yaml gives Headrace's engine."""
    port = free_port()
    key = "bench-key"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key", key),
        *("--served-model-name", name),
        *("--disable-uvicorn-access-log", "--uvicorn-log-level", "warning"),
        *engine_flags(engine_settings()),
    ]
    started_at_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vllm.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                env=_vllm_environment(Path(folder)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(f"{url}/health", process, log, started_at_s + READY_TIMEOUT_S)
            first_answer(url, key, name)
            start_s = time.monotonic() - started_at_s
            yield Server(url, key, name, start_s, psutil.Process(process.pid))
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def engine_settings() -> dict[str, Any]:
    """Return the engine settings of configs/local.yaml."""
    document = yaml.safe_load(CONFIG.read_text())
    [engine] = [
        application["args"]["engine"]
        for application in document["applications"]
        if application["import_path"] == "serve_app.app:pool"
    ]
    return dict(engine)


def engine_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the flags of ``vllm serve`` that say the same as these settings.

    Raises:
        ValueError: a setting has no flag here, so the comparison would not be fair.
    """
    flags: list[str] = []
    for name, value in settings.items():
        if name in {"kind", "model", "revision"}:
            continue
        if name == "cpu_kv_cache_gib":
            flags += ["--kv-cache-memory-bytes", str(int(value * 2**30))]
        elif name == "extra":
            flags += engine_flags(value)
        elif value is True:
            flags.append(f"--{name.replace('_', '-')}")
        elif isinstance(value, bool | list | dict):
            raise ValueError(f"engine.{name}: {value!r} has no flag in this comparison")
        else:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def first_answer(url: str, key: str, model: str) -> None:
    """Ask for one token: a server has started when it has generated."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    headers = {"authorization": f"Bearer {key}"}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=120)
    response.raise_for_status()


def _vllm_environment(folder: Path) -> dict[str, str]:
    """Return the environment in which the CPU package's command runs.

    It looks for a distribution named ``vllm``, which the CPU package is not: one of only
    a name and a version is put on its path, in a folder that goes with it.
    """
    metadata = folder / f"vllm-{VLLM_VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n"
    )
    return {
        **os.environ,
        "PYTHONPATH": str(folder),
        "VLLM_CACHE_ROOT": str(_vllm_cache()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }


def _vllm_cache() -> Path:
    """Return where vLLM keeps what it found out about models: it starts sooner the next time."""
    return Path.home() / ".cache" / "vllm"


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, deadline_s: float) -> None:
    while True:
        if process.poll() is not None or time.monotonic() > deadline_s:
            tail = log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"vllm serve did not start:\n{tail}")
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
