"""How many replicas a pool shall have, by Little's law, corrected by what waits.

What arrives per second times how long each stays is what is in flight: L = lambda x W. A
replica carries ``knee_concurrency`` of it within its latency targets, of which a safety
share is planned with. W is measured at the present load and is shorter than at the knee, so
it is stretched to what it will be there: a pool that is half empty would else be sized as if
packing it cost nothing.

Growing is quick: the rate is followed along its trend until a replica ordered now can serve, a
sudden rise counts as soon as chance no longer explains it, and what waits already is worked off
within ``drain_s``. Shrinking is slow: the largest
size wanted within ``down_after_s`` counts, nothing is taken away in a panic, and a replica
less must still hold what there is by a margin. ``decide`` is a function of its arguments; the
state it returns holds numbers only.

Source: Little (1961); stable and panic windows after Knative's autoscaler; the slow way down
after Kubernetes' stabilisation window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, exp, floor, isfinite, sqrt
from typing import Any, Final

from serve_app.core.calendar import DAY_S
from serve_app.core.capacity import ROUNDING, in_flight

PEAKS_MAX: Final = 32
RATE_MAX: Final = 1e9
KV_TARGET_RATIO: Final = 0.8
TREND_RATIO: Final = 4.0
CHANCE_SIGMAS: Final = 4.0
DAY_WEIGHT: Final = 0.5
"""Of the newest day in what is remembered of a time of day."""


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """When a pool grows and shrinks. Times in seconds.

    ``least`` and ``most`` bound the size. ``knee_concurrency`` is how many requests one
    replica holds at its knee, of which ``safety_ratio`` is planned with;
    ``slowdown_at_knee`` is how many times longer a request stays there than alone.
    ``headroom`` replicas are kept warm above what is needed, while there is any demand.
    ``drain_s`` is how soon what waits shall be worked off. The pool counts as full above
    ``kv_high_ratio`` of its KV cache.

    ``cold_start_s`` is how far the trend is followed. ``fast_s`` and ``slow_s`` are the time
    constants of two averages of the rate; a third, TREND_RATIO times slower, gives the trend.
    The fast one above ``panic_ratio`` times the slow one is a panic, during which nothing is
    taken away for ``down_after_s``. ``up_margin`` of a replica may be missing before one is
    added. The pool shrinks to the largest size wanted in the last ``down_after_s``, by at most
    ``down_step_ratio`` of itself (and at least one) per decision, and grows by at most
    ``up_step_ratio`` of itself (and at least ``up_step_least``). ``down_margin_ratio`` of what
    it shrinks to must suffice.

    With ``least`` 0 an idle pool has no replica ``idle_s`` after the last request was there.
    ``forecast_buckets`` > 0 remembers the rate by time of day, in so many parts, and is ready
    for it ``cold_start_s`` ahead.
    """

    least: int = 1
    most: int = 1
    knee_concurrency: float = 64.0
    safety_ratio: float = 0.85
    slowdown_at_knee: float = 1.0
    headroom: int = 0
    drain_s: float = 10.0
    kv_high_ratio: float = 0.9
    cold_start_s: float = 120.0
    fast_s: float = 15.0
    slow_s: float = 60.0
    panic_ratio: float = 2.0
    down_after_s: float = 300.0
    down_step_ratio: float = 0.1
    down_margin_ratio: float = 0.9
    up_margin: float = 0.2
    up_step_ratio: float = 1.0
    up_step_least: int = 4
    idle_s: float = 600.0
    forecast_buckets: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.least <= self.most
        assert self.most >= 1
        assert self.knee_concurrency > 0
        assert 0 < self.safety_ratio <= 1
        assert self.slowdown_at_knee >= 1
        assert self.headroom >= 0
        assert 0 <= self.up_margin < 1
        assert 0 < self.fast_s <= self.slow_s
        assert self.panic_ratio > 1
        assert 0 < self.down_margin_ratio <= 1
        assert 0 < self.down_step_ratio <= 1
        assert self.up_step_ratio > 0
        assert self.up_step_least >= 1
        assert 0 < self.kv_high_ratio <= 1
        assert min(self.drain_s, self.down_after_s, self.idle_s) > 0
        assert self.cold_start_s >= 0
        assert 0 <= self.forecast_buckets <= 1440


@dataclass(frozen=True, slots=True)
class Demand:
    """What a pool was asked for, at ``now_s`` (seconds of any clock that goes forward).

    ``offered`` requests came since the last decision, refused ones included; ``queued`` wait
    in routers; ``in_flight`` are at engines. ``stay_s`` is how long those that ended since
    stayed at an engine on average, None if none did. ``day_s`` is the time of day, None
    where there is none. ``ready`` and ``starting`` are replicas.
    """

    now_s: float
    ready: int
    starting: int
    offered: float
    queued: float
    in_flight: float
    stay_s: float | None = None
    kv_usage_ratio: float = 0.0
    day_s: float | None = None


@dataclass(frozen=True, slots=True)
class ScalingState:
    """What is remembered between decisions.

    ``peaks`` are the sizes wanted of late with their times, falling: the first is the
    largest. ``held`` is the mean number of requests at a replica. ``day`` is the mean rate by
    time of day, negative where it was never seen.
    """

    at_s: float | None = None
    began_s: float = 0.0
    fast_per_s: float = 0.0
    slow_per_s: float = 0.0
    long_per_s: float = 0.0
    stay_s: float | None = None
    held: float = 0.0
    busy_at_s: float | None = None
    panic_until_s: float = 0.0
    peaks: tuple[tuple[float, int], ...] = ()
    day: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return it as numbers, lists and None."""
        return asdict(self)

    @classmethod
    def from_dict(cls, numbers: Mapping[str, Any]) -> ScalingState:
        """Return what ``to_dict`` gave; anything else is a fresh state."""
        try:
            state = cls(**numbers)
            peaks = tuple((float(at_s), int(size)) for at_s, size in state.peaks)
            return replace(state, peaks=peaks, day=tuple(float(each) for each in state.day))
        except (TypeError, ValueError):
            return cls()


