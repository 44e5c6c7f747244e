"""How fast an engine steps on hardware it was not measured on, from where it was.

Reading weights and KV cache takes memory bandwidth, computing prompts takes throughput: each
coefficient of the step model is the 8B model's on one H100 times the ratio of what has to be
read or computed and of what the hardware does. Against the derived values for a 70B model on
four and eight H100s that is right within 10 %; measure before you promise anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from serve_app.core.engine_parts import EngineParams
from serve_app.core.fit import FitWish, Gpu, Trial
from serve_app.core.model_shape import LLAMA_8B, ModelShape

H100_BANDWIDTH: Final = 3.35e12
H100_BF16_FLOPS: Final = 989e12
GROUP_FACTOR: Final = 1.1
"""What exchanging activations by NVLink adds to a step of a tensor-parallel group."""
PCIE_GROUP_FACTOR: Final = 1.5
"""The same by PCIe: assumed, not measured."""
BLOCK_TOKENS: Final = 16


def estimate_engine(shape: ModelShape, gpu: Gpu, wish: FitWish, trial: Trial) -> EngineParams:
    """Return the size and speed of one replica; ``trial`` must have room for some KV.

    Pipeline stages are counted one after another, as if they never overlapped, which is true
    of a request's latency and pessimistic for a full replica's throughput.
    """
    assert trial.kv_bytes > 0
    group, stages = trial.layout.tensor_parallel, trial.layout.stages
    anchor = EngineParams()
    bandwidth = gpu.bandwidth_bytes_per_s / H100_BANDWIDTH
    flops = gpu.flops_per_s["bf16"] / H100_BF16_FLOPS
    if wish.weights_type == "fp8":
        flops = gpu.flops_per_s.get("fp8", gpu.flops_per_s["bf16"]) / H100_BF16_FLOPS
    exchange = 1.0
    if group > 1:
        exchange = GROUP_FACTOR if gpu.nvlink_bytes_per_s else PCIE_GROUP_FACTOR
    weights_bytes = shape.served_bytes(wish.weights_type) / group
    kept_bytes = _kv_bytes_per_token(shape, wish, group)
    anchor_kept = LLAMA_8B.kv_bytes_per_token("bf16")
    computed = shape.active_parameters / LLAMA_8B.parameters / group
    kv_bytes = trial.kv_bytes * stages
    return EngineParams(
        max_num_seqs=wish.max_num_seqs,
        token_budget=max(wish.token_budget, wish.max_num_seqs),
        kv_blocks=max(1, int(kv_bytes / max(1.0, kept_bytes) / BLOCK_TOKENS)),
        block_tokens=BLOCK_TOKENS,
        overhead_s=anchor.overhead_s * shape.layers / LLAMA_8B.layers,
        weights_s=anchor.weights_s * weights_bytes / LLAMA_8B.weights_bytes / bandwidth * exchange,
        prefill_s_per_token=anchor.prefill_s_per_token * computed / flops,
        context_s_per_token=anchor.context_s_per_token * kept_bytes / anchor_kept / bandwidth,
        batch_s_per_request=anchor.batch_s_per_request,
    )


def rescale(measured: EngineParams, before: EngineParams, after: EngineParams) -> EngineParams:
    """Return an engine that was measured as ``before`` estimates it, as it would be ``after``."""

    def times(name: str) -> float:
        was, base = getattr(before, name), getattr(measured, name)
        return float(base * (getattr(after, name) / was)) if was else float(base)

    return replace(
        measured,
        kv_blocks=max(1, round(times("kv_blocks"))),
        overhead_s=times("overhead_s"),
        weights_s=times("weights_s"),
        prefill_s_per_token=times("prefill_s_per_token"),
        context_s_per_token=times("context_s_per_token"),
    )


def _kv_bytes_per_token(shape: ModelShape, wish: FitWish, group: int) -> float:
    """Return the KV cache of one token on one GPU, windows as they are at the context wished."""
    layers = shape.cached_token_layers(wish.context_tokens) / wish.context_tokens
    return layers * shape.layer_kv_bytes(wish.kv_type, group)
