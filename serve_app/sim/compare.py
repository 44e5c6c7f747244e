"""A scenario run by several contenders over several seeds: means, spreads and curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from serve_app.sim.contenders import contend
from serve_app.sim.records import Question, Run, Sample, percentile
from serve_app.sim.scalers import oscillations
from serve_app.sim.scenarios import Scenario
from serve_app.sim.setup import Setup
from serve_app.sim.simulator import replay, simulate
from serve_app.sim.summary import Figures, is_good, served_shares, summarise
from serve_app.sim.workload import Arrival

RECOVERED_RATIO = 0.95
RECOVERY_WINDOW_S = 5

Progress = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class Curves:
    """What is drawn of one run. Per second of arrival: offered and good requests."""

    offered: tuple[int, ...]
    good: tuple[int, ...]
    ttft_s: dict[str, tuple[float, ...]]
    service: dict[str, float]
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Result:
    """One contender's figures: the mean over seeds, the extremes, and every seed's own."""

    contender: str
    mean: Figures
    low: Figures
    high: Figures
    per_seed: tuple[Figures, ...]
    curves: Curves


def compare(
    scenario: Scenario,
    contenders: Sequence[str],
    seeds: Sequence[int],
    *,
    knee_goodput_per_s: float | None = None,
    on_progress: Progress | None = None,
) -> list[Result]:
    """Run every contender on every seed, the same arrivals for all of a seed.

    Curves are of the first seed. ``on_progress`` gets the share done, in [0, 1].

    Raises:
        ValueError: a contender is unknown, or there is no seed.
    """
    if not seeds:
        raise ValueError("at least one seed is needed")
    setups = [contend(scenario.setup, name) for name in contenders]
    total = len(contenders) * len(seeds)
    results = []
    for place, (name, setup) in enumerate(zip(contenders, setups, strict=True)):
        figures, curves = [], None
        for turn, seed in enumerate(seeds):
            done = place * len(seeds) + turn
            report = _scaled(on_progress, done / total, 1 / total)
            run = simulate(setup, scenario.streams, seed, report)
            figures.append(_figures(run, setup, scenario, seed, knee_goodput_per_s))
            curves = curves or _curves(run, setup)
        assert curves is not None
        results.append(_result(name, figures, curves))
    return results


def compare_replay(
    setup: Setup,
    arrivals: Callable[[], Iterator[Arrival]],
    contenders: Sequence[str],
    seeds: Sequence[int],
    *,
    knee_goodput_per_s: float | None = None,
    on_progress: Progress | None = None,
) -> list[Result]:
    """Replay the same arrivals for every contender; seeds then only move the clients' dice.

    Raises:
        ValueError: a contender is unknown, or there is no seed.
    """
    if not seeds:
        raise ValueError("at least one seed is needed")
    total = len(contenders) * len(seeds)
    results = []
    for place, name in enumerate(contenders):
        contending = contend(setup, name)
        figures, curves = [], None
        for turn, seed in enumerate(seeds):
            report = _scaled(on_progress, (place * len(seeds) + turn) / total, 1 / total)
            run = replay(contending, arrivals(), seed, report)
            figures.append(summarise(run, contending, knee_goodput_per_s))
            curves = curves or _curves(run, contending)
        assert curves is not None
        results.append(_result(name, figures, curves))
    return results


def to_json(result: Result) -> dict[str, Any]:
    """Return a result without its curves, for a JSON file."""
    return {
        "policy": result.contender,
        **result.mean,
        "spread": {"low": result.low, "high": result.high},
        "per_seed": list(result.per_seed),
    }


def calibration(setup: Setup) -> dict[str, Any]:
    """Return the engine models' numbers, to be printed beside every result."""
    return {pool.name: {"replicas": pool.replicas, **asdict(pool.engine)} for pool in setup.pools}


