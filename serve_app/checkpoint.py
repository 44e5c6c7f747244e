"""A checkpoint's sizes, read from its config.json and its safetensors headers alone.

Weights are counted in bytes as stored: ``metadata.total_size`` of
model.safetensors.index.json, else the tensors that the headers of the folder's safetensors
files name. No tensor is read and nothing of the model is imported.

Source: https://huggingface.co/docs/safetensors (format: a little-endian u64, then that many
bytes of JSON).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from serve_app.core.model_shape import ModelShape
from serve_app.errors import ConfigError

INDEX_NAME = "model.safetensors.index.json"
HEADER_BYTES_MOST = 100_000_000
JSON_BYTES_MOST = 100_000_000
COUNT_MOST = 10**9

_TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float8_e4m3fn": "fp8"}
_WINDOWED = ("sliding_attention", "chunked_attention")
_ATTENTION = ("full_attention", "attention")


def read_shape(folder: Path) -> tuple[ModelShape, str]:
    """Return a checkpoint's sizes, and the name of what its weights were counted from.

    Raises:
        ConfigError: the folder is no checkpoint, has no weights to count, or its config.json
            lacks a field; the message names it and the fix.
    """
    if not folder.is_dir():
        raise ConfigError(f"--model {folder}: no such folder; give a local checkpoint's")
    config = _read_json(folder / "config.json")
    weights_bytes, source = _weights_bytes(folder)
    return _shape(folder, config, weights_bytes), source


def _shape(folder: Path, config: Mapping[str, Any], weights_bytes: int) -> ModelShape:
    # Models that also see or hear keep the language model's part apart.
    inner = config.get("text_config")
    fields = _Fields(folder / "config.json", {**config, **inner} if inner else config)
    layers, hidden = fields.count("num_hidden_layers"), fields.count("hidden_size")
    heads = fields.count("num_attention_heads")
    windowed, window_tokens, stateless = _layer_kinds(fields, layers)
    latent = fields.count("kv_lora_rank", 0)
    if latent:
        latent += fields.count("qk_rope_head_dim")
    experts = fields.first_count(("num_experts", "num_local_experts", "n_routed_experts"))
    weights_type, quantized = _weights_type(fields)
    return ModelShape(
        name=folder.resolve().name,
        weights_bytes=weights_bytes,
        weights_type=weights_type,
        quantized=quantized,
        layers=layers,
        hidden=hidden,
        intermediate=fields.count("intermediate_size", 4 * hidden),
        vocabulary=fields.count("vocab_size"),
        heads=heads,
        kv_heads=fields.count("num_key_value_heads", heads),
        head_dimension=fields.count("head_dim", 0) or max(1, hidden // heads),
        context_tokens=fields.count("max_position_embeddings", 8192),
        tied_embeddings=bool(fields.values.get("tie_word_embeddings")),
        latent=latent,
        window_tokens=window_tokens,
        windowed_layers=windowed,
        stateless_layers=stateless,
        experts=experts,
        experts_used=fields.count("num_experts_per_tok", 0) if experts else 0,
        expert_intermediate=fields.first_count(("moe_intermediate_size", "intermediate_size"))
        if experts
        else 0,
    )


class _Fields:
    """The fields of a config.json, checked as they are asked for."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self.values = values

    def count(self, name: str, default: int | None = None) -> int:
        """Return a whole number; without a default it must be there and at least 1.

        Raises:
            ConfigError: it is missing, or no such number.
        """
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise ConfigError(f"{self.file}: {name} is missing; the planner cannot size without it")
        least = 1 if default is None else 0
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self.file}: {name} is {value!r:.40}; it must be a whole number")
        if not least <= value <= COUNT_MOST:
            raise ConfigError(
                f"{self.file}: {name} is {value}; it must be from {least} to {COUNT_MOST}"
            )
        return value

    def first_count(self, names: Iterable[str]) -> int:
        """Return the first of several names that is there, 0 if none is."""
        for name in names:
            if self.values.get(name) is not None:
                return self.count(name, 0)
        return 0


