"""The benchmark report of a calibration, and the settings that follow from it.

The report's sections are the benchmark protocol's: profile, traffic, results, decisions, run.
A report with an empty field is not one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any, Final

from serve_app.calibration import Shape
from serve_app.core.capacity import queue_threshold
from serve_app.core.knee import Knee, Level, Served, Slo
from serve_app.core.quantile import quantile
from serve_app.core.sizing import usd_per_million
from serve_app.pool_figures import PoolFigures

SAFETY_RATIO: Final = 0.75
NOT_PRICED: Final = "not priced: give --usd-per-hour"
NONE_SEEN: Final = "none seen"
_DIGITS: Final = 6


@dataclass(frozen=True, slots=True)
class Subject:
    """What was calibrated, in words: of the report's profile."""

    pool: str
    versions: Mapping[str, str]
    revision: str
    hardware: str
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """All that a sweep saw. ``kv_peak_ratio`` is the fullest the cache was at any look."""

    levels: Sequence[Level]
    knee: Knee
    before: PoolFigures
    after: PoolFigures
    kv_peak_ratio: float
    began: str
    warm_up_s: float
    steady_s: float


def report(subject: Subject, shape: Shape, slo: Slo, measured: Measured) -> dict[str, Any]:
    """Return the report as a JSON object; see ``empty_fields``."""
    knee, replicas = measured.knee, max(1, measured.after.replicas)
    served = knee.level.served
    input_per_s, output_per_s = _rates(knee.level)
    queued = measured.after.queued - measured.before.queued
    queued_s = measured.after.queued_s - measured.before.queued_s
    concurrency = knee_concurrency(measured)
    return {
        "object": "calibration",
        "profile": {
            "pool": subject.pool,
            "model": shape.model,
            "revision": subject.revision,
            "hardware": subject.hardware,
            "replicas": replicas,
            "versions": dict(subject.versions),
        },
        "traffic": {
            "source": "closed loop of streaming clients, prompts of random words",
            "prompt_tokens": _quantiles([each.prompt_tokens for each in served]),
            "output_tokens": _quantiles([each.output_tokens for each in served]),
            "cached_prompt_ratio": _round(
                sum(each.cached_prompt_tokens for each in served)
                / max(1, sum(each.prompt_tokens for each in served))
            ),
            "structured_ratio": 0.0,
        },
        "targets": {
            "ttft_s": slo.ttft_s,
            "tpot_s": slo.tpot_s,
            "good_ratio": slo.good_ratio,
        },
        "results": {
            "ttft_hit_s": _latencies([each for each in served if each.cached_prompt_tokens]),
            "ttft_miss_s": _latencies([each for each in served if not each.cached_prompt_tokens]),
            "tpot_s": _quantiles([each.tpot_s for each in served]),
            "end_to_end_s": _quantiles([each.total_s for each in served]),
            "knee": {
                "concurrency": knee.level.concurrency,
                "concurrency_per_replica": concurrency,
                "bounded_by": knee.bounded_by,
                "goodput_per_s": _round(knee.level.goodput_per_s(slo)),
                "input_tokens_per_s": _round(input_per_s),
                "output_tokens_per_s": _round(output_per_s),
            },
            "queue_wait_mean_s": _round(queued_s / queued) if queued > 0 else 0.0,
            "preemptions": measured.after.preemptions - measured.before.preemptions,
            "kv_peak_ratio": _round(measured.kv_peak_ratio),
            "start_s": {k: _round(v) for k, v in measured.after.start_s.items()} or NONE_SEEN,
            "step_cost_s": step_costs(measured) or NONE_SEEN,
            "step_fit_error_ratio": _round(measured.after.fit_error_ratio),
            "levels": [_level(level, slo) for level in measured.levels],
        },
        "decisions": {
            "max_concurrency_per_replica": max(1, floor(concurrency)),
            "planned_concurrency_per_replica": floor(SAFETY_RATIO * concurrency),
            "slowdown_at_knee": _round(slowdown_at_knee(measured)),
            "queue_threshold_per_replica": queue_threshold(floor(concurrency), SAFETY_RATIO),
            "replicas_per_request_per_s": _round(
                replicas / max(1e-9, SAFETY_RATIO * knee.level.goodput_per_s(slo))
            ),
            "usd_per_million_tokens": _prices(subject, measured),
        },
        "run": {
            "date": measured.began,
            "warm_up_s": _round(measured.warm_up_s),
            "steady_state_s": _round(measured.steady_s),
        },
    }


