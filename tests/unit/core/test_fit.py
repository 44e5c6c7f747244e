"""Whether a model fits: the playbook's examples, and what holds of every plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.fit import FitWish, Gpu, Layout, Verdict, plan_fit, try_layout
from serve_app.core.model_shape import GIB, LLAMA_8B, ModelShape
from tests.checkpoints import H100, H200
from tests.checkpoints import LLAMA_70B_SHAPE as LLAMA_70B
from tests.properties import examples

L40S = Gpu("L40S", 44.3, 864e9, {"bf16": 362e12, "fp8": 733e12})
BF16, FP8 = FitWish("bf16"), FitWish("fp8")
ONE = Layout()


def test_70b_keeps_327680_bytes_a_token_and_three_gib_at_ten_thousand() -> None:
    assert LLAMA_70B.kv_bytes_per_token("bf16") == 2 * 80 * 8 * 128 * 2 == 327_680
    assert LLAMA_70B.sequence_kv_bytes(10_000, "bf16") / GIB == pytest.approx(3.05, abs=0.01)
    assert LLAMA_70B.kv_bytes_per_token("fp8") == 163_840
    assert LLAMA_70B.parameters == pytest.approx(70.55e9, rel=0.001)


def test_70b_in_bf16_does_not_fit_one_h200_usefully() -> None:
    assert try_layout(LLAMA_70B, H200, BF16, ONE).verdict is Verdict.NO_ROOM
    # Squeezed to the last GiB the weights fit, and hardly a sequence beside them.
    squeezed = replace(BF16, utilization_ratio=0.99)
    trial = try_layout(LLAMA_70B, H200, squeezed, ONE)
    assert trial.verdict is Verdict.TOO_FEW
    assert trial.concurrency < 2
    assert trial.headroom_ratio < 0.05
    plan = plan_fit(LLAMA_70B, H200, BF16)
    assert plan.chosen is not None
    assert plan.chosen.layout == Layout(tensor_parallel=2)


def test_70b_in_fp8_fits_one_h200() -> None:
    plan = plan_fit(LLAMA_70B, H200, FP8)
    assert plan.chosen is not None
    assert plan.chosen.layout == ONE
    # Embeddings and head keep their 16 bits: 67.6 GiB, not half of 131.4.
    assert plan.chosen.weights_bytes / GIB == pytest.approx(67.6, abs=0.2)
    assert plan.chosen.concurrency == 21
    assert 0.1 < plan.chosen.headroom_ratio < 0.25


@pytest.mark.parametrize(
    ("shape", "layout", "blocks"),
    [(LLAMA_8B, ONE, 26_313), (LLAMA_70B, Layout(4), 30_432), (LLAMA_70B, Layout(8), 88_923)],
)
def test_the_kv_cache_agrees_with_the_simulated_engines_within_five_percent(
    shape: ModelShape, layout: Layout, blocks: int
) -> None:
    trial = try_layout(shape, H100, BF16, layout)
    assert trial.kv_tokens / 16 == pytest.approx(blocks, rel=0.05)


def test_what_no_node_holds_is_cut_into_stages_of_whole_nodes() -> None:
    huge = replace(LLAMA_70B, weights_bytes=810 * 10**9, layers=126, hidden=16_384, heads=128)
    plan = plan_fit(huge, H100, BF16)
    assert plan.chosen is not None
    assert plan.chosen.layout == Layout(tensor_parallel=8, stages=2)
    assert [trial.layout.gpus for trial in plan.trials] == [1, 2, 4, 8, 16]


def test_without_nvlink_layers_are_cut_into_stages_and_the_reason_is_told() -> None:
    plan = plan_fit(LLAMA_70B, L40S, FP8)
    assert plan.chosen is not None
    assert plan.chosen.layout.tensor_parallel == 1
    assert plan.chosen.layout.stages > 1
    assert plan.skipped == ("L40S has no NVLink: pipeline stages, no tensor parallelism",)
    wanted = plan_fit(LLAMA_70B, L40S, replace(FP8, tensor_parallel=4)).chosen
    assert wanted is not None
    assert wanted.layout == Layout(tensor_parallel=4)


def test_groups_that_do_not_divide_the_heads_are_passed_over() -> None:
    odd = replace(LLAMA_70B, heads=60, kv_heads=6)
    plan = plan_fit(odd, H100, BF16)
    assert [trial.layout.tensor_parallel for trial in plan.trials[:2]] == [1, 2]
    assert plan.skipped == (
        "TP 4: 6 KV heads and 4 GPUs do not divide either way",
        "TP 8: 60 attention heads do not divide by 8",
    )
    with pytest.raises(ValueError, match="60 attention heads do not divide by 8"):
        plan_fit(odd, H100, replace(BF16, tensor_parallel=8))


def test_kv_heads_are_copied_to_a_group_larger_than_their_number() -> None:
    assert LLAMA_70B.layer_kv_bytes("bf16", 8) == LLAMA_70B.layer_kv_bytes("bf16", 16)
    assert LLAMA_70B.layer_kv_bytes("bf16", 4) == 2 * LLAMA_70B.layer_kv_bytes("bf16", 8)


def test_a_latent_cache_is_small_and_the_same_on_every_gpu_of_a_group() -> None:
    latent = replace(LLAMA_70B, layers=61, latent=512 + 64)
    assert latent.kv_bytes_per_token("bf16") == 61 * 576 * 2
    assert latent.layer_kv_bytes("bf16", 8) == latent.layer_kv_bytes("bf16", 1)


def test_windowed_layers_keep_the_window_and_stateless_ones_nothing() -> None:
    mixed = replace(LLAMA_70B, windowed_layers=60, window_tokens=1024, stateless_layers=10)
    assert mixed.cached_token_layers(512) == 70 * 512
    assert mixed.cached_token_layers(8192) == 10 * 8192 + 60 * 1024


def test_only_the_experts_used_work_on_a_token() -> None:
    mixture = replace(
        LLAMA_70B, experts=8, experts_used=2, expert_intermediate=7168, weights_bytes=200 * 10**9
    )
    unused = 3 * 80 * 8192 * 7168 * 6
    assert mixture.active_parameters == pytest.approx(mixture.parameters - unused)


@given(
    st.integers(1, 8).map(lambda power: 2 ** (power - 1)),
    st.integers(1, 200) | st.just(16),
    st.integers(256, 131_072),
    st.sampled_from(("bf16", "fp8", "int4")),
    st.sampled_from(("bf16", "fp8")),
    st.sampled_from((H100, H200, L40S)),
)
@examples(200)
def test_what_is_chosen_holds_what_was_asked_and_nothing_before_it_did(
    gpus_per_node: int, concurrency: int, context: int, weights: str, kv: str, gpu: Gpu
) -> None:
    wish = FitWish(weights, kv, context, concurrency, gpus_per_node=gpus_per_node)
    plan = plan_fit(LLAMA_70B, gpu, wish)
    *earlier, last = plan.trials
    assert all(trial.verdict is not Verdict.FITS for trial in earlier)
    if plan.chosen is None:
        assert last.verdict is not Verdict.FITS
        return
    assert plan.chosen is last
    layout = last.layout
    share = -(-LLAMA_70B.layers // layout.stages) / LLAMA_70B.layers / layout.tensor_parallel
    held = concurrency * LLAMA_70B.sequence_kv_bytes(context, kv) * share
    taken = last.weights_bytes + last.activation_bytes + last.overhead_bytes + held
    assert taken <= gpu.memory_gib * GIB * wish.utilization_ratio
    assert layout.tensor_parallel <= gpus_per_node