def combine(values: Sequence[Any], how: Callable[[list[float]], float]) -> Any:
    """Combine equal structures leaf by leaf; what is no number in any is None."""
    first = next((value for value in values if value is not None), None)
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values if value for key in value)
        return {key: combine([(value or {}).get(key) for value in values], how) for key in keys}
    numbers = [value for value in values if isinstance(value, int | float)]
    return how(numbers) if numbers else None


def _result(name: str, figures: list[Figures], curves: Curves) -> Result:
    mean, low, high = (combine(figures, how) for how in (fmean, min, max))
    return Result(name, mean, low, high, tuple(figures), curves)


def _scaled(on_progress: Progress | None, start: float, share: float) -> Progress | None:
    if on_progress is None:
        return None
    report = on_progress
    return lambda done: report(start + share * done)


def _figures(
    run: Run, setup: Setup, scenario: Scenario, seed: int, knee_goodput_per_s: float | None
) -> Figures:
    figures = summarise(run, setup, knee_goodput_per_s)
    if scenario.undisturbed is not None and scenario.victims is not None:
        alone = summarise(simulate(setup, scenario.undisturbed, seed), setup)
        before_s = alone["ttft_p99_s_by_kind"].get(scenario.victims)
        after_s = figures["ttft_p99_s_by_kind"].get(scenario.victims)
        figures["victims_ttft_p99_s"] = after_s
        figures["victims_ttft_p99_alone_s"] = before_s
        figures["victims_ttft_p99_ratio"] = after_s / before_s if before_s and after_s else None
        measured = [
            each
            for each in run.questions
            if each.arrival.kind == scenario.victims and setup.measures(each.arrival.arrival_s)
        ]
        good = sum(is_good(each, setup.slo) for each in measured)
        figures["victims_good_ratio"] = good / max(1, len(measured))
    if run.sizes:
        figures["oscillations"] = oscillations(run.sizes)
    if setup.faults:
        figures["recovery_s"] = recovery_s(run, setup)
    return figures


def recovery_s(run: Run, setup: Setup) -> dict[str, float | None]:
    """Return per fault how long until 95 % of five seconds' arrivals are good again.

    Counted from the fault to the end of the last bad window before the next fault; zero
    if no window was bad.
    """
    offered, good = _per_second(run.questions, setup)
    times = [fault.at_s for fault in setup.faults]
    figures: dict[str, float | None] = {}
    for place, fault in enumerate(setup.faults):
        end_s = times[place + 1] if place + 1 < len(times) else setup.duration_s
        last_bad_s = fault.at_s
        for second in range(int(fault.at_s), int(end_s) - RECOVERY_WINDOW_S):
            window = slice(second, second + RECOVERY_WINDOW_S)
            if sum(good[window]) < RECOVERED_RATIO * sum(offered[window]):
                last_bad_s = second + RECOVERY_WINDOW_S
        figures[f"{fault.kind.value}@{fault.at_s:.0f}"] = last_bad_s - fault.at_s
    return figures


def _per_second(questions: Sequence[Question], setup: Setup) -> tuple[list[int], list[int]]:
    seconds = int(setup.duration_s) + 1
    offered, good = [0] * seconds, [0] * seconds
    for each in questions:
        second = int(each.arrival.arrival_s)
        if second >= seconds:
            continue
        offered[second] += 1
        good[second] += is_good(each, setup.slo)
    return offered, good


def _curves(run: Run, setup: Setup) -> Curves:
    offered, good = _per_second(run.questions, setup)
    ttft_s: dict[str, list[float]] = defaultdict(list)
    for each in run.questions:
        arrival = each.arrival
        if setup.measures(arrival.arrival_s) and each.ttft_s is not None:
            ttft_s[arrival.priority_class.name.lower()].append(each.ttft_s)
    ratios = [step / 100 for step in range(101)]
    return Curves(
        tuple(offered),
        tuple(good),
        {
            name: tuple(percentile(values, ratio) or 0.0 for ratio in ratios)
            for name, values in sorted(ttft_s.items())
        },
        served_shares(run, setup),
        tuple(run.samples),
    )