@dataclass(frozen=True, slots=True)
class Decision:
    """The size wanted, starting replicas included, why, and what to remember.

    ``needed`` is the size by Little's law before bounds, speeds and windows.
    """

    replicas: int
    needed: float
    reason: str
    state: ScalingState


def decide(policy: ScalingPolicy, state: ScalingState, demand: Demand) -> Decision:
    """Return how many replicas there shall be. O(PEAKS_MAX).

    Nonsense in ``demand`` (negative, infinite, NaN, a clock that went back) counts as zero.
    """
    demand = _sane(demand)
    state = _observed(policy, state, demand)
    size = demand.ready + demand.starting
    if _is_idle(policy, state, demand):
        return Decision(0, 0.0, f"idle for {policy.idle_s:g} s", replace(state, peaks=()))
    needed, parts = _needed(policy, state, demand)
    demanded = bool(demand.queued or demand.in_flight or state.slow_per_s > 1e-6)
    wanted = ceil(needed - policy.up_margin - ROUNDING) + (policy.headroom if demanded else 0)
    # To nothing it goes by being idle for long enough, and not otherwise.
    wanted = min(max(wanted, policy.least, 1 if demanded or size else 0), policy.most)
    state = replace(state, peaks=_peaks(policy, state, demand.now_s, wanted))
    if wanted >= size:
        step = max(policy.up_step_least, floor(size * policy.up_step_ratio))
        chosen, why = min(wanted, size + step), "up" if wanted > size else "hold"
    else:
        chosen, why = _downwards(policy, state, demand, needed, size)
    chosen = min(max(chosen, policy.least), policy.most)
    return Decision(chosen, needed, f"{why} {size} -> {chosen}: {parts}", state)


def _sane(demand: Demand) -> Demand:
    def number(value: float) -> float:
        return min(value, RATE_MAX) if isfinite(value) and value > 0 else 0.0

    stay_s = demand.stay_s
    day_s = demand.day_s
    return replace(
        demand,
        now_s=demand.now_s if isfinite(demand.now_s) else 0.0,
        ready=max(0, demand.ready),
        starting=max(0, demand.starting),
        offered=number(demand.offered),
        queued=number(demand.queued),
        in_flight=number(demand.in_flight),
        stay_s=number(stay_s) or None if stay_s is not None else None,
        kv_usage_ratio=min(1.0, number(demand.kv_usage_ratio)),
        day_s=day_s % DAY_S if day_s is not None and isfinite(day_s) else None,
    )


