"""What of a model decides its size: weights as they are served, KV cache by context.

    KV bytes per token = 2 x layers x KV heads x head dimension x bytes per element

With multi-head latent attention a layer keeps one latent vector and one rotary key per token
instead, on every GPU of a tensor-parallel group. A layer with a sliding window keeps no more
than the window.

Source: the serving playbook, section 2.1; DeepSeek-V2 (arXiv 2405.04434) for the latent cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Final

BYTES_OF: Final[Mapping[str, float]] = MappingProxyType(
    # Four bits carry a scale of two bytes and a zero point per group of 128.
    {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.52}
)
KV_TYPES: Final = ("bf16", "fp8")
GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A checkpoint's sizes; bytes as stored.

    ``weights_type`` is a key of BYTES_OF, ``quantized`` whether the checkpoint already is.
    ``kv_heads`` counts keys and values of grouped attention. ``latent`` is the width of the
    latent vector and rotary key of multi-head latent attention, 0 without. ``windowed_layers``
    keep ``window_tokens`` at most, ``stateless_layers`` keep no KV at all (linear attention).
    ``experts`` is 0 for a dense model, of which ``experts_used`` work on a token.
    """

    name: str
    weights_bytes: int
    weights_type: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dimension: int
    context_tokens: int
    quantized: bool = False
    tied_embeddings: bool = False
    latent: int = 0
    window_tokens: int = 0
    windowed_layers: int = 0
    stateless_layers: int = 0
    experts: int = 0
    experts_used: int = 0
    expert_intermediate: int = 0

    def __post_init__(self) -> None:
        assert self.weights_type in BYTES_OF
        assert self.windowed_layers + self.stateless_layers <= self.layers
        assert self.windowed_layers == 0 or self.window_tokens > 0

    @property
    def embedding_bytes(self) -> int:
        """Bytes of the input embedding and the output head, which quantization leaves alone."""
        element_bytes = 2.0 if self.quantized else BYTES_OF[self.weights_type]
        count = 1 if self.tied_embeddings else 2
        return min(int(count * self.vocabulary * self.hidden * element_bytes), self.weights_bytes)

    @property
    def parameters(self) -> float:
        """How many weights there are, from their bytes."""
        element_bytes = 2.0 if self.quantized else BYTES_OF[self.weights_type]
        body = (self.weights_bytes - self.embedding_bytes) / BYTES_OF[self.weights_type]
        return body + self.embedding_bytes / element_bytes

    @property
    def active_parameters(self) -> float:
        """How many weights work on one token: all, or the shared ones and the experts used.

        An expert is three matrices of hidden x expert_intermediate.
        """
        expert = 3.0 * self.layers * self.hidden * self.expert_intermediate
        return max(0.0, self.parameters - expert * (self.experts - self.experts_used))

    def served_bytes(self, weights_type: str) -> int:
        """Return the bytes of the weights served as ``weights_type``.

        Embeddings, the output head and what is smaller stay as they are stored; the rest is
        brought to the type. The checkpoint's own type is served as it is.
        """
        if weights_type == self.weights_type:
            return self.weights_bytes
        embeddings = self.embedding_bytes
        ratio = BYTES_OF[weights_type] / BYTES_OF[self.weights_type]
        return embeddings + ceil((self.weights_bytes - embeddings) * ratio)

    def layer_kv_bytes(self, kv_type: str, tensor_parallel: int = 1) -> int:
        """Return what one layer keeps of one token on one GPU of a group.

        Heads that are fewer than the group's GPUs are kept several times.
        """
        element_bytes = BYTES_OF[kv_type]
        if self.latent:
            return int(self.latent * element_bytes)
        heads = ceil(self.kv_heads / tensor_parallel)
        return int(2 * heads * self.head_dimension * element_bytes)

    def kv_bytes_per_token(self, kv_type: str) -> int:
        """Return the KV cache of one token of a short context, on one GPU that holds it all."""
        return (self.layers - self.stateless_layers) * self.layer_kv_bytes(kv_type)

    def cached_token_layers(self, context_tokens: int) -> int:
        """Return for how many (token, layer) pairs a sequence of that length keeps KV."""
        full = self.layers - self.windowed_layers - self.stateless_layers
        windowed = min(context_tokens, self.window_tokens) if self.windowed_layers else 0
        return full * context_tokens + self.windowed_layers * windowed

    def sequence_kv_bytes(self, context_tokens: int, kv_type: str) -> int:
        """Return the KV cache of a sequence, on one GPU that holds it all."""
        return self.cached_token_layers(context_tokens) * self.layer_kv_bytes(kv_type)


LLAMA_8B: Final = ModelShape(
    name="Llama-3.1-8B",
    weights_bytes=16_060_522_496,
    weights_type="bf16",
    layers=32,
    hidden=4096,
    intermediate=14_336,
    vocabulary=128_256,
    heads=32,
    kv_heads=8,
    head_dimension=128,
    context_tokens=131_072,
)
"""The model whose steps the simulated engine's defaults describe."""
