"""Which engine runs on which GPU of this node, and its end: Serve starts another."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol

import psutil

from serve_app.gpu_sources import SourceFailed, load_nvml

# Ray's title of an Engine replica's process: ray::ServeReplica:APPLICATION:Engine.
_TITLE: Final = ("ServeReplica:", ":Engine")
_PID_PREFIX: Final = "pid:"
_DEVICES: Final = Path("/dev")


class EngineNotFound(Exception):
    """It cannot be told which process to end; the message says why."""


class Engines(Protocol):
    """The engines of this node."""

    def restart(self, gpu: str) -> list[int]:
        """End the engines on a GPU and return their process ids; Serve replaces them.

        Raises:
            EngineNotFound: there is none, or it cannot be told which.
            psutil.Error: one could not be ended; the others were.
        """


class ProcessEngines:
    """Engines as processes; seeing them takes the node's process ids (``hostPID``).

    NVML tells who uses a GPU. Where it is not installed a node with a single engine and a
    single GPU leaves no question. A GPU called ``pid:N``, as a simulated source
    may, is used by that process.
    """

    def __init__(
        self,
        nvml: Callable[[], ModuleType] = load_nvml,
        processes: Callable[[], Iterable[Any]] = psutil.process_iter,
        gpus: Callable[[], int] | None = None,
    ) -> None:
        self._nvml = nvml
        self._processes = processes
        self._gpus = gpus or count_gpus

    def restart(self, gpu: str) -> list[int]:
        """See Engines."""
        engines = {each.pid: each for each in self._processes() if is_engine(each)}
        if not engines:
            raise EngineNotFound("no engine runs on this node, or hostPID is not set")
        users = self._users(gpu, only=len(engines) == 1)
        found = [
            engine
            for pid, engine in engines.items()
            if users is None or pid in users or users & _descendants(engine)
        ]
        if not found:
            raise EngineNotFound(f"none of the node's {len(engines)} engines uses GPU {gpu}")
        failed: psutil.Error | None = None
        for engine in found:
            try:
                engine.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue  # it has ended by itself
            except psutil.Error as error:
                failed = error
        if failed is not None:
            raise failed
        return sorted(engine.pid for engine in found)

    def _users(self, gpu: str, *, only: bool) -> set[int] | None:
        """Return the processes on a GPU; None where the node's only engine must be it."""
        if gpu.startswith(_PID_PREFIX):
            pid = gpu.removeprefix(_PID_PREFIX)
            return {int(pid)} if pid.isascii() and pid.isdigit() else set()
        try:
            nvml: Any = self._nvml()
        except SourceFailed as error:
            if only and self._gpus() == 1:
                return None
            raise EngineNotFound(f"which engine uses GPU {gpu} cannot be told: {error}") from error
        try:
            nvml.nvmlInit()
            device = nvml.nvmlDeviceGetHandleByUUID(gpu)
            return {each.pid for each in nvml.nvmlDeviceGetComputeRunningProcesses(device)}
        except nvml.NVMLError as error:
            raise EngineNotFound(f"which engine uses GPU {gpu} cannot be told: {error}") from error


def count_gpus(folder: Path = _DEVICES) -> int:
    """Return how many NVIDIA GPUs the node shows, by its devices /dev/nvidia0, 1, ..."""
    return sum(each.name.removeprefix("nvidia").isdigit() for each in folder.glob("nvidia*"))


def is_engine(process: Any) -> bool:
    """Tell whether a process is an Engine replica of Ray Serve's."""
    try:
        line = " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return False
    return all(part in line for part in _TITLE)


def _descendants(process: Any) -> set[int]:
    try:
        return {child.pid for child in process.children(recursive=True)}
    except psutil.Error:
        return set()
