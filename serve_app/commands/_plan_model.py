"""The options by which `headrace plan` is told of a model and its GPUs, and their values."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from serve_app.commands._numbers import positive, share
from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.core.engine_parts import EngineParams
    from serve_app.core.fit import FitWish, Gpu, Trial
    from serve_app.core.model_shape import ModelShape

QUANTIZATIONS = {"fp8": "fp8", "int8": "int8", "int4": "int4", "awq": "int4", "gptq": "int4"}
KV_TYPES = {"auto": "bf16", "bf16": "bf16", "fp16": "bf16", "fp8": "fp8"}
DTYPES = ("auto", "bf16", "fp16", "fp32")
CONTEXT_TOKENS = 8192


@dataclass(frozen=True, slots=True)
class Served:
    """A model on a kind of GPU as it shall be served; ``source`` is where its size is from."""

    shape: ModelShape
    gpu: Gpu
    wish: FitWish
    source: str


def add_model_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add what says which model is served, on which GPUs and how."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="PATH",
        required=required,
        help="a local checkpoint: config.json, and its safetensors index or files"
        + ("" if required else " (default: the shape of Llama-3.1-8B)"),
    )
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="of unquantized weights")
    model.add_argument(
        "--quantization", choices=sorted(QUANTIZATIONS), help="of the weights, but embeddings"
    )
    model.add_argument("--kv-dtype", choices=sorted(KV_TYPES), default="auto", help="of KV cache")
    gpus = parser.add_argument_group("GPUs")
    gpus.add_argument(
        "--gpu", metavar="NAME", required=required, help="such as H200; any, with its memory"
        if required else "such as H200 (default: H100)",
        default=None if required else "H100",
    )  # fmt: skip
    gpus.add_argument(
        "--gpu-memory-gib", type=float, metavar="GIB", help="instead of the table's, as CUDA has it"
    )
    gpus.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    gpus.add_argument(
        "--nodes", type=int, default=4, metavar="N", help="of one replica at most (default: 4)"
    )
    gpus.add_argument(
        "--tensor-parallel", type=int, metavar="N", help="GPUs of a group (default: the planner's)"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--context-tokens", type=int, metavar="N", help="prompt and answer (default: 8192)"
    )
    engine.add_argument(
        "--concurrency",
        type=int,
        default=16,
        metavar="N",
        help="sequences of that context that a replica shall hold (default: 16)",
    )
    engine.add_argument("--max-num-seqs", type=int, default=256, metavar="N", help="default: 256")
    engine.add_argument(
        "--token-budget", type=int, default=8192, metavar="N", help="of a step (default: 8192)"
    )
    engine.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="default: 0.9"
    )
    engine.add_argument(
        "--overhead-gib",
        type=float,
        metavar="GIB",
        help="runtime, graphs and communicators on each GPU (default: 2)",
    )


def served(args: argparse.Namespace) -> Served:
    """Return the model as it is to be served.

    Raises:
        ConfigError: the checkpoint, the GPU or a number is unusable; the message names it.
    """
    from serve_app.checkpoint import read_shape
    from serve_app.core.model_shape import LLAMA_8B
    from serve_app.gpus import find_gpu
    from serve_app.models import default_cache_dir, resolve

    _check_numbers(args)
    gpu = find_gpu(args.gpu, args.gpu_memory_gib)
    if args.model is None:
        shape, source = LLAMA_8B, "published sizes"
    else:
        shape, source = read_shape(resolve(args.model, default_cache_dir()))
    return Served(shape, gpu, _wish(args, shape), source)


def replica(model: Served) -> tuple[EngineParams, Trial]:
    """Return one replica's estimated engine and how its GPUs share the model.

    The simulated engine's own numbers stand for the model and the GPU they describe.

    Raises:
        ConfigError: no layout allowed holds what is wanted.
    """
    from serve_app.core.engine_parts import EngineParams

    engine, trial = estimate(model)
    if engine_is_measured(model, trial):
        engine = replace(
            EngineParams(), max_num_seqs=engine.max_num_seqs, token_budget=engine.token_budget
        )
    return engine, trial


def estimate(model: Served) -> tuple[EngineParams, Trial]:
    """Return one replica's engine by estimate alone, to be compared with another estimate.

    Raises:
        ConfigError: no layout allowed holds what is wanted.
    """
    from serve_app.core.fit import plan_fit
    from serve_app.core.step_estimate import estimate_engine

    plan = plan_fit(model.shape, model.gpu, model.wish)
    if plan.chosen is None:
        raise ConfigError(
            f"{model.shape.name} in {model.wish.weights_type} fits no layout of "
            f"{model.gpu.name} allowed; `headrace plan fit` with the same options says why"
        )
    return estimate_engine(model.shape, model.gpu, model.wish, plan.chosen), plan.chosen


def engine_is_measured(model: Served, trial: Trial) -> bool:
    """Whether this is what the simulated engine's defaults describe."""
    from serve_app.core.model_shape import LLAMA_8B

    wish = model.wish
    as_told = (wish.weights_type, wish.kv_type, wish.utilization_ratio) == ("bf16", "bf16", 0.9)
    return (
        model.shape == LLAMA_8B and model.gpu.name == "H100" and trial.layout.gpus == 1 and as_told
    )


