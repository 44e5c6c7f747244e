"""How many replicas a traffic profile takes within latency targets, and what they cost.

A replica that holds n requests takes d(n) for a step of decoding. While one request is
answered n others arrive (Little), and each one's prompt holds all up by what it takes beyond
a decoding step. So

    TPOT(n) = d(n) + (n - 1) x extra / output       stay W(n) = TTFT + output x TPOT(n)

The knee is the largest n whose 95th percentiles keep the targets and whose KV cache fits;
what varies is what others do to a request, and its 95th percentile is three times its mean,
as if exponential. Replicas = ceil(rate x W / (knee x safety)).

Source: the serving playbook, sections 2.1 and 5.3; its unit costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import ceil, expm1
from typing import Final

from serve_app.core.calendar import HOUR_S
from serve_app.core.capacity import in_flight, queue_threshold, replicas_needed, service_s
from serve_app.core.engine_parts import EngineParams
from serve_app.core.knee import Slo
from serve_app.core.savings import MONTH_HOURS
from serve_app.core.scaling import KV_TARGET_RATIO

P95_TIMES: Final = 3.0
"""The 95th percentile of an exponential over its mean, -ln 0.05."""
CAP_RATIO: Final = 4.0 / 3.0
"""A replica's cap over what it holds on average at its knee: bursts go above a mean."""
PROMPT_VARIANCE: Final = 1.7
"""Squared coefficient of variation of chat prompts (Azure's trace of 2023)."""


@dataclass(frozen=True, slots=True)
class TrafficProfile:
    """What comes: requests/s in the busiest minutes and on average, tokens of each.

    ``cached_ratio`` of a prompt is found in the prefix cache.
    """

    peak_per_s: float
    mean_per_s: float
    input_tokens: float
    output_tokens: float
    input_p95_tokens: float
    cached_ratio: float = 0.0

    def __post_init__(self) -> None:
        assert 0 < self.mean_per_s <= self.peak_per_s
        assert self.input_tokens >= 1
        assert self.output_tokens >= 1
        assert self.input_p95_tokens >= self.input_tokens
        assert 0 <= self.cached_ratio < 1


@dataclass(frozen=True, slots=True)
class Steady:
    """A replica that holds ``concurrency`` requests all the time; means unless said."""

    concurrency: int
    ttft_s: float
    tpot_s: float
    stay_s: float
    ttft_p95_s: float
    tpot_p95_s: float
    kv_ratio: float

    @property
    def rate_per_s(self) -> float:
        """Requests that a replica answers per second."""
        return self.concurrency / self.stay_s


class Bound(StrEnum):
    """What a replica cannot exceed."""

    TTFT = "TTFT"
    TPOT = "TPOT"
    KV = "KV cache"
    SEQUENCES = "max_num_seqs"
    REPLICAS = "replicas"


@dataclass(frozen=True, slots=True)
class Impossible:
    """What cannot be had: ``best`` is what can, in the unit of ``wanted``."""

    bound: Bound
    wanted: float
    best: float


@dataclass(frozen=True, slots=True)
class Knee:
    """The most a replica shall hold, what it is like there, and what keeps it from more."""

    steady: Steady
    bound: Bound


@dataclass(frozen=True, slots=True)
class Size:
    """A pool for a profile; ``carried_per_s`` is what it takes with the safety share kept."""

    replicas: int
    needed: int
    carried_per_s: float
    utilisation_mean: float
    utilisation_peak: float
    queue_threshold: int


@dataclass(frozen=True, slots=True)
class Cost:
    """Dollars, per million tokens at the mean rate; estimates, hence no integers."""

    usd_per_hour: float
    usd_per_month: float
    usd_per_million_input: float
    usd_per_million_output: float
    usd_per_million_total: float


def steady(engine: EngineParams, profile: TrafficProfile, concurrency: int) -> Steady:
    """Return a replica's latencies while it holds ``concurrency`` >= 1 requests."""
    assert concurrency >= 1
    output = profile.output_tokens
    held_tokens = concurrency * (profile.input_tokens + output)
    step_s = (
        engine.overhead_s
        + engine.weights_s
        + engine.batch_s_per_request * concurrency
        + engine.context_s_per_token * held_tokens
    )
    prompt_s = _prompt_s(engine, profile, profile.input_tokens)
    # Prompts ride along with a step of decoding, whose weights are read anyway, but once for
    # all that meet in it: as many come per step as sequences end, n / output.
    per_step = concurrency / output
    saved_s = engine.weights_s * -expm1(-per_step) / per_step
    extra_s = max(0.0, prompt_s - saved_s)
    hold_up_s = (concurrency - 1) * extra_s / output
    tpot_s = step_s + hold_up_s
    busy_ratio = min(0.99, concurrency * prompt_s / max(output * tpot_s, 1e-12))
    wait_s = 0.0
    if concurrency > 1:
        wait_s = busy_ratio / (1.0 - busy_ratio) * prompt_s * (1.0 + PROMPT_VARIANCE) / 2.0
    long_prompt_s = _prompt_s(engine, profile, profile.input_p95_tokens)
    ttft_s = wait_s + prompt_s + step_s / 2.0
    capacity_tokens = engine.kv_blocks * engine.block_tokens
    return Steady(
        concurrency,
        ttft_s,
        tpot_s,
        service_s(ttft_s, output, tpot_s),
        ttft_p95_s=P95_TIMES * wait_s + long_prompt_s + step_s,
        tpot_p95_s=step_s + P95_TIMES * hold_up_s,
        kv_ratio=held_tokens / capacity_tokens,
    )


