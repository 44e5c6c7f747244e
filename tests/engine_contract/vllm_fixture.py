"""The real engine of the contract suite: the built-in model on vLLM's CPU build.

Starting it takes about a minute, so a session starts it once. It needs the model folder
that ``headrace models prepare smollm2`` makes.
"""

import time

from serve_app import models
from serve_app.config import VllmSettings
from serve_app.core.types import PoolName, ReplicaId
from serve_app.engine.vllm import VllmEngine


async def start_vllm_engine() -> VllmEngine:
    """Start the engine: four slots, 1,024 tokens of context, tools in Hermes' format."""
    settings = VllmSettings(
        model="smollm2",
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=4,
        cpu_kv_cache_gib=0.25,
        extra={"enable_auto_tool_choice": True, "tool_call_parser": "hermes"},
    )
    path = models.resolve(settings.model, models.default_cache_dir())
    engine = VllmEngine(settings, path, PoolName("contract"), ReplicaId("vllm-0"), time.monotonic)
    await engine.start()
    return engine
