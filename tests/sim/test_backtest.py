"""A trace replayed with the autoscaler in the loop, and what changes with what differs."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from serve_app.core.engine_model import EngineParams
from serve_app.core.sizing import TrafficProfile, steady
from serve_app.core.types import PriorityClass, TenantId
from serve_app.sim.backtest import (
    CACHE_GROUPS,
    Case,
    Pool,
    Spot,
    interruptions,
    run_case,
    sizes_by_little,
    with_shared_beginnings,
)
from serve_app.sim.records import Run
from serve_app.sim.setup import Slo
from serve_app.sim.workload import Arrival

pytestmark = pytest.mark.slow

ENGINE = EngineParams()
PROFILE = TrafficProfile(20.0, 20.0, 400.0, 60.0, 400.0)
KNEE = steady(ENGINE, PROFILE, 60)
ALONE_S = steady(ENGINE, PROFILE, 1).stay_s
CASE = Case("autoscaled", ENGINE, KNEE, ALONE_S, usd_per_gpu_hour=3.0)
POOL = Pool(Slo((1.0, 1.0, 1.0), 0.05), least=1, most=6, begin=1, cold_start_s=20.0)


def arrivals(rate_per_s: float, duration_s: float, seed: int = 0) -> list[Arrival]:
    source = random.Random(seed)
    times_s = sorted(source.uniform(0, duration_s) for _ in range(int(rate_per_s * duration_s)))
    standard = PriorityClass.STANDARD
    return [Arrival(at_s, TenantId("t"), standard, 400, 60, 256) for at_s in times_s]


CALM = arrivals(5.0, 120.0)


def test_a_calm_trace_is_served_by_the_least_and_costs_its_hours() -> None:
    outturn, run = run_case(CASE, POOL, CALM)
    assert outturn.requests == len(CALM)
    assert outturn.slo_ratio == outturn.slo_of_admitted_ratio == 1.0
    assert outturn.mean_replicas == pytest.approx(1.0)
    assert outturn.replica_hours == pytest.approx(run.ended_at_s / 3600)
    assert outturn.usd == pytest.approx(3.0 * outturn.replica_hours)
    tokens = sum(each.prompt_tokens + each.output_tokens for each in CALM)
    assert outturn.usd_per_million_good == pytest.approx(1e6 * outturn.usd / tokens)


def test_the_autoscaler_follows_a_rise_that_a_fixed_size_cannot_take() -> None:
    busy = [replace(each, arrival_s=each.arrival_s + 120.0) for each in arrivals(120.0, 90.0)]
    trace = [*CALM, *busy]
    scaled, _ = run_case(CASE, POOL, trace)
    fixed, run = run_case(replace(CASE, name="fixed 1", fixed=1), POOL, trace)
    assert scaled.largest > 2
    assert scaled.slo_ratio > fixed.slo_ratio + 0.1
    assert (fixed.largest, fixed.turns, run.sizes) == (1, 0, [])


def test_the_same_case_comes_out_the_same() -> None:
    assert run_case(CASE, POOL, CALM)[0] == run_case(CASE, POOL, CALM)[0]


def test_prompts_are_cached_to_the_ratio_asked_for() -> None:
    outturn, _ = run_case(replace(CASE, cached_ratio=0.5), POOL, CALM)
    assert outturn.hit_ratio == pytest.approx(0.48, abs=0.04)
    assert run_case(CASE, POOL, CALM)[0].hit_ratio == 0.0


def test_shared_beginnings_are_of_whole_segments_and_differ_by_group() -> None:
    shared = with_shared_beginnings(CALM, 0.5, 16)
    assert {len(each.prefix_hashes) for each in shared} == {200 // 16}
    assert len({each.prefix_hashes for each in shared}) == CACHE_GROUPS
    assert [replace(each, prefix_hashes=()) for each in shared] == CALM


def test_spot_replicas_cost_less_and_are_taken_away_without_losing_a_request() -> None:
    trace = arrivals(30.0, 240.0)
    pool = replace(POOL, begin=3, least=3)
    _, reference = run_case(CASE, pool, trace)
    spot = Spot(1.0, 0.5, interruptions_per_hour=60.0, notice_s=60.0)
    outturn, _ = run_case(replace(CASE, spot=spot), pool, trace, reference=reference)
    assert outturn.interruptions > 3
    assert outturn.lost_ratio == 0.0
    assert outturn.usd == pytest.approx(outturn.replica_hours * 3.0 * 0.5)
    with pytest.raises(ValueError, match="needs a run without"):
        run_case(replace(CASE, spot=spot), pool, trace)


def test_interruptions_are_as_frequent_as_there_are_spot_replicas() -> None:
    run = Run(sizes=[(0.0, 0), (50_000.0, 10)], ended_at_s=100_000.0)
    faults = interruptions(Spot(0.5, interruptions_per_hour=1.0), run)
    assert all(fault.at_s >= 50_000 for fault in faults)
    assert len(faults) == pytest.approx(10 * 0.5 * 50_000 / 3600, rel=0.3)
    assert interruptions(Spot(0.0), run) == ()
    assert interruptions(Spot(0.5), run, seed=1) == interruptions(Spot(0.5), run, seed=1)


def test_fixed_sizes_are_littles() -> None:
    knee = replace(KNEE, concurrency=24, stay_s=12.0)
    assert sizes_by_little(knee, [6.0, 6.01, 0.0], 0.75) == [4, 5, 1]


def test_progress_reaches_the_end() -> None:
    seen: list[float] = []
    run_case(CASE, POOL, CALM, on_progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] > 0.97
