"""A trace replayed with the autoscaler in the loop, as it is and as it might be.

Every case sees the same arrivals through the same admission. What may differ: the engine, its
price, how much of prompts is cached, whether replicas come and go or stay as many, and whether
some of them are spot capacity, which is cheaper and is taken away now and then with a notice.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from serve_app.core.calendar import HOUR_S
from serve_app.core.capacity import in_flight
from serve_app.core.engine_model import EngineParams
from serve_app.core.policy import PoolPolicy
from serve_app.core.scaling import ScalingPolicy
from serve_app.core.sizing import Steady, cap_concurrency, usd_per_million
from serve_app.core.types import Outcome
from serve_app.sim.records import Run
from serve_app.sim.scalers import PolicyScaler, oscillations
from serve_app.sim.scenarios import default_setup
from serve_app.sim.setup import Fault, FaultKind, PoolSetup, Setup, Slo
from serve_app.sim.simulator import replay
from serve_app.sim.summary import is_good
from serve_app.sim.workload import Arrival

CACHE_GROUPS = 16
"""Beginnings that prompts share, where a hit ratio is asked for: few enough to be met soon."""
PREFILL_KNEE_S = 0.105
"""Prompt tokens sent ahead, as time: the scenarios' 3,500 tokens of an 8B model on an H100."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A share of replicas that is cheaper by ``discount_ratio`` and may be taken away.

    Each is interrupted ``interruptions_per_hour`` times an hour at random, with a notice.
    """

    share_ratio: float
    discount_ratio: float = 0.6
    interruptions_per_hour: float = 0.05
    notice_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run a pool; ``fixed`` is its size, None where the autoscaler decides.

    ``cached_ratio`` gives every prompt a beginning that is shared, of that part of it; None
    leaves prompts as the trace has them. ``knee`` is of this engine under this traffic.
    """

    name: str
    engine: EngineParams
    knee: Steady
    alone_s: float
    gpus: int = 1
    usd_per_gpu_hour: float | None = None
    cached_ratio: float | None = None
    spot: Spot | None = None
    fixed: int | None = None


@dataclass(frozen=True, slots=True)
class Pool:
    """What all cases have in common. Times in seconds."""

    slo: Slo
    least: int
    most: int
    begin: int
    safety_ratio: float = 0.85
    cold_start_s: float = 120.0

    def __post_init__(self) -> None:
        assert 0 <= self.least <= self.begin <= self.most
        assert self.most >= 1
        assert 0 < self.safety_ratio <= 1
        assert self.cold_start_s >= 0


@dataclass(frozen=True, slots=True)
class Outturn:
    """What a case came to. Ratios are of the requests that arrived, unless said.

    ``lost_ratio`` are those cut off with their replica. Dollars are None without a price;
    per million tokens, of both kinds, they count those of requests that met the SLO.
    """

    name: str
    requests: int
    slo_ratio: float
    slo_of_admitted_ratio: float
    refused_ratio: float
    lost_ratio: float
    hit_ratio: float
    replica_hours: float
    mean_replicas: float
    largest: int
    turns: int
    interruptions: int
    usd: float | None
    usd_per_million_good: float | None


