"""What runs inside vLLM's engine process before its workers start.

vLLM hands its engine process an executor class, so a class of ours is code of ours in
that process. It does three things there:

- The engine process ends when the replica does. vLLM's own workers watch the engine
  process, but nothing watches for the replica: killed outright, it would leave an
  engine behind that holds the GPU and that nobody can reach.
- On CPU a single worker is forked: it need not import torch and vLLM once more. vLLM
  would bind its threads through the environment, which OpenMP reads when it is loaded
  and so too early for a fork; here the fork inherits the binding itself.
- On CPU the engine process sleeps while its worker computes. vLLM has it spin, which
  saves microseconds of a step of many milliseconds and takes a core from everything
  else on the machine: the routers, HAProxy and the replica itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from serve_app.engine.vllm_lifeline import end_with_parent

LONGEST_NAP_MS = 1


class AttachedMultiprocExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is untyped here
    """Workers in processes of their own, ending with the replica."""

    def _init_executor(self) -> None:
        if not current_platform.is_cpu():
            super()._init_executor()
        elif self.parallel_config.local_world_size > 1:
            super()._init_executor()
            self._sleep_while_workers_compute()
        else:
            manager = OMPProcessManager(self.vllm_config)
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            with _bound_to(manager.cpu_lists[0] if manager.cpu_lists else ()):
                super()._init_executor()
            self._sleep_while_workers_compute()
        end_with_parent()

    def _sleep_while_workers_compute(self) -> None:
        for queue in self.response_mqs:
            condition = queue._spin_condition
            condition.busy_loop_s = 0.0
            condition.wait = partial(_wait_briefly, condition.wait)


class AttachedUniProcExecutor(UniProcExecutor):  # type: ignore[misc]  # vLLM is untyped here
    """The worker in the engine process, ending with the replica."""

    def _init_executor(self) -> None:
        super()._init_executor()
        end_with_parent()


def attached_executor(vllm_config: Any) -> type[Any]:
    """Return the executor vLLM chose for ``vllm_config``, attached to the replica if it can be.

    Ray's executors and custom ones are returned as they are: Ray ends its own actors.
    """
    chosen: type[Any] = Executor.get_class(vllm_config)
    attached: dict[type[Any], type[Any]] = {
        MultiprocExecutor: AttachedMultiprocExecutor,
        UniProcExecutor: AttachedUniProcExecutor,
    }
    return attached.get(chosen, chosen)


def _wait_briefly(wait: Callable[..., None], timeout_ms: int | None = None) -> None:
    """Wait for a worker's notification, at most a moment: the caller then looks by itself.

    Of two notifications in quick succession vLLM's channel drops the second.
    """
    wait(timeout_ms=LONGEST_NAP_MS if timeout_ms is None else min(timeout_ms, LONGEST_NAP_MS))


@contextmanager
def _bound_to(cpus: Sequence[int]) -> Iterator[None]:
    """Have processes forked in this context compute on ``cpus``, a thread on each.

    None means wherever they like. Threads of this process that start in the context are
    let go with it.
    """
    if not cpus:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    # Sized and not yet used: a pool that has run does not survive a fork.
    torch.set_num_threads(len(cpus))
    try:
        yield
    finally:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), allowed)
