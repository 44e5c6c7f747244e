"""A checkpoint's sizes from its config and headers, and what is said of broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serve_app.checkpoint import read_shape
from serve_app.errors import ConfigError
from tests.checkpoints import LLAMA_70B, LLAMA_70B_BYTES, write_checkpoint, write_header


def shape_of(folder: Path, **fields: Any) -> Any:
    shape, _ = read_shape(write_checkpoint(folder, {**LLAMA_70B, **fields}))
    return shape


def test_weights_are_the_indexs_total_and_the_rest_the_configs(tmp_path: Path) -> None:
    shape, source = read_shape(write_checkpoint(tmp_path / "llama-70b"))
    assert (shape.name, source) == ("llama-70b", "model.safetensors.index.json")
    assert shape.weights_bytes == LLAMA_70B_BYTES
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dimension) == (80, 64, 8, 128)
    assert (shape.weights_type, shape.quantized, shape.context_tokens) == ("bf16", False, 131_072)


def test_without_an_index_the_headers_are_added_up(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, total_size=None)
    write_header(tmp_path / "model.safetensors", 100, 20)
    shape, source = read_shape(tmp_path)
    assert (shape.weights_bytes, source) == (120, "model.safetensors")
    write_header(tmp_path / "more.safetensors", 6)
    shape, source = read_shape(tmp_path)
    assert (shape.weights_bytes, source) == (126, "2 *.safetensors headers")


def test_an_index_without_a_total_is_added_up_from_the_files_it_names(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_header(tmp_path / "one.safetensors", 10)
    write_header(tmp_path / "consolidated.safetensors", 1000)
    with pytest.raises(ConfigError, match=r"total_size is missing.*two\.safetensors"):
        read_shape(tmp_path)
    write_header(tmp_path / "two.safetensors", 20)
    assert read_shape(tmp_path)[0].weights_bytes == 30


def test_a_language_model_inside_another_is_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"model_type": "gemma3", "text_config": LLAMA_70B})
    assert read_shape(tmp_path)[0].layers == 80


@pytest.mark.parametrize(
    ("fields", "windowed", "window", "stateless"),
    [
        ({"sliding_window": 4096}, 80, 4096, 0),
        ({"sliding_window": 4096, "use_sliding_window": False}, 0, 0, 0),
        ({"sliding_window": 512, "use_sliding_window": True, "max_window_layers": 28}, 52, 512, 0),
        ({"sliding_window": 1024, "sliding_window_pattern": 6}, 67, 1024, 0),
        (
            {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 40},
            40,
            128,
            0,
        ),
        ({"layer_types": ["linear_attention"] * 60 + ["full_attention"] * 20}, 0, 0, 60),
        ({"sliding_window": None}, 0, 0, 0),
    ],
)
def test_layers_with_windows_and_without_kv_are_counted(
    tmp_path: Path, fields: dict[str, Any], windowed: int, window: int, stateless: int
) -> None:
    shape = shape_of(tmp_path, **fields)
    found = (shape.windowed_layers, shape.window_tokens, shape.stateless_layers)
    assert found == (windowed, window, stateless)


def test_a_latent_cache_and_experts_are_read(tmp_path: Path) -> None:
    fields = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "n_routed_experts": 256}
    shape = shape_of(tmp_path, **fields, num_experts_per_tok=8, moe_intermediate_size=2048)
    assert (shape.latent, shape.experts, shape.experts_used) == (576, 256, 8)
    assert shape.expert_intermediate == 2048


def test_grouped_heads_and_their_size_may_be_left_out(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, num_key_value_heads=None, head_dim=None)
    assert (shape.kv_heads, shape.head_dimension) == (64, 128)


@pytest.mark.parametrize(
    ("given", "weights_type"),
    [
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "mxfp4"}, "int4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
    ],
)
def test_quantized_checkpoints_say_so(
    tmp_path: Path, given: dict[str, Any], weights_type: str
) -> None:
    shape = shape_of(tmp_path, quantization_config=given)
    assert (shape.weights_type, shape.quantized) == (weights_type, True)


def test_a_checkpoint_without_index_and_without_safetensors_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, total_size=None)
    with pytest.raises(ConfigError, match=r"neither model.*nor a"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"]
)
def test_a_config_that_lacks_a_field_is_refused_by_its_name(tmp_path: Path, field: str) -> None:
    config = {name: value for name, value in LLAMA_70B.items() if name != field}
    write_checkpoint(tmp_path, config)
    with pytest.raises(ConfigError, match=f"config.json: {field} is missing"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be from 1"),
        ({"num_hidden_layers": "80"}, "num_hidden_layers is '80'; it must be a whole number"),
        ({"num_key_value_heads": -8}, "num_key_value_heads is -8"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"torch_dtype": "int2"}, "torch_dtype 'int2' is none of"),
        ({"kv_lora_rank": 512}, "qk_rope_head_dim is missing"),
        ({"quantization_config": {"quant_method": "odd"}}, "'odd' with None bits is not known"),
    ],
)
def test_fields_that_make_no_sense_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        shape_of(tmp_path, **fields)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 64, b"\x08" + b"\x00" * 7 + b"not json"])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, total_size=None)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="not a safetensors file"):
        read_shape(tmp_path)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_shape(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"config\.json: No such file"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a JSON object"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_shape(tmp_path)