def _check_numbers(args: argparse.Namespace) -> None:
    for flag, most in (
        ("--gpus-per-node", 72),
        ("--nodes", 64),
        ("--context-tokens", 10**8),
        ("--concurrency", 10**5),
        ("--max-num-seqs", 10**5),
        ("--token-budget", 10**7),
        ("--tensor-parallel", 1024),
    ):
        positive(flag, getattr(args, flag[2:].replace("-", "_")), most)
    share("--gpu-memory-utilization", args.gpu_memory_utilization)
    if args.overhead_gib is not None and not 0 <= args.overhead_gib <= 1000:
        raise ConfigError(f"--overhead-gib must be from 0 to 1000, not {args.overhead_gib:g}")


def _wish(args: argparse.Namespace, shape: ModelShape) -> FitWish:
    from serve_app.core.fit import OVERHEAD_GIB, FitWish, tensor_parallel_problem

    context_tokens = args.context_tokens or min(CONTEXT_TOKENS, shape.context_tokens)
    if context_tokens > shape.context_tokens:
        raise ConfigError(
            f"--context-tokens {context_tokens} is more than {shape.name} takes: "
            f"{shape.context_tokens} (max_position_embeddings)"
        )
    if args.concurrency > args.max_num_seqs:
        raise ConfigError(
            f"--concurrency {args.concurrency} is more than --max-num-seqs {args.max_num_seqs}"
        )
    if args.tensor_parallel is not None:
        problem = tensor_parallel_problem(shape, args.tensor_parallel, args.gpus_per_node)
        if problem is not None:
            raise ConfigError(f"--tensor-parallel: {problem}")
    return FitWish(
        weights_type=_weights_type(args, shape),
        kv_type=KV_TYPES[args.kv_dtype],
        context_tokens=context_tokens,
        concurrency=args.concurrency,
        tensor_parallel=args.tensor_parallel,
        gpus_per_node=args.gpus_per_node,
        nodes=args.nodes,
        utilization_ratio=args.gpu_memory_utilization,
        overhead_gib=OVERHEAD_GIB if args.overhead_gib is None else args.overhead_gib,
        token_budget=args.token_budget,
        max_num_seqs=args.max_num_seqs,
    )


def _weights_type(args: argparse.Namespace, shape: ModelShape) -> str:
    """Return what the weights are served as: the wish, or as stored (single floats halved)."""
    wanted = QUANTIZATIONS.get(args.quantization)
    if args.quantization and args.dtype != "auto":
        raise ConfigError("--dtype is for unquantized weights; leave it out with --quantization")
    if shape.quantized:
        if wanted not in (None, shape.weights_type) or args.dtype != "auto":
            raise ConfigError(
                f"{shape.name} is stored in {shape.weights_type} already; leave out --dtype and "
                "--quantization, or take the unquantized checkpoint"
            )
        return shape.weights_type
    if wanted is not None:
        return wanted
    if args.dtype != "auto":
        return str(args.dtype)
    return "bf16" if shape.weights_type == "fp32" else shape.weights_type
