"""What runs inside vLLM's engine process before its workers start.

vLLM hands its engine process an executor class, so a class of ours is code of ours in
that process. It does two things there:

- The engine process ends when the replica does. vLLM's own workers watch the engine
  process, but nothing watches for the replica: killed outright, it would leave an
  engine behind that holds the GPU and that nobody can reach.
- On CPU the worker is forked. The engine process itself must be spawned, because the
  replica has threads; its worker need not import torch and vLLM a third time.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.executor.abstract import Executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from serve_app.engine.vllm_lifeline import end_with_parent


class AttachedMultiprocExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is untyped here
    """Workers in processes of their own, ending with the replica."""

    def _init_executor(self) -> None:
        if current_platform.is_cpu():
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        super()._init_executor()
        end_with_parent()


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
