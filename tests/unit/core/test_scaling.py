"""Sizing a pool: Little's law at the knee, quick up, slow down, never by chance."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from math import inf, isfinite, nan, nextafter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.scaling import (
    PEAKS_MAX,
    Decision,
    Demand,
    ScalingPolicy,
    ScalingState,
    decide,
)
from tests.properties import examples

POLICY = ScalingPolicy(least=1, most=20, knee_concurrency=50.0, safety_ratio=0.8, cold_start_s=0.0)
TICK_S = 5.0


class Pool:
    """A pool that gets what it asks for at once, under a load that a test sets."""

    def __init__(self, policy: ScalingPolicy, size: int = 1) -> None:
        self.policy = policy
        self.size = size
        self.now_s = 0.0
        self.state = ScalingState()
        self.last: Decision | None = None

    def run(
        self,
        for_s: float,
        rate_per_s: float = 0.0,
        *,
        stay_s: float | None = 1.0,
        queued: float = 0.0,
        kv_usage_ratio: float = 0.0,
        day: bool = False,
    ) -> list[int]:
        sizes = []
        for _ in range(int(for_s / TICK_S)):
            self.now_s += TICK_S
            demand = Demand(
                self.now_s,
                self.size,
                0,
                offered=rate_per_s * TICK_S,
                queued=queued,
                in_flight=rate_per_s * (stay_s or 0.0),
                stay_s=stay_s if rate_per_s else None,
                kv_usage_ratio=kv_usage_ratio,
                day_s=self.now_s if day else None,
            )
            self.last = decide(self.policy, self.state, demand)
            self.state = self.last.state
            self.size = self.last.replicas
            sizes.append(self.size)
        return sizes


def test_the_size_is_what_arrives_times_how_long_it_stays_over_what_a_replica_holds() -> None:
    """100/s x 2 s = 200 in flight; a replica is planned with 50 x 0.8 = 40 of it."""
    pool = Pool(POLICY)
    assert pool.run(120, 100.0, stay_s=2.0)[-1] == 5
    assert pool.last is not None
    assert pool.last.reason == "hold 5 -> 5: 100.00/s x 2.00 s at 40 each = 5.00"


def test_a_stay_measured_at_light_load_is_stretched_to_what_it_will_be_when_packed() -> None:
    policy = replace(POLICY, slowdown_at_knee=3.0)
    # 4 of 50 held: 1.16 times alone; planned with 0.8 of the knee: 2.6 times.
    demand = Demand(300.0, 10, 0, offered=200.0, queued=0, in_flight=40.0, stay_s=1.0)
    state = ScalingState(at_s=295.0, began_s=290.0, fast_per_s=40, slow_per_s=40, held=4.0)
    decision = decide(policy, state, demand)
    assert decision.needed == pytest.approx(40 * (2.6 / 1.16) / 40, rel=1e-3)


def test_a_burst_grows_the_pool_in_bounded_steps_and_nothing_shrinks_after_it_for_long() -> None:
    pool = Pool(replace(POLICY, up_step_least=4), size=2)
    pool.run(600, 60.0)
    assert pool.size == 2
    sizes = pool.run(60, 600.0)
    assert sizes[0] <= 6
    assert sizes[-1] == 15
    quiet = pool.run(POLICY.down_after_s - TICK_S, 60.0)
    assert min(quiet) >= 15, "the largest size wanted of late counts"
    assert pool.run(900, 60.0)[-1] == 2


def test_it_shrinks_by_at_most_its_step() -> None:
    pool = Pool(replace(POLICY, down_step_ratio=0.1), size=20)
    pool.run(600, 760.0)
    sizes = [20, *pool.run(3600, 40.0)]
    assert max(a - b for a, b in pairwise(sizes)) <= 2
    assert sizes[-1] == 2, "one would hold it, but with nothing to spare"


def test_one_less_must_hold_it_with_a_margin() -> None:
    pool = Pool(POLICY, size=6)
    assert pool.run(1200, 198.0)[-1] == 6, "4.95 fit on 5, but tightly"
    assert pool.run(1200, 178.0)[-1] == 5


def test_a_waiting_queue_calls_for_more_than_the_rate_does() -> None:
    pool = Pool(POLICY, size=4)
    assert pool.run(120, 150.0)[-1] == 4
    assert pool.run(TICK_S, 150.0, queued=800)[-1] > 4


def test_a_full_cache_calls_for_more_than_little_s_law() -> None:
    pool = Pool(POLICY, size=4)
    pool.run(120, 40.0)
    assert pool.run(TICK_S, 40.0, kv_usage_ratio=0.98)[-1] == 5
    assert pool.last is not None
    assert "KV 0.98" in pool.last.reason


def test_before_anything_has_ended_what_is_there_counts() -> None:
    pool = Pool(POLICY)
    assert pool.run(TICK_S, 0.0, stay_s=None, queued=120)[-1] == 3


def test_chance_moves_nothing() -> None:
    """Ten hours of Poisson arrivals at a steady rate: one size, or two that were neighbours."""
    drawn = random.Random(7)
    pool = Pool(replace(POLICY, cold_start_s=120.0), size=5)
    sizes: list[int] = []
    for _ in range(7200):
        rate = max(0.0, drawn.gauss(180.0, (180.0 / TICK_S) ** 0.5))
        sizes += pool.run(TICK_S, rate, stay_s=drawn.gauss(1.0, 0.05))
    turns = sum(a != b for a, b in pairwise(sizes))
    assert set(sizes) <= {5, 6}
    assert turns <= 2


def test_a_rise_is_followed_ahead_of_a_cold_start() -> None:
    """Rising by 0.5/s a second, 120 s ahead is 60/s more."""
    slow, ahead = (Pool(replace(POLICY, cold_start_s=cold_s)) for cold_s in (0.0, 120.0))
    for step in range(120):
        for pool in (slow, ahead):
            pool.run(TICK_S, 100.0 + 0.5 * TICK_S * step)
    assert slow.last is not None
    assert ahead.last is not None
    assert ahead.last.needed - slow.last.needed == pytest.approx(60 / 40, rel=0.2)


def test_headroom_is_kept_while_there_is_demand_and_only_then() -> None:
    pool = Pool(replace(POLICY, headroom=2))
    assert pool.run(120, 40.0)[-1] == 3
    assert pool.run(7200, 0.0)[-1] == 1


def test_to_zero_when_idle_and_up_again_for_one_request_held() -> None:
    pool = Pool(replace(POLICY, least=0, idle_s=600.0))
    pool.run(60, 1.0)
    sizes = pool.run(600, 0.0)
    assert sizes[-2:] == [1, 0], "not a moment before it was idle for ten minutes"
    assert pool.run(600)[-1] == 0
    assert pool.run(TICK_S, 0.0, stay_s=None, queued=1)[-1] == 1


def test_a_rate_known_by_time_of_day_is_met_before_it_comes() -> None:
    policy = replace(POLICY, forecast_buckets=24, cold_start_s=600.0)
    pool = Pool(policy)

    def hour(rate_per_s: float) -> list[int]:
        return pool.run(3600, rate_per_s, day=True)

    for _ in range(2):
        for place in range(24):
            hour(400.0 if place == 9 else 20.0)
    for _ in range(8):
        hour(20.0)
    sizes = hour(20.0)
    assert sizes[0] == 1
    assert sizes[-1] >= 8, "ten minutes before nine it is sized for nine"


def test_the_state_survives_json_and_nonsense_makes_a_fresh_one() -> None:
    pool = Pool(replace(POLICY, forecast_buckets=4))
    pool.run(600, 200.0, day=True)
    assert ScalingState.from_dict(json.loads(json.dumps(pool.state.to_dict()))) == pool.state
    for nonsense in ({"peaks": 3}, {"unknown": 1}, {"peaks": [["a", "b"]]}, {"day": ["x"]}):
        assert ScalingState.from_dict(nonsense) == ScalingState()


def test_many_requests_in_no_time_are_a_high_rate_and_not_an_endless_one() -> None:
    state = ScalingState()
    for now_s in (0.0, nextafter(0.0, 1.0), 5.0, 10.0):
        decision = decide(POLICY, state, Demand(now_s, 1, 0, 1e9, 0.0, 0.0, stay_s=1.0))
        state = decision.state
        assert isfinite(state.fast_per_s + state.slow_per_s + state.long_per_s)
    assert POLICY.least <= decision.replicas <= POLICY.most


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([nan, inf, -inf, 0.0])
demands = st.builds(
    Demand,
    now_s=numbers,
    ready=st.integers(-3, 50),
    starting=st.integers(-3, 50),
    offered=numbers,
    queued=numbers,
    in_flight=numbers,
    stay_s=st.none() | numbers,
    kv_usage_ratio=numbers,
    day_s=st.none() | numbers,
)


@examples(100)
@given(
    st.lists(demands, max_size=60),
    st.integers(0, 3),
    st.integers(0, 30),
    st.sampled_from([0, 24]),
)
def test_whatever_it_is_told_the_size_is_within_bounds(
    told: list[Demand], least: int, more: int, buckets: int
) -> None:
    policy = replace(
        POLICY, least=least, most=max(1, least + more), forecast_buckets=buckets, cold_start_s=60.0
    )
    state = ScalingState()
    for demand in told:
        decision = decide(policy, state, demand)
        assert policy.least <= decision.replicas <= policy.most
        assert decision.reason
        state = decision.state
        assert len(state.peaks) <= PEAKS_MAX
        assert ScalingState.from_dict(json.loads(json.dumps(state.to_dict()))) == state
