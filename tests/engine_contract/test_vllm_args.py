"""Our settings against the vLLM that is installed: what we name must exist there.

Nothing is started, so the arguments of GPU pools are checked without a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from serve_app.config import VllmSettings
from serve_app.engine.vllm_args import engine_and_frontend_args, served_name

pytestmark = pytest.mark.model

ROOT = Path(__file__).resolve().parents[2]
# Any folder: one that exists, since vLLM offline takes a missing one for a name on its hub.
MODEL = ROOT / "tests"


def _pools() -> list[Any]:
    found = []
    for file in sorted((ROOT / "configs").glob("**/*.yaml")):
        for application in yaml.safe_load(file.read_text())["applications"]:
            engine = application["args"].get("engine", {})
            if engine.get("kind") == "vllm":
                name = f"{file.stem}-{application['name']}"
                found.append(pytest.param(VllmSettings.model_validate(engine), id=name))
    return found


@pytest.fixture(params=[True, False], ids=["cpu", "gpu"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Have vLLM's platform be a CPU or not, whatever this machine is."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: request.param)
    return bool(request.param)


def _accepts(name: str, value: object) -> bool:
    """Whether vLLM's own command line takes ``--name value``."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))
    flag = "--" + name.replace("_", "-")
    try:
        parser.parse_args([flag] if value is True else [flag, str(value)])
    except (SystemExit, argparse.ArgumentError, ValueError):
        return False
    return True


@pytest.mark.parametrize("settings", _pools())
def test_every_pool_of_our_configurations_is_one_vllm_can_be_asked_for(
    settings: VllmSettings, on_cpu: bool
) -> None:
    arguments, frontend = engine_and_frontend_args(settings, MODEL)
    assert arguments.model == str(MODEL)
    assert arguments.served_model_name == [served_name(settings)]
    assert arguments.max_num_seqs == settings.max_num_seqs
    assert arguments.tensor_parallel_size == settings.tensor_parallel_size
    assert arguments.enforce_eager == (on_cpu or settings.enforce_eager)
    assert (arguments.kv_cache_memory_bytes is not None) == on_cpu
    for name, value in settings.extra.items():
        assert getattr(frontend, name) == value


def test_settings_with_vllms_names_are_passed_on(on_cpu: bool) -> None:
    changed: dict[str, Any] = {
        "dtype": "float16",
        "quantization": "fp8",
        "kv_cache_dtype": "fp8",
        "max_model_len": 512,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 640,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3,
        "enable_expert_parallel": True,
        "enable_prefix_caching": False,
        "enforce_eager": True,
    }
    arguments, _ = engine_and_frontend_args(VllmSettings(model="m", **changed), MODEL)
    assert {name: getattr(arguments, name) for name in changed} == changed
    ours = {"kind", "model", "revision", "cpu_kv_cache_gib", "measure_cost", "step_costs", "extra"}
    assert VllmSettings.model_fields.keys() == changed.keys() | ours, "a setting is not tested"


def test_vllm_knows_every_quantization_we_offer() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    optional = VllmSettings.model_fields["quantization"].annotation
    [literal] = [part for part in get_args(optional) if get_args(part)]
    assert set(get_args(literal)) <= set(QUANTIZATION_METHODS)


@pytest.mark.parametrize("name", ["dtype", "kv_cache_dtype"])
def test_vllm_knows_every_choice_we_offer(name: str) -> None:
    annotation = VllmSettings.model_fields[name].annotation
    for choice in get_args(annotation):
        assert _accepts(name, choice), f"{name}: {choice}"
    assert not _accepts(name, "no-such-choice")


@pytest.mark.parametrize(
    "extra",
    [{"stream_interval": 4}, {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}],
)
def test_extra_reaches_the_engine_or_its_openai_layer(extra: dict[str, Any]) -> None:
    _, frontend = engine_and_frontend_args(VllmSettings(model="m", extra=extra), MODEL)
    assert {name: getattr(frontend, name) for name in extra} == extra


def test_extra_that_vllm_does_not_know_is_refused_with_a_hint() -> None:
    wrong = VllmSettings(model="m", extra={"max_num_batched_token": 4})
    with pytest.raises(ValueError, match=r"engine\.extra\.max_num_batched_token is not"):
        engine_and_frontend_args(wrong, MODEL)
    ours = VllmSettings(model="m", extra={"scheduling_policy": "fcfs"})
    with pytest.raises(ValueError, match="scheduling_policy cannot be set there"):
        engine_and_frontend_args(ours, MODEL)


def test_every_private_name_of_vllm_that_we_reach_for_is_there() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine import utils
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    assert callable(utils.get_mp_context)
    assert callable(SpinCondition.wait)
    assert "_spin_condition" in MessageQueue.acquire_read.__wrapped__.__code__.co_names
    assert "busy_loop_s" in SpinCondition.wait.__code__.co_names
    assert callable(OutputProcessor.get_num_unfinished_requests)
    assert RequestState is not None
    assert {"scheduling_policy", "kv_cache_memory_bytes"} <= {
        field.name for field in fields(AsyncEngineArgs)
    }
