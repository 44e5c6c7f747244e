"""Replicas and dollars: the playbook's examples, and what holds of every size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.engine_parts import EngineParams
from serve_app.core.knee import Slo
from serve_app.core.scaling import KV_TARGET_RATIO
from serve_app.core.sizing import (
    Bound,
    Impossible,
    Knee,
    Size,
    TrafficProfile,
    cap_concurrency,
    find_knee,
    pool_cost,
    size_pool,
    steady,
    usd_per_million,
)
from tests.properties import examples

ENGINE = EngineParams()
# Azure's conversation trace of 2023, which the simulator's chat is drawn from.
CHAT = TrafficProfile(118.0, 60.0, 1155.0, 211.0, 3_860.0)
SLO = Slo(1.0, 0.05)


def knee_of(profile: TrafficProfile, target: Slo = SLO, engine: EngineParams = ENGINE) -> Knee:
    found = find_knee(engine, profile, target)
    assert isinstance(found, Knee)
    return found


def test_six_a_second_of_twelve_seconds_at_24_take_four_replicas() -> None:
    profile = replace(CHAT, peak_per_s=6.0, mean_per_s=6.0)
    size = size_pool(profile, 12.0, 24, safety_ratio=0.75)
    assert isinstance(size, Size)
    assert (size.replicas, size.queue_threshold) == (4, 6)
    assert size.carried_per_s == pytest.approx(6.0)
    assert size.utilisation_peak == pytest.approx(0.75)


def test_dollars_per_million_tokens_are_the_playbooks() -> None:
    assert usd_per_million(22.0, 3_000.0) == pytest.approx(2.04, abs=0.005)
    assert usd_per_million(12.0, 4_500.0) == pytest.approx(0.74, abs=0.005)
    # At 60 % of the knee a token costs 1.67 times as much.
    assert usd_per_million(22.0, 1_800.0) / usd_per_million(22.0, 3_000.0) == pytest.approx(1 / 0.6)


def test_a_pools_cost_is_borne_by_each_kind_of_token_whole() -> None:
    profile = replace(CHAT, peak_per_s=10.0, mean_per_s=10.0, input_tokens=300.0)
    cost = pool_cost(22.0, replace(profile, output_tokens=300.0))
    assert cost.usd_per_month == pytest.approx(22.0 * 730)
    assert cost.usd_per_million_output == pytest.approx(cost.usd_per_million_input)
    assert cost.usd_per_million_total == pytest.approx(cost.usd_per_million_output / 2)


def test_the_estimated_knee_of_chat_is_what_the_simulator_finds() -> None:
    # 118/s on eight replicas, where each holds 82 requests for 5.6 s.
    knee = knee_of(CHAT)
    assert knee.steady.rate_per_s == pytest.approx(118.0 / 8, rel=0.1)
    assert knee.steady.concurrency == pytest.approx(82, rel=0.1)
    assert knee.steady.stay_s == pytest.approx(5.6, rel=0.1)
    assert knee.bound is Bound.TPOT


@pytest.mark.parametrize(
    ("inputs", "input_p95", "outputs", "measured_per_s"),
    [
        (1207, 3824, 211, 14.25),
        (274, 740, 265, 36.50),
        (683, 1851, 887, 8.62),
        (4327, 7696, 202, 4.38),
        (1000, 1016, 199, 18.00),
    ],
)
def test_for_other_lengths_the_estimate_is_cautious(
    inputs: float, input_p95: float, outputs: float, measured_per_s: float
) -> None:
    # Measured: `find_knee` of serve_app.sim.knee over four replicas by least load, per replica.
    profile = TrafficProfile(1.0, 1.0, inputs, outputs, input_p95)
    assert 0.7 < knee_of(profile).steady.rate_per_s / measured_per_s < 1.1


def test_prompts_found_in_the_cache_raise_the_knee() -> None:
    assert (
        knee_of(replace(CHAT, cached_ratio=0.8)).steady.rate_per_s
        > 1.3 * knee_of(CHAT).steady.rate_per_s
    )


def test_what_keeps_a_replica_from_more_is_named() -> None:
    few = replace(ENGINE, max_num_seqs=64)
    assert knee_of(CHAT, Slo(100.0, 100.0), few).bound is Bound.SEQUENCES
    assert knee_of(CHAT, Slo(0.2, 100.0)).bound is Bound.TTFT
    small = replace(ENGINE, kv_blocks=500)
    assert knee_of(CHAT, engine=small).bound is Bound.KV


@pytest.mark.parametrize(
    ("target", "bound"), [(Slo(1.0, 0.005), Bound.TPOT), (Slo(0.1, 0.05), Bound.TTFT)]
)
def test_an_slo_that_one_request_alone_misses_is_impossible(target: Slo, bound: Bound) -> None:
    found = find_knee(ENGINE, CHAT, target)
    assert isinstance(found, Impossible)
    assert found.bound is bound
    assert (
        found.wanted
        < found.best
        == pytest.approx({Bound.TPOT: 0.0069, Bound.TTFT: 0.123}[bound], rel=0.05)
    )


def test_a_request_larger_than_the_cache_is_impossible() -> None:
    found = find_knee(replace(ENGINE, kv_blocks=80), CHAT, SLO)
    assert isinstance(found, Impossible)
    assert (found.bound, found.wanted) == (Bound.KV, KV_TARGET_RATIO)


def test_more_replicas_than_allowed_are_impossible_and_fewer_than_the_least_are_filled_up() -> None:
    found = size_pool(CHAT, 5.6, 82, bounds=(1, 8))
    assert found == Impossible(Bound.REPLICAS, 11, 8)
    size = size_pool(replace(CHAT, peak_per_s=1.0, mean_per_s=1.0), 5.6, 82, bounds=(3, None))
    assert isinstance(size, Size)
    assert (size.replicas, size.needed) == (3, 1)


@given(
    st.floats(1.0, 20_000.0),
    st.floats(1.0, 4_000.0),
    st.floats(0.0, 0.95),
    st.floats(0.02, 20.0),
    st.floats(0.008, 1.0),
)
@examples(300)
def test_at_the_knee_targets_are_kept_and_one_more_would_break_one(
    inputs: float, outputs: float, cached: float, ttft_s: float, tpot_s: float
) -> None:
    profile = TrafficProfile(1.0, 1.0, inputs, outputs, 2 * inputs, cached)
    target = Slo(ttft_s, tpot_s)
    found = find_knee(ENGINE, profile, target)
    if isinstance(found, Impossible):
        assert found.best > found.wanted
        return
    state = found.steady
    assert state.ttft_p95_s <= ttft_s
    assert state.tpot_p95_s <= tpot_s
    assert state.kv_ratio <= KV_TARGET_RATIO
    assert cap_concurrency(state.concurrency) <= ENGINE.max_num_seqs
    more = steady(ENGINE, profile, state.concurrency + 1)
    assert (
        more.ttft_p95_s > ttft_s
        or more.tpot_p95_s > tpot_s
        or more.kv_ratio > KV_TARGET_RATIO
        or cap_concurrency(more.concurrency) > ENGINE.max_num_seqs
    )
