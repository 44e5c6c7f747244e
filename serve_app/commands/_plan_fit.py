"""``headrace plan fit``: whether a model fits, on how many GPUs, and why."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serve_app.commands._plan_model import Served, add_model_options, served
from serve_app.terminal import Subparsers, command, out

if TYPE_CHECKING:
    from serve_app.core.fit import FitPlan, Layout, Trial

_EXAMPLE = """\
headrace plan fit --model ./llama-70b --gpu H200 --quantization fp8
headrace plan fit --model smollm2 --gpu L4 --context-tokens 4096 --concurrency 64
headrace plan fit --model ./mixtral --gpu B100 --gpu-memory-gib 178 --json"""
_ALTERNATIVES = ((None, "fp8"), ("fp8", "bf16"), ("fp8", "fp8"), ("int4", "bf16"), ("int4", "fp8"))


def add_parser(actions: Subparsers) -> None:
    """Register the action."""
    parser = command(
        actions,
        "fit",
        "Say on how many GPUs a model fits, how they share it, and why.",
        _EXAMPLE,
    )
    add_model_options(parser, required=True)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan. Returns 1 if nothing fits.

    Raises:
        ConfigError: the checkpoint, the GPU or a number is unusable; the message names it.
    """
    from serve_app.core.fit import plan_fit

    model = served(args)
    plan = plan_fit(model.shape, model.gpu, model.wish)
    better = _alternatives(model, plan)
    if args.json:
        out(json.dumps(_document(model, plan, better)))
    else:
        for line in [*_facts(model), "", *_reasoning(model, plan), "", *_advice(model, plan)]:
            out(line)
        for each in better:
            out(each["text"])
    return 0 if plan.chosen is not None else 1


def _facts(model: Served) -> list[str]:
    from serve_app.core.model_shape import GIB

    shape, wish, gpu = model.shape, model.wish, model.gpu
    of = [f"{shape.layers} layers", f"{shape.heads} heads"]
    if shape.latent:
        of.append(f"a latent KV of {shape.latent}")
    else:
        of.append(f"{shape.kv_heads} KV heads of {shape.head_dimension}")
    if shape.windowed_layers:
        of.append(f"{shape.windowed_layers} layers within {shape.window_tokens:,} tokens")
    if shape.stateless_layers:
        of.append(f"{shape.stateless_layers} layers without KV (their state is not counted)")
    if shape.experts:
        of.append(f"{shape.experts_used} of {shape.experts} experts")
    served_gib = shape.served_bytes(wish.weights_type) / GIB
    how = f"as stored in {shape.weights_type}"
    if wish.weights_type != shape.weights_type:
        how = f"in {wish.weights_type}; {shape.weights_bytes / GIB:.1f} stored"
        how += f" in {shape.weights_type}, embeddings stay"
    sequence_gib = shape.sequence_kv_bytes(wish.context_tokens, wish.kv_type) / GIB
    return [
        f"model    {shape.name}: {shape.parameters / 1e9:.3g} B parameters, " + ", ".join(of),
        f"weights  {served_gib:.1f} GiB {how} ({model.source})",
        f"KV       {shape.kv_bytes_per_token(wish.kv_type):,} bytes a token in {wish.kv_type}; "
        f"{sequence_gib:.2f} GiB for {wish.context_tokens:,} tokens",
        f"GPU      {gpu.name}: {gpu.memory_gib:g} GiB, {wish.utilization_ratio:g} of it used: "
        f"{gpu.memory_gib * wish.utilization_ratio:.1f} GiB",
        f"wanted   {wish.concurrency} sequences of {wish.context_tokens:,} tokens a replica",
    ]


def _reasoning(model: Served, plan: FitPlan) -> list[str]:
    # What was passed over matters once one GPU is not enough.
    lines = list(plan.skipped) if len(plan.trials) > 1 else []
    for trial in plan.trials:
        lines.append(f"{_name(model, trial.layout)}: {_arithmetic(trial)}")
        lines.append(f"    {_verdict(model, trial)}")
    return lines


