"""The knee: the rate up to which a fleet keeps its latency targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve_app.core.capacity import in_flight, service_s
from serve_app.core.knee import next_load
from serve_app.core.types import Outcome
from serve_app.sim.records import Run, percentile
from serve_app.sim.setup import Setup
from serve_app.sim.simulator import simulate
from serve_app.sim.summary import is_good
from serve_app.sim.workload import Traffic

TTFT_P95_S = 1.0
TPOT_P95_S = 0.05
COMPLETED_RATIO = 0.99
PRECISION_RATIO = 0.02


@dataclass(frozen=True, slots=True)
class Point:
    """One rate tried: what was offered and what was good, requests/s, and the latencies.

    ``stay_s`` is how long a completed request stayed on average.
    """

    offered_per_s: float
    goodput_per_s: float
    ttft_p95_s: float | None
    tpot_p95_s: float | None
    holds: bool
    stay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Knee:
    """The highest rate that held and every rate tried, in order of rate.

    ``in_flight`` is how many requests the fleet holds there, by Little's law.
    """

    rate_per_s: float
    goodput_per_s: float
    points: tuple[Point, ...]
    in_flight: float = 0.0


def find_knee(
    setup: Setup,
    streams: Callable[[float], Sequence[Traffic]],
    *,
    bracket_per_s: tuple[float, float] = (1.0, 1000.0),
    seed: int = 0,
) -> Knee:
    """Bisect for the highest rate with TTFT p95 <= 1 s and TPOT p95 <= 50 ms, to 2 %.

    ``streams`` returns the traffic at a total rate. At least 99 % of what is offered must
    complete. The rate is doubled from the lower end until it fails, so a wide bracket is
    cheap.

    Raises:
        ValueError: the lower end of the bracket fails already.
    """
    points: list[Point] = []

    def holds(rate_per_s: float) -> bool:
        run = simulate(setup, streams(rate_per_s), seed)
        points.append(_point(run, setup, rate_per_s))
        return points[-1].holds

    low, most = bracket_per_s
    tried: dict[float, bool] = {}
    while True:
        rate_per_s = next_load(tried, low=low, most=most, precision_ratio=PRECISION_RATIO)
        if rate_per_s is None:
            break
        tried[rate_per_s] = holds(rate_per_s)
    if not any(tried.values()):
        raise ValueError(f"the fleet misses its targets at {low} requests/s already")
    points.sort(key=lambda point: point.offered_per_s)
    best = max((point for point in points if point.holds), key=lambda point: point.offered_per_s)
    held = in_flight(best.offered_per_s, best.stay_s)
    return Knee(best.offered_per_s, best.goodput_per_s, tuple(points), held)


def _point(run: Run, setup: Setup, rate_per_s: float) -> Point:
    measured = [each for each in run.questions if setup.measures(each.arrival.arrival_s)]
    done = [each for each in measured if each.outcome is Outcome.COMPLETED]
    ttft_s = percentile((each.ttft_s for each in done if each.ttft_s is not None), 0.95)
    tpot_s = percentile((each.tpot_s for each in done), 0.95)
    good = sum(is_good(each, setup.slo) for each in measured)
    holds = (
        ttft_s is not None
        and tpot_s is not None
        and ttft_s <= TTFT_P95_S
        and tpot_s <= TPOT_P95_S
        and len(done) >= COMPLETED_RATIO * len(measured)
    )
    window_s = setup.duration_s - setup.warmup_s
    stays_s = [
        service_s(each.ttft_s, each.output_tokens - 1, each.tpot_s)
        for each in done
        if each.ttft_s is not None
    ]
    stay_s = sum(stays_s) / max(1, len(stays_s))
    return Point(rate_per_s, good / window_s, ttft_s, tpot_s, holds, stay_s)