def _observed(policy: ScalingPolicy, state: ScalingState, demand: Demand) -> ScalingState:
    """Return the state with what came since the last decision."""
    now_s = demand.now_s
    busy = bool(demand.offered or demand.queued or demand.in_flight)
    busy_at_s = now_s if busy or state.busy_at_s is None else state.busy_at_s
    if state.at_s is None or now_s < state.at_s:
        # The first look, or a clock that went back: there is no interval to learn from.
        return replace(
            state,
            at_s=now_s,
            began_s=now_s,
            busy_at_s=busy_at_s if now_s >= busy_at_s else now_s,
            panic_until_s=0.0,
            peaks=(),
            stay_s=state.stay_s or demand.stay_s,
        )
    passed_s = now_s - state.at_s
    if passed_s <= 0:
        return state
    rate = min(RATE_MAX, demand.offered / passed_s)
    known_s = now_s - state.began_s
    # Young averages are plain means, so that they do not start from nothing.
    fast = _mean(state.fast_per_s, rate, passed_s, min(policy.fast_s, known_s))
    slow = _mean(state.slow_per_s, rate, passed_s, min(policy.slow_s, known_s))
    long = _mean(state.long_per_s, rate, passed_s, min(TREND_RATIO * policy.slow_s, known_s))
    stay_s = state.stay_s
    if demand.stay_s is not None:
        before_s = demand.stay_s if stay_s is None else stay_s
        stay_s = _mean(before_s, demand.stay_s, passed_s, policy.slow_s)
    held = demand.in_flight / max(1, demand.ready)
    panics = fast > policy.panic_ratio * slow and fast * (stay_s or 1.0) > policy.knee_concurrency
    return replace(
        state,
        at_s=now_s,
        fast_per_s=fast,
        slow_per_s=slow,
        long_per_s=long,
        stay_s=stay_s,
        held=_mean(state.held, held, passed_s, min(policy.slow_s, known_s)),
        busy_at_s=busy_at_s,
        panic_until_s=now_s + policy.down_after_s if panics else state.panic_until_s,
        day=_day(policy, state.day, demand.day_s, rate, passed_s),
    )


def _mean(before: float, value: float, passed_s: float, constant_s: float) -> float:
    keep = exp(-passed_s / constant_s) if constant_s > passed_s else 0.0
    return keep * before + (1.0 - keep) * value


def _day(
    policy: ScalingPolicy,
    day: tuple[float, ...],
    day_s: float | None,
    rate_per_s: float,
    passed_s: float,
) -> tuple[float, ...]:
    """Return the rates by time of day with the latest one in its place."""
    count = policy.forecast_buckets
    if not count or day_s is None:
        return ()
    rates = list(day) if len(day) == count else [-1.0] * count
    place = int(day_s / DAY_S * count) % count
    # Within a day a part fills up once; from then on half of it is the newest day.
    weight = min(1.0, DAY_WEIGHT * passed_s * count / DAY_S * 2.0)
    before = rates[place]
    rates[place] = rate_per_s if before < 0 else before + weight * (rate_per_s - before)
    return tuple(rates)


def _is_idle(policy: ScalingPolicy, state: ScalingState, demand: Demand) -> bool:
    if policy.least or demand.queued or demand.in_flight or demand.offered:
        return False
    return state.busy_at_s is not None and demand.now_s - state.busy_at_s >= policy.idle_s


def _needed(policy: ScalingPolicy, state: ScalingState, demand: Demand) -> tuple[float, str]:
    """Return the size that the demand asks for, and its parts in words."""
    planned = policy.knee_concurrency * policy.safety_ratio
    stay_s = _stay_at_knee_s(policy, state)
    coming = max(_coming_per_s(policy, state), _forecast(policy, state, demand))
    if stay_s is None:
        # Nothing has ended yet: what is there is what has to be held.
        needed = (demand.in_flight + demand.queued) / planned
        parts = f"{demand.in_flight:g} in flight and {demand.queued:g} queued, none ended yet"
    else:
        needed = in_flight(coming, stay_s) / planned
        parts = f"{coming:.2f}/s x {stay_s:.2f} s at {planned:g} each = {needed:.2f}"
        backlog = demand.queued - demand.ready * policy.knee_concurrency * (
            1.0 - policy.safety_ratio
        )
        if backlog > 0:
            extra = backlog * stay_s / (planned * max(policy.drain_s, stay_s))
            needed += extra
            parts += f" + {extra:.2f} for {demand.queued:g} queued"
    if demand.ready and demand.kv_usage_ratio > policy.kv_high_ratio:
        full = demand.ready * demand.kv_usage_ratio / KV_TARGET_RATIO
        if full > needed:
            needed = full
            parts += f"; KV {demand.kv_usage_ratio:.2f} asks for {full:.2f}"
    return needed, parts