def empty_fields(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of a report's fields that hold nothing."""
    if isinstance(value, Mapping):
        if not value:
            yield path
        for name, each in value.items():
            yield from empty_fields(each, f"{path}.{name}" if path else name)
    elif value is None or value == "" or value == []:
        yield path
    elif isinstance(value, list):
        for place, each in enumerate(value):
            yield from empty_fields(each, f"{path}[{place}]")


def settings(subject: Subject, measured: Measured) -> str:
    """Return the settings that follow, as YAML to be put into a configuration."""
    concurrency = knee_concurrency(measured)
    lines = [
        "# Router's user_config",
        "pools:",
        f"  {subject.pool}:",
        f"    max_concurrency_per_replica: {max(1, floor(concurrency))}",
        "    scaling:",
        f"      knee_concurrency: {_round(concurrency)}",
        f"      safety_ratio: {SAFETY_RATIO}",
        f"      slowdown_at_knee: {_round(slowdown_at_knee(measured))}",
    ]
    costs = step_costs(measured)
    if costs:
        lines += [f"# args of pool-{subject.pool}", "engine:", "  step_costs:"]
        lines += [f"    {part}_s: {cost_s:.3e}" for part, cost_s in costs.items()]
    return "\n".join(lines) + "\n"


def knee_concurrency(measured: Measured) -> float:
    """Return how many requests one replica holds at its knee."""
    return measured.knee.level.concurrency / max(1, measured.after.replicas)


def slowdown_at_knee(measured: Measured) -> float:
    """Return how many times longer a request stays at the knee than at the least load."""
    least = min(measured.levels, key=lambda level: level.concurrency)
    alone_s, there_s = (_stay_s(level) for level in (least, measured.knee.level))
    return max(1.0, there_s / alone_s) if alone_s else 1.0


def step_costs(measured: Measured) -> dict[str, float]:
    """Return what a step takes by part, seconds; empty if the engine has not fitted it."""
    return {} if measured.after.provisional else dict(measured.after.step_s)


def _stay_s(level: Level) -> float:
    return sum(each.total_s for each in level.served) / max(1, len(level.served))


def _rates(level: Level) -> tuple[float, float]:
    prompt = sum(each.prompt_tokens for each in level.served)
    output = sum(each.output_tokens for each in level.served)
    return prompt / level.window_s, output / level.window_s


def _prices(subject: Subject, measured: Measured) -> dict[str, float] | str:
    """Return $ per million input, output and all tokens, at the knee.

    Input and output share the price by the engine time that they take.
    """
    if subject.usd_per_hour is None:
        return NOT_PRICED
    level, costs = measured.knee.level, step_costs(measured)
    input_per_s, output_per_s = _rates(level)
    replicas = max(1, measured.after.replicas)
    usd_per_hour = subject.usd_per_hour * replicas
    uncached = sum(each.prompt_tokens - each.cached_prompt_tokens for each in level.served)
    input_s = costs.get("prefill_token", 0.0) * uncached / level.window_s
    input_usd = usd_per_hour * min(1.0, input_s / replicas)
    return {
        "input": _round(usd_per_million(input_usd, input_per_s)),
        "output": _round(usd_per_million(usd_per_hour - input_usd, output_per_s)),
        "total": _round(usd_per_million(usd_per_hour, input_per_s + output_per_s)),
    }


def _level(level: Level, slo: Slo) -> dict[str, Any]:
    served = level.served
    return {
        "concurrency": level.concurrency,
        "requests": len(served),
        "refused": level.refused,
        "window_s": _round(level.window_s),
        "good_ratio": _round(level.good(slo) / max(1, len(served) + level.refused)),
        "goodput_per_s": _round(level.goodput_per_s(slo)),
        "output_tokens_per_s": _round(_rates(level)[1]),
        "ttft_p95_s": _round(quantile([each.ttft_s for each in served], 0.95)) if served else 0.0,
        "tpot_p95_s": _round(quantile([each.tpot_s for each in served], 0.95)) if served else 0.0,
    }


def _latencies(served: Sequence[Served]) -> dict[str, float] | str:
    return _quantiles([each.ttft_s for each in served]) if served else NONE_SEEN


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{ratio}": _round(quantile(values, ratio / 100)) for ratio in (50, 95, 99)}


def _round(value: float) -> float:
    return round(value, _DIGITS)
