"""Step times on other hardware, against the derived values for a 70B model."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from serve_app.core.engine_parts import EngineParams
from serve_app.core.fit import FitWish, Gpu, Layout, try_layout
from serve_app.core.model_shape import LLAMA_8B, ModelShape
from serve_app.core.step_estimate import estimate_engine, rescale
from tests.checkpoints import H100, H200
from tests.checkpoints import LLAMA_70B_SHAPE as LLAMA_70B

A100 = Gpu("A100", 79.1, 2.039e12, {"bf16": 312e12}, 600e9)
BF16, FP8 = FitWish("bf16"), FitWish("fp8")


def estimate(
    shape: ModelShape, gpu: Gpu, wish: FitWish = BF16, layout: Layout | None = None
) -> EngineParams:
    return estimate_engine(shape, gpu, wish, try_layout(shape, gpu, wish, layout or Layout()))


def test_the_model_and_gpu_it_was_measured_on_come_out_as_measured() -> None:
    estimated, measured = estimate(LLAMA_8B, H100), EngineParams()
    for name, value in asdict(measured).items():
        if name != "kv_blocks":
            assert getattr(estimated, name) == pytest.approx(value), name
    assert estimated.kv_blocks == pytest.approx(measured.kv_blocks, rel=0.05)


@pytest.mark.parametrize(
    ("group", "overhead_ms", "weights_ms", "prefill_us", "context_ns"),
    [(4, 2.7, 13.9, (55, 79), 48), (8, 2.7, 6.9, (27, 40), 24)],
)
def test_a_70b_model_on_a_group_agrees_within_ten_percent(
    group: int,
    overhead_ms: float,
    weights_ms: float,
    prefill_us: tuple[float, float],
    context_ns: float,
) -> None:
    engine = estimate(LLAMA_70B, H100, layout=Layout(group))
    assert engine.overhead_s * 1e3 == pytest.approx(overhead_ms, rel=0.07)
    assert engine.weights_s * 1e3 == pytest.approx(weights_ms, rel=0.03)
    assert engine.context_s_per_token * 1e9 == pytest.approx(context_ns, rel=0.03)
    least, most = prefill_us
    assert least <= engine.prefill_s_per_token * 1e6 <= most


def test_a_group_joined_by_pcie_steps_more_slowly() -> None:
    by_pcie = replace(H100, nvlink_bytes_per_s=0.0)
    slow, fast = (estimate(LLAMA_70B, gpu, layout=Layout(4)) for gpu in (by_pcie, H100))
    assert slow.weights_s > 1.3 * fast.weights_s


def test_bandwidth_moves_decoding_and_throughput_moves_prompts() -> None:
    faster = estimate(LLAMA_8B, H200)
    assert faster.weights_s == pytest.approx(EngineParams().weights_s * 3.35 / 4.8)
    assert faster.context_s_per_token < EngineParams().context_s_per_token
    assert faster.prefill_s_per_token == EngineParams().prefill_s_per_token
    assert faster.kv_blocks > 2 * EngineParams().kv_blocks


def test_fp8_halves_prompts_only_where_the_gpu_computes_in_it() -> None:
    base = EngineParams()
    assert estimate(LLAMA_8B, H100, FP8).prefill_s_per_token < 0.51 * base.prefill_s_per_token
    old, old_fp8 = estimate(LLAMA_8B, A100), estimate(LLAMA_8B, A100, FP8)
    assert old_fp8.prefill_s_per_token == old.prefill_s_per_token
    assert old_fp8.weights_s < 0.6 * old.weights_s


def test_fp8_kv_doubles_the_cache_and_halves_its_reading() -> None:
    base, small = estimate(LLAMA_8B, H100), estimate(LLAMA_8B, H100, FitWish("bf16", "fp8"))
    assert small.kv_blocks == pytest.approx(2 * base.kv_blocks, abs=1)
    assert small.context_s_per_token == pytest.approx(base.context_s_per_token / 2)


def test_an_engine_that_was_measured_keeps_its_distance_from_the_estimate() -> None:
    measured = replace(EngineParams(), weights_s=0.008, kv_blocks=20_000)
    before, after = estimate(LLAMA_8B, H100), estimate(LLAMA_8B, H200)
    changed = rescale(measured, before, after)
    assert changed.weights_s == pytest.approx(0.008 * 3.35 / 4.8)
    assert changed.kv_blocks == pytest.approx(20_000 * after.kv_blocks / before.kv_blocks, abs=1)
    assert rescale(measured, before, before) == measured
