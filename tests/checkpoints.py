"""Models and GPUs for tests: checkpoints of a config.json beside an index, and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from serve_app.core.fit import Gpu
from serve_app.core.model_shape import ModelShape

LLAMA_70B_BYTES = 141_107_412_992
LLAMA_70B: dict[str, Any] = {
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28_672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
LLAMA_70B_SHAPE = ModelShape(
    name="llama-70b",
    weights_bytes=LLAMA_70B_BYTES,
    weights_type="bf16",
    layers=80,
    hidden=8192,
    intermediate=28_672,
    vocabulary=128_256,
    heads=64,
    kv_heads=8,
    head_dimension=128,
    context_tokens=131_072,
)
H100 = Gpu("H100", 79.1, 3.35e12, {"bf16": 989e12, "fp8": 1979e12}, 900e9)
H200 = Gpu("H200", 139.7, 4.8e12, {"bf16": 989e12, "fp8": 1979e12}, 900e9)


def write_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, total_size: int | None = LLAMA_70B_BYTES
) -> Path:
    """Write a checkpoint's config.json and, unless ``total_size`` is None, its index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_70B if config is None else config))
    if total_size is not None:
        index = {"metadata": {"total_size": total_size}, "weight_map": {"a": "a.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_header(file: Path, *tensor_bytes: int) -> Path:
    """Write a safetensors file's header for tensors of these sizes, without the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for number, size in enumerate(tensor_bytes):
        span = [begin, begin + size]
        header[f"t{number}"] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": span}
        begin += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return file