def find_knee(engine: EngineParams, profile: TrafficProfile, slo: Slo) -> Knee | Impossible:
    """Return the knee within the targets, or what is impossible of them."""
    first = steady(engine, profile, 1)
    bound = _exceeded(first, slo)
    if bound is not None:
        wanted, best = {
            Bound.TTFT: (slo.ttft_s, first.ttft_p95_s),
            Bound.TPOT: (slo.tpot_s, first.tpot_p95_s),
            Bound.KV: (KV_TARGET_RATIO, first.kv_ratio),
        }[bound]
        return Impossible(bound, wanted, best)
    # Everything grows with n, so the last that holds is found by bisection. The cap, which is
    # above the mean, must not exceed what the engine runs at once.
    low, high = 1, max(2, int(engine.max_num_seqs / CAP_RATIO) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if _exceeded(steady(engine, profile, middle), slo) is None:
            low = middle
        else:
            high = middle
    beyond = _exceeded(steady(engine, profile, low + 1), slo)
    bound = beyond or Bound.SEQUENCES
    return Knee(steady(engine, profile, low), bound)


def size_pool(
    profile: TrafficProfile,
    stay_s: float,
    knee_concurrency: int,
    *,
    safety_ratio: float = 0.75,
    bounds: tuple[int, int | None] = (1, None),
) -> Size | Impossible:
    """Return the replicas for the busiest minutes; impossible if that is above the bounds.

    ``stay_s`` is a request's stay at the knee, ``bounds`` the least and most replicas.
    """
    least, most = bounds
    assert least >= 0
    assert most is None or least <= most
    needed = replicas_needed(
        profile.peak_per_s, stay_s, knee_concurrency=knee_concurrency, safety_ratio=safety_ratio
    )
    if most is not None and needed > most:
        return Impossible(Bound.REPLICAS, needed, most)
    replicas = max(needed, least, 1)
    held = replicas * knee_concurrency
    return Size(
        replicas,
        needed,
        held * safety_ratio / stay_s,
        in_flight(profile.mean_per_s, stay_s) / held,
        in_flight(profile.peak_per_s, stay_s) / held,
        queue_threshold(knee_concurrency, safety_ratio),
    )


def cap_concurrency(knee_concurrency: int) -> int:
    """Return how many requests a replica may hold at once, of a knee that is a mean."""
    return max(1, round(knee_concurrency * CAP_RATIO))


def pool_cost(usd_per_hour: float, profile: TrafficProfile) -> Cost:
    """Return what a platform of that price costs, by month and by million tokens."""
    inputs = profile.mean_per_s * profile.input_tokens
    outputs = profile.mean_per_s * profile.output_tokens
    return Cost(
        usd_per_hour,
        usd_per_hour * MONTH_HOURS,
        usd_per_million(usd_per_hour, inputs),
        usd_per_million(usd_per_hour, outputs),
        usd_per_million(usd_per_hour, inputs + outputs),
    )


def usd_per_million(usd_per_hour: float, tokens_per_s: float) -> float:
    """Return dollars per million tokens: 1e6 x hourly cost / (3600 x tokens/s)."""
    assert tokens_per_s > 0
    return 1e6 * usd_per_hour / (HOUR_S * tokens_per_s)


def _prompt_s(engine: EngineParams, profile: TrafficProfile, tokens: float) -> float:
    """Return how long a prompt takes to compute, in chunks, with nobody beside it."""
    new_tokens = max(1.0, tokens * (1.0 - profile.cached_ratio))
    chunks = ceil(new_tokens / engine.token_budget)
    return max(
        chunks * engine.weights_s, engine.prefill_s_per_token * new_tokens
    ) + engine.overhead_s * (chunks - 1)


def _exceeded(state: Steady, slo: Slo) -> Bound | None:
    """Return the first bound that a replica is beyond."""
    if state.kv_ratio > KV_TARGET_RATIO:
        return Bound.KV
    if state.ttft_p95_s > slo.ttft_s:
        return Bound.TTFT
    if state.tpot_p95_s > slo.tpot_s:
        return Bound.TPOT
    return None