def _layer_kinds(fields: _Fields, layers: int) -> tuple[int, int, int]:
    """Return how many layers have a window, its tokens, and how many keep no KV."""
    window = fields.count("sliding_window", 0)
    if fields.values.get("use_sliding_window") is False:
        window = 0
    kinds = fields.values.get("layer_types")
    if isinstance(kinds, list):
        counted = kinds[:layers]
        windowed = sum(kind in _WINDOWED for kind in counted)
        stateless = sum(kind not in (*_WINDOWED, *_ATTENTION) for kind in counted)
        window = window or fields.count("attention_chunk_size", 0)
        return (windowed, window, stateless) if window else (0, 0, stateless)
    if not window:
        return 0, 0, 0
    every = fields.count("sliding_window_pattern", 0)
    if every:
        return layers - layers // every, window, 0
    full = fields.count("max_window_layers", 0) if "use_sliding_window" in fields.values else 0
    return max(0, layers - full), window, 0


def _weights_type(fields: _Fields) -> tuple[str, bool]:
    """Return how the weights are stored, and whether that is a quantization."""
    given = fields.values.get("quantization_config")
    if isinstance(given, Mapping):
        return _quantization(fields, given), True
    name = fields.values.get("torch_dtype") or fields.values.get("dtype") or "bfloat16"
    known = _TYPES.get(str(name).removeprefix("torch."))
    if known is None:
        raise ConfigError(
            f"{fields.file}: torch_dtype {name!r:.40} is none of: {', '.join(_TYPES)}"
        )
    return known, False


def _quantization(fields: _Fields, given: Mapping[str, Any]) -> str:
    method = str(given.get("quant_method") or given.get("quant_algo") or "").lower()
    bits = given.get("bits")
    for group in _groups(given):
        weights = group.get("weights")
        if isinstance(weights, Mapping):
            bits = weights.get("num_bits", bits)
    if bits is None:
        bits = 8 if "fp8" in method else 4 if method in ("awq", "gptq", "mxfp4") else None
    if bits == 4:
        return "int4"
    if bits == 8:
        return "int8" if method in ("gptq", "awq") else "fp8"
    raise ConfigError(
        f"{fields.file}: quantization_config of {method!r:.40} with {bits!r:.20} bits is not known "
        "here; its weights must have 4 or 8 bits"
    )


def _groups(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = given.get("config_groups")
    values = groups.values() if isinstance(groups, Mapping) else ()
    return [each for each in values if isinstance(each, Mapping)]


def _weights_bytes(folder: Path) -> tuple[int, str]:
    """Return the weights' bytes, and the file or files that say so."""
    index = folder / INDEX_NAME
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        document = _read_json(index)
        metadata = document.get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
        if isinstance(total, int | float) and 0 < total < 2**60:
            return int(total), INDEX_NAME
        names = document.get("weight_map")
        named = set(names.values()) if isinstance(names, Mapping) else set()
        missing = sorted(str(name) for name in named if not (folder / str(name)).is_file())
        if not named or missing:
            raise ConfigError(
                f"{index}: metadata.total_size is missing, and so are the files that would tell "
                f"({', '.join(missing[:2]) or 'weight_map'}); fetch the checkpoint whole"
            )
        files = sorted(folder / str(name) for name in named)
    if not files:
        raise ConfigError(
            f"--model {folder}: neither {INDEX_NAME} nor a *.safetensors file is there; "
            "copy one of them (the index is enough)"
        )
    source = files[0].name if len(files) == 1 else f"{len(files)} *.safetensors headers"
    return sum(_tensor_bytes(file) for file in files), source


def _tensor_bytes(file: Path) -> int:
    """Return the bytes of the tensors that a safetensors file's header names."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= HEADER_BYTES_MOST:
                raise ConfigError(f"{file}: not a safetensors file (header of {length} bytes)")
            header = json.loads(stream.read(length))
        spans = [
            tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__"
        ]
        total = sum(int(end) - int(begin) for begin, end in spans)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: not a safetensors file; its header is broken") from error
    if total <= 0:
        raise ConfigError(f"{file}: its header names no tensors")
    return total


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        if file.stat().st_size > JSON_BYTES_MOST:
            raise ConfigError(f"{file}: larger than {JSON_BYTES_MOST} bytes")
        document = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; give a checkpoint's folder") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return document