def run_case(
    case: Case,
    pool: Pool,
    arrivals: Sequence[Arrival],
    *,
    reference: Run | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> tuple[Outturn, Run]:
    """Replay a trace under one case; deterministic.

    ``reference`` is a run whose sizes tell how many replicas there are to be interrupted.

    Raises:
        ValueError: a spot case has no reference.
    """
    faults: tuple[Fault, ...] = ()
    if case.spot is not None:
        if reference is None:
            raise ValueError("a case with spot capacity needs a run without as its reference")
        faults = interruptions(case.spot, reference)
    setup = _setup(case, pool, arrivals, faults)
    asked: Sequence[Arrival] = arrivals
    if case.cached_ratio is not None:
        segment_tokens = case.engine.block_tokens * case.engine.blocks_per_hash
        asked = with_shared_beginnings(arrivals, case.cached_ratio, segment_tokens)
    run = replay(setup, iter(asked), 0, on_progress)
    return _outturn(case, setup, run, len(faults)), run


def with_shared_beginnings(
    arrivals: Sequence[Arrival], ratio: float, segment_tokens: int
) -> list[Arrival]:
    """Return the arrivals with ``ratio`` of every prompt a beginning shared with others.

    Whole segments only; prompts are dealt to CACHE_GROUPS beginnings in turn.
    """
    assert 0 <= ratio < 1
    longest = max((each.prompt_tokens for each in arrivals), default=0)
    segments = int(longest * ratio) // segment_tokens
    chains = [
        tuple((group + 1) << 40 | place for place in range(segments))
        for group in range(CACHE_GROUPS)
    ]
    return [
        replace(
            each,
            prefix_hashes=chains[number % CACHE_GROUPS][
                : int(each.prompt_tokens * ratio) // segment_tokens
            ],
        )
        for number, each in enumerate(arrivals)
    ]


def interruptions(spot: Spot, reference: Run, seed: int = 0) -> tuple[Fault, ...]:
    """Return when spot replicas are taken away: a Poisson process, as many as there are."""
    sizes = reference.sizes or [(each.at_s, each.replicas) for each in reference.samples]
    times_s = [at_s for at_s, _ in sizes]
    largest = max((size for _, size in sizes), default=0)
    per_s = spot.share_ratio * spot.interruptions_per_hour / HOUR_S
    if not largest or not per_s:
        return ()
    source = random.Random(f"{seed}:spot")
    faults = []
    now_s = source.expovariate(per_s * largest)
    while now_s < reference.ended_at_s:
        # Thinned from the largest size down to the one of the moment.
        size = sizes[max(0, bisect_right(times_s, now_s) - 1)][1]
        if source.random() * largest < size:
            place = source.randrange(largest)
            faults.append(Fault(now_s, FaultKind.DRAIN, place, spot.notice_s))
        now_s += source.expovariate(per_s * largest)
    return tuple(faults)


def sizes_by_little(knee: Steady, rates_per_s: Sequence[float], safety_ratio: float) -> list[int]:
    """Return the fixed sizes for some rates, at least 1."""
    planned = knee.concurrency * safety_ratio
    return [max(1, ceil(in_flight(rate, knee.stay_s) / planned)) for rate in rates_per_s]


def _setup(case: Case, pool: Pool, arrivals: Sequence[Arrival], faults: tuple[Fault, ...]) -> Setup:
    setup = default_setup()
    policy = _policy(setup.pools[0].policy, case, pool.slo)
    size = pool.begin if case.fixed is None else case.fixed
    simulated = PoolSetup(
        setup.pools[0].name, policy, case.engine, size, cold_start_s=pool.cold_start_s
    )
    scaling = ScalingPolicy(
        least=pool.least,
        most=pool.most,
        knee_concurrency=float(case.knee.concurrency),
        safety_ratio=pool.safety_ratio,
        slowdown_at_knee=max(1.0, case.knee.stay_s / case.alone_s),
        cold_start_s=pool.cold_start_s,
    )
    return replace(
        setup,
        pools=(simulated,),
        duration_s=arrivals[-1].arrival_s + 1.0,
        warmup_s=0.0,
        cooldown_s=0.0,
        target=pool.slo,
        faults=faults,
        scaler=None if case.fixed is not None else lambda: PolicyScaler(scaling),
    )


def _policy(policy: PoolPolicy, case: Case, slo: Slo) -> PoolPolicy:
    """Return the scenarios' policy for another engine and other targets."""
    critical_s, standard_s, sheddable_s = slo.ttft_s
    cap = cap_concurrency(case.knee.concurrency)
    prefill_s = max(case.engine.prefill_s_per_token, 1e-9)
    return replace(
        policy,
        critical=replace(policy.critical, ttft_slo_s=critical_s),
        standard=replace(policy.standard, ttft_slo_s=standard_s),
        sheddable=replace(policy.sheddable, ttft_slo_s=sheddable_s),
        max_concurrency_per_replica=min(cap, case.engine.max_num_seqs),
        prefill_knee_tokens=max(1, round(PREFILL_KNEE_S / prefill_s)),
        # What finds no replica waits for one that starts, as a pool is told to.
        hold_without_replica_s=600.0,
    )


def _outturn(case: Case, setup: Setup, run: Run, struck: int) -> Outturn:
    asked = run.questions
    count = max(1, len(asked))
    good = [each for each in asked if is_good(each, setup.slo)]
    refused = sum(each.outcome is None for each in asked)
    lost = sum(each.outcome is Outcome.FAILED for each in asked)
    hours = run.replica_s / HOUR_S
    sizes = [size for _, size in run.sizes] or [setup.pools[0].replicas]
    usd = per_million = None
    if case.usd_per_gpu_hour is not None:
        spot = case.spot
        paid_ratio = 1.0 - spot.share_ratio * spot.discount_ratio if spot else 1.0
        usd = hours * case.gpus * case.usd_per_gpu_hour * paid_ratio
        tokens = sum(each.arrival.prompt_tokens + each.output_tokens for each in good)
        if tokens:
            per_million = usd_per_million(usd, tokens / HOUR_S)
    return Outturn(
        case.name,
        len(asked),
        len(good) / count,
        len(good) / max(1, len(asked) - refused),
        refused / count,
        lost / count,
        run.prefix_hit_tokens / max(1, run.prefix_query_tokens),
        hours,
        run.replica_s / max(run.ended_at_s, 1e-9),
        max(sizes),
        oscillations(run.sizes),
        struck,
        usd,
        per_million,
    )