def _coming_per_s(policy: ScalingPolicy, state: ScalingState) -> float:
    """Return the rate expected when a replica that is ordered now can serve.

    An average lags a steady rise by its time constant, so that two of them show the slope.
    """
    fast, slow, long = state.fast_per_s, state.slow_per_s, state.long_per_s
    assert state.at_s is not None
    known_s = state.at_s - state.began_s
    rate = slow
    if known_s >= TREND_RATIO * policy.slow_s:
        slope = (slow - long) / ((TREND_RATIO - 1.0) * policy.slow_s)
        lead_s = policy.slow_s + (policy.cold_start_s if slope > 0 else 0.0)
        # A fall is followed no further than it has come.
        rate = min(max(slow + slope * lead_s, min(fast, slow)), 2.0 * slow)
    # What chance adds to an average of arrivals that come independently.
    chance = CHANCE_SIGMAS * sqrt(slow / (2.0 * policy.fast_s))
    return max(rate, fast) if fast > slow + chance else rate


def _stay_at_knee_s(policy: ScalingPolicy, state: ScalingState) -> float | None:
    """Return how long a request would stay at the knee, from how long it stays now.

    The time grows linearly with what a replica holds, up to ``slowdown_at_knee`` there.
    """
    if state.stay_s is None:
        return None
    fill_ratio = min(1.0, state.held / policy.knee_concurrency)
    slowdown = policy.slowdown_at_knee
    planned = 1.0 + (slowdown - 1.0) * policy.safety_ratio
    return state.stay_s * max(1.0, planned / (1.0 + (slowdown - 1.0) * fill_ratio))


def _forecast(policy: ScalingPolicy, state: ScalingState, demand: Demand) -> float:
    """Return the rate remembered for a cold start from now, 0 where none is."""
    count = len(state.day)
    if not count or demand.day_s is None:
        return 0.0
    later_s = (demand.day_s + policy.cold_start_s) % DAY_S
    return max(0.0, state.day[int(later_s / DAY_S * count) % count])


def _peaks(
    policy: ScalingPolicy, state: ScalingState, now_s: float, wanted: int
) -> tuple[tuple[float, int], ...]:
    """Return the sizes of the window of which none later is as large."""
    since_s = now_s - policy.down_after_s
    kept = [(at_s, size) for at_s, size in state.peaks if at_s >= since_s and size > wanted]
    kept.append((now_s, wanted))
    # Sizes fall along the list: leaving out a late one only lets go of it later.
    return tuple(kept[: PEAKS_MAX - 1] + kept[-1:] if len(kept) > PEAKS_MAX else kept)


def _downwards(
    policy: ScalingPolicy, state: ScalingState, demand: Demand, needed: float, size: int
) -> tuple[int, str]:
    """Return the size to shrink to, at most ``size``, and the word for it."""
    now_s = demand.now_s
    if now_s < state.panic_until_s:
        return size, f"hold (panic for {state.panic_until_s - now_s:.0f} s)"
    if state.peaks and now_s - state.began_s < policy.down_after_s:
        return size, "hold (not watched for long enough)"
    floor_size = state.peaks[0][1] if state.peaks else size
    if floor_size >= size:
        return size, f"hold (wanted {floor_size} within {policy.down_after_s:g} s)"
    if demand.starting:
        return size, "hold (replicas are starting)"
    step = max(1, floor(size * policy.down_step_ratio))
    smaller = max(floor_size, size - step)
    if needed > smaller * policy.down_margin_ratio:
        return size, "hold (too tight with one less)"
    return smaller, "down"
