"""How many GPUs one replica of a model takes, and how they share it.

Of a GPU's memory an engine uses ``utilization_ratio``; from that go the weights, the
activations of its largest step, and what the runtime and captured graphs hold. The rest is
KV cache. It fits usefully if that holds the sequences asked for.

The decision tree: one GPU fits -> replicas of one; one NVLink node fits -> tensor parallelism
by the smallest power of two; else tensor parallelism inside a node times pipeline stages.
GPUs without NVLink exchange activations too slowly for tensor parallelism: stages then.

Source: the serving playbook, sections 2.1 and 5.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil
from typing import Final

from serve_app.core.model_shape import GIB, ModelShape

OVERHEAD_GIB: Final = 2.0
"""CUDA's context, captured graphs and communicators; with it the KV cache comes out within
5 % of what an H100 has left beside 8B and 70B models."""

_ACTIVATION_BYTES: Final = 2
_LOGIT_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU. Memory as a process sees it; throughput is dense, by type of number.

    ``nvlink_bytes_per_s`` is 0 where GPUs of a node are joined by PCIe only.
    """

    name: str
    memory_gib: float
    bandwidth_bytes_per_s: float
    flops_per_s: Mapping[str, float]
    nvlink_bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FitWish:
    """How a model shall be served.

    A replica shall hold ``concurrency`` sequences of ``context_tokens`` each. ``token_budget``
    is the largest step, ``max_num_seqs`` the largest batch. A replica has at most ``nodes``
    nodes of ``gpus_per_node``; ``tensor_parallel`` leaves the choice of it to the planner if
    None.
    """

    weights_type: str
    kv_type: str = "bf16"
    context_tokens: int = 8192
    concurrency: int = 16
    tensor_parallel: int | None = None
    gpus_per_node: int = 8
    nodes: int = 4
    utilization_ratio: float = 0.9
    overhead_gib: float = OVERHEAD_GIB
    token_budget: int = 8192
    max_num_seqs: int = 256

    def __post_init__(self) -> None:
        assert 0 < self.utilization_ratio <= 1
        assert self.overhead_gib >= 0
        sizes = (self.context_tokens, self.concurrency, self.gpus_per_node, self.nodes)
        assert min(*sizes, self.token_budget, self.max_num_seqs) >= 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How the GPUs of a replica share the model."""

    tensor_parallel: int = 1
    stages: int = 1

    @property
    def gpus(self) -> int:
        """How many GPUs a replica takes."""
        return self.tensor_parallel * self.stages


class Verdict(StrEnum):
    """Whether a layout will do."""

    NO_ROOM = "no room"
    TOO_FEW = "too few"
    FITS = "fits"


@dataclass(frozen=True, slots=True)
class Trial:
    """A layout and what it leaves, in bytes of its fullest GPU.

    ``kv_bytes`` is negative where the weights do not fit. ``kv_tokens`` are all the tokens
    whose KV the replica holds, ``concurrency`` the sequences of the context asked for.
    ``headroom_ratio`` is what is neither weights nor KV cache, over what is.
    """

    layout: Layout
    verdict: Verdict
    usable_bytes: int
    weights_bytes: int
    activation_bytes: int
    overhead_bytes: int
    kv_bytes: int
    kv_tokens: int
    concurrency: int
    headroom_ratio: float


@dataclass(frozen=True, slots=True)
class FitPlan:
    """What was tried, in the order of the decision tree; ``chosen`` is None if nothing fits.

    ``skipped`` says why sizes of a tensor-parallel group are out of the question.
    """

    trials: tuple[Trial, ...]
    chosen: Trial | None
    skipped: tuple[str, ...] = field(default=())


def plan_fit(shape: ModelShape, gpu: Gpu, wish: FitWish) -> FitPlan:
    """Walk the decision tree to the first layout that fits usefully.

    Raises:
        ValueError: the tensor-parallel size asked for cannot be; the message says why.
    """
    skipped: list[str] = []
    sizes = _tensor_parallel_sizes(shape, gpu, wish, skipped)
    trials: list[Trial] = []
    for layout in _layouts(shape, wish, sizes):
        trial = try_layout(shape, gpu, wish, layout)
        trials.append(trial)
        if trial.verdict is Verdict.FITS:
            return FitPlan(tuple(trials), trial, tuple(skipped))
    return FitPlan(tuple(trials), None, tuple(skipped))


def try_layout(shape: ModelShape, gpu: Gpu, wish: FitWish, layout: Layout) -> Trial:
    """Return what a layout leaves on its fullest GPU."""
    stage_layers = ceil(shape.layers / layout.stages)
    weights = _weights_bytes(shape, wish, layout, stage_layers)
    activations = _activation_bytes(shape, wish, layout.tensor_parallel)
    usable = int(gpu.memory_gib * GIB * wish.utilization_ratio)
    overhead = int(wish.overhead_gib * GIB)
    kv = usable - weights - activations - overhead
    tokens = concurrency = 0
    layer_bytes = shape.layer_kv_bytes(wish.kv_type, layout.tensor_parallel)
    share = stage_layers / shape.layers
    if kv > 0:
        # A model without attention keeps no KV: then the batch is the bound.
        token_bytes = max(1.0, (shape.layers - shape.stateless_layers) * layer_bytes * share)
        cached = shape.cached_token_layers(wish.context_tokens)
        tokens = int(kv / token_bytes)
        concurrency = int(kv / max(1.0, cached * layer_bytes * share))
    verdict = Verdict.FITS
    if kv <= 0:
        verdict = Verdict.NO_ROOM
    elif concurrency < wish.concurrency:
        verdict = Verdict.TOO_FEW
    used = weights + max(0, kv)
    headroom = gpu.memory_gib * GIB / used - 1.0
    return Trial(
        layout,
        verdict,
        usable,
        weights,
        activations,
        overhead,
        kv,
        tokens,
        min(concurrency, wish.max_num_seqs),
        headroom,
    )


def tensor_parallel_problem(shape: ModelShape, size: int, gpus_per_node: int) -> str | None:
    """Return why a tensor-parallel group of ``size`` cannot be, None if it can."""
    if size < 1:
        return f"must be at least 1, not {size}"
    if size > gpus_per_node:
        return f"{size} GPUs are more than a node's {gpus_per_node}: never across nodes"
    if shape.heads % size:
        return f"{shape.heads} attention heads do not divide by {size}"
    heads = shape.kv_heads
    if not shape.latent and heads % size and size % heads:
        return f"{heads} KV heads and {size} GPUs do not divide either way"
    return None


def _tensor_parallel_sizes(
    shape: ModelShape, gpu: Gpu, wish: FitWish, skipped: list[str]
) -> list[int]:
    """Return the sizes to try, ascending; why others are not goes to ``skipped``."""
    if wish.tensor_parallel is not None:
        problem = tensor_parallel_problem(shape, wish.tensor_parallel, wish.gpus_per_node)
        if problem is not None:
            raise ValueError(problem)
        return [wish.tensor_parallel]
    if not gpu.nvlink_bytes_per_s:
        if wish.gpus_per_node > 1:
            skipped.append(f"{gpu.name} has no NVLink: pipeline stages, no tensor parallelism")
        return [1]
    sizes = []
    size = 1
    while size <= wish.gpus_per_node:
        problem = tensor_parallel_problem(shape, size, wish.gpus_per_node)
        if problem is None:
            sizes.append(size)
        else:
            skipped.append(f"TP {size}: {problem}")
        size *= 2
    return sizes


def _layouts(shape: ModelShape, wish: FitWish, sizes: list[int]) -> Iterator[Layout]:
    """Yield layouts in the order of the decision tree."""
    yield from (Layout(size) for size in sizes)
    largest = sizes[-1]
    stages_most = min(shape.layers, wish.gpus_per_node // largest * wish.nodes)
    yield from (Layout(largest, stages) for stages in range(2, stages_most + 1))


def _weights_bytes(shape: ModelShape, wish: FitWish, layout: Layout, stage_layers: int) -> int:
    """Return the weights on the fullest GPU: its layers, and an embedding or the head."""
    total, embeddings = shape.served_bytes(wish.weights_type), shape.embedding_bytes
    # Of several stages the first has the input embedding, the last the head.
    apart = layout.stages > 1 and not shape.tied_embeddings
    held = embeddings // 2 if apart else embeddings
    body = (total - embeddings) * stage_layers / shape.layers
    return ceil((body + held) / layout.tensor_parallel)


def _activation_bytes(shape: ModelShape, wish: FitWish, tensor_parallel: int) -> int:
    """Return what the largest step holds beside weights and KV cache.

    Per token four hidden states and the gated feed-forward layer's three; per sequence the
    logits, as floats, and a copy to sample from.
    """
    inner = max(shape.intermediate, shape.expert_intermediate * shape.experts_used)
    per_token = (4 * shape.hidden + 3 * inner / tensor_parallel) * _ACTIVATION_BYTES
    logits = wish.max_num_seqs * shape.vocabulary * _LOGIT_BYTES / tensor_parallel
    return ceil(wish.token_budget * per_token + logits)