def _name(model: Served, layout: Layout) -> str:
    if layout.gpus == 1:
        return f"1 x {model.gpu.name}"
    shared = [f"TP {layout.tensor_parallel}"] if layout.tensor_parallel > 1 else []
    if layout.stages > 1:
        shared.append(f"PP {layout.stages}")
    nodes = -(-layout.gpus // model.wish.gpus_per_node)
    where = f"on {nodes} nodes" if nodes > 1 else "in a node"
    return f"{layout.gpus} x {model.gpu.name}, {' x '.join(shared)} {where}"


def _arithmetic(trial: Trial) -> str:
    from serve_app.core.model_shape import GIB

    return (
        f"{trial.usable_bytes / GIB:.1f} - {trial.weights_bytes / GIB:.1f} weights "
        f"- {trial.activation_bytes / GIB:.1f} activations - {trial.overhead_bytes / GIB:.1f} "
        f"runtime and graphs = {trial.kv_bytes / GIB:.1f} GiB of KV on each"
    )


def _verdict(model: Served, trial: Trial) -> str:
    from serve_app.core.fit import Verdict
    from serve_app.core.model_shape import GIB

    wish = model.wish
    if trial.verdict is Verdict.NO_ROOM:
        return f"does not fit: {-trial.kv_bytes / GIB:.1f} GiB short before any KV"
    held = f"{trial.kv_tokens:,} tokens, {trial.concurrency} sequences of {wish.context_tokens:,}"
    if trial.verdict is Verdict.TOO_FEW:
        return f"fits, but not usefully: {held}, less than {wish.concurrency}"
    return f"fits: {held}; headroom {trial.headroom_ratio:.2f} of weights and KV"


def _advice(model: Served, plan: FitPlan) -> list[str]:
    chosen, wish = plan.chosen, model.wish
    if chosen is None:
        last = plan.trials[-1]
        return [
            f"No layout of up to {last.layout.gpus} GPUs fits: allow more of them "
            "(--gpus-per-node, --nodes, --tensor-parallel), a larger GPU, fewer bits "
            "(--quantization, --kv-dtype), or less (--context-tokens, --concurrency)."
        ]
    layout = chosen.layout
    lines = [f"-> {_name(model, layout)} a replica; for more traffic, more replicas."]
    if layout.gpus == 1:
        lines[0] = f"-> one {model.gpu.name} a replica; for more traffic, more replicas."
    elif layout.tensor_parallel > 1 and not model.gpu.nvlink_bytes_per_s:
        lines.append(f"   {model.gpu.name} has no NVLink: every layer's exchange goes over PCIe.")
    settings = _settings(model, layout)
    words = ", ".join(f"{name}: {_yaml(value)}" for name, value in settings.items())
    lines.append(f"   engine: {{{words}}}")
    if wish.weights_type in ("int4", "int8") and not model.shape.quantized:
        lines.append(f"   {wish.weights_type} takes a checkpoint quantized so (AWQ, GPTQ).")
    if layout.stages > 1:
        lines.append(
            "   A group is one failure domain, and a request passes its stages one by one."
        )
    if wish.context_tokens > 32_768:
        lines.append("   Contexts above 32K: a heavy pool keeps them from holding up short ones.")
    return lines


def _settings(model: Served, layout: Layout) -> dict[str, Any]:
    """Return the fields of a pool's engine that carry the plan out."""
    wish = model.wish
    settings: dict[str, Any] = {"max_model_len": wish.context_tokens}
    if layout.tensor_parallel > 1:
        settings["tensor_parallel_size"] = layout.tensor_parallel
    if layout.stages > 1:
        settings["pipeline_parallel_size"] = layout.stages
    if model.shape.experts and layout.tensor_parallel > 1:
        settings["enable_expert_parallel"] = True
    if wish.weights_type == "fp8" and not model.shape.quantized:
        settings["quantization"] = "fp8"
    if wish.kv_type == "fp8":
        settings["kv_cache_dtype"] = "fp8"
    settings["gpu_memory_utilization"] = wish.utilization_ratio
    return settings


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _alternatives(model: Served, plan: FitPlan) -> list[dict[str, Any]]:
    """Return fewer bits that need fewer GPUs, each beside what it saves; the fewest last."""
    from serve_app.core.fit import plan_fit
    from serve_app.core.model_shape import BYTES_OF

    shape, wish = model.shape, model.wish
    fewest = plan.chosen.layout.gpus if plan.chosen else 10**9
    found: list[dict[str, Any]] = []
    for weights, kv in _ALTERNATIVES:
        smaller = weights is not None and BYTES_OF[weights] < BYTES_OF[wish.weights_type]
        if (weights is not None and (not smaller or shape.quantized)) or (
            weights is None and wish.kv_type == kv
        ):
            continue
        tried = replace(wish, weights_type=weights or wish.weights_type, kv_type=kv)
        other = plan_fit(shape, model.gpu, tried).chosen
        if other is None or other.layout.gpus >= fewest:
            continue
        fewest = other.layout.gpus
        bits = " and ".join([f"{weights} weights"] * bool(weights) + ["fp8 KV"] * (kv == "fp8"))
        text = (
            f"   With {bits} {_name(model, other.layout)} would do "
            f"({other.concurrency} sequences); accept it by an evaluation."
        )
        found.append({"weights": tried.weights_type, "kv": kv, "gpus": fewest, "text": text})
    return found


def _document(model: Served, plan: FitPlan, better: list[dict[str, Any]]) -> dict[str, Any]:
    from serve_app.core.model_shape import GIB

    shape, wish = model.shape, model.wish
    chosen = plan.chosen
    return {
        "model": shape.name,
        "parameters": round(shape.parameters),
        "weights_gib": shape.served_bytes(wish.weights_type) / GIB,
        "weights_type": wish.weights_type,
        "kv_type": wish.kv_type,
        "kv_bytes_per_token": shape.kv_bytes_per_token(wish.kv_type),
        "gpu": model.gpu.name,
        "gpu_memory_gib": model.gpu.memory_gib,
        "context_tokens": wish.context_tokens,
        "concurrency_wanted": wish.concurrency,
        "skipped": list(plan.skipped),
        "trials": [_trial(trial) for trial in plan.trials],
        "chosen": None if chosen is None else _trial(chosen),
        "engine": None if chosen is None else _settings(model, chosen.layout),
        "alternatives": [
            {name: value for name, value in each.items() if name != "text"} for each in better
        ],
    }


def _trial(trial: Trial) -> dict[str, Any]:
    from serve_app.core.model_shape import GIB

    return {
        "gpus": trial.layout.gpus,
        "tensor_parallel": trial.layout.tensor_parallel,
        "pipeline_stages": trial.layout.stages,
        "verdict": str(trial.verdict),
        "weights_gib": trial.weights_bytes / GIB,
        "kv_gib": trial.kv_bytes / GIB,
        "kv_tokens": trial.kv_tokens,
        "concurrency": trial.concurrency,
        "headroom_ratio": trial.headroom_ratio,
    }
