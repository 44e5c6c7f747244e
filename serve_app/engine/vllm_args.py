"""From our settings to vLLM's arguments and environment.

``prepare_environment`` must run before vLLM is imported anywhere in the process.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import MutableMapping
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from serve_app.config import VllmSettings

GIB = 2**30


def prepare_environment(environment: MutableMapping[str, str], *, on_cpu: bool) -> None:
    """Set what vLLM and its libraries read at import; what is set already stays."""
    defaults = {
        # Models are folders on disk: nothing may be fetched while serving.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
        # The replica has threads (gRPC, tokenizers): a forked engine could deadlock.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
    if on_cpu:
        # The engine runs eagerly there, but vLLM's logprobs would still be compiled at the
        # first request that asks for them, and stall every other one for half a minute.
        defaults["TORCH_COMPILE_DISABLE"] = "1"
    for name, value in defaults.items():
        environment.setdefault(name, value)


def served_name(settings: VllmSettings) -> str:
    """Return the name under which vLLM serves the model: the last part of its path."""
    return Path(settings.model).name or settings.model


def engine_and_frontend_args(settings: VllmSettings, model_path: Path) -> tuple[Any, Namespace]:
    """Return vLLM's AsyncEngineArgs and the namespace its OpenAI layer is built from.

    ``settings.extra`` may name fields of either.

    Raises:
        ValueError: a value or a name in ``extra`` is not one vLLM takes.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import FrontendArgs
    from vllm.platforms import current_platform

    engine_names = {f.name for f in fields(AsyncEngineArgs)}
    frontend_names = {f.name for f in fields(FrontendArgs)}
    ours = _engine_fields(settings, model_path, on_cpu=current_platform.is_cpu())
    extra_engine: dict[str, Any] = {}
    extra_frontend: dict[str, Any] = {}
    for name, value in settings.extra.items():
        _check_extra(name, ours.keys(), engine_names | frontend_names)
        (extra_engine if name in engine_names else extra_frontend)[name] = value
    engine_args = AsyncEngineArgs(**ours, **extra_engine)
    frontend_args = FrontendArgs(**({"enable_prompt_tokens_details": True} | extra_frontend))
    return engine_args, Namespace(**(vars(frontend_args) | vars(engine_args)))


def _engine_fields(settings: VllmSettings, model_path: Path, *, on_cpu: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "model": str(model_path),
        "served_model_name": [served_name(settings)],
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "kv_cache_dtype": settings.kv_cache_dtype,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "enable_expert_parallel": settings.enable_expert_parallel,
        "enable_prefix_caching": settings.enable_prefix_caching,
        "enforce_eager": settings.enforce_eager,
        "scheduling_policy": "priority",
        "disable_log_stats": False,
        "enable_log_requests": False,
    }
    if settings.max_model_len is not None:
        arguments["max_model_len"] = settings.max_model_len
    if on_cpu:
        # Without Triton there is nothing to compile for; and VLLM_CPU_KVCACHE_SPACE, the
        # other way to size the cache, takes whole GiB only.
        arguments["enforce_eager"] = True
        arguments["kv_cache_memory_bytes"] = int(settings.cpu_kv_cache_gib * GIB)
    return arguments


def _check_extra(name: str, ours: Any, known: set[str]) -> None:
    if name in ours:
        hint = f"engine.{name}" if name in VllmSettings.model_fields else "nothing: it is ours"
        raise ValueError(f"engine.extra.{name} cannot be set there; set {hint}")
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"engine.extra.{name} is not an argument of vLLM{hint}")
