"""A run's figures: goodput, latency by class, fairness, refusals, waste."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from serve_app.core.calendar import HOUR_S
from serve_app.core.types import Outcome, PriorityClass
from serve_app.sim.records import (
    Question,
    Run,
    jain_index,
    max_min_shares,
    percentile,
    service_cost,
)
from serve_app.sim.setup import Setup, Slo

Figures = dict[str, Any]


def is_good(question: Question, slo: Slo) -> bool:
    """Whether a question was answered whole and within its latency targets."""
    if question.outcome is not Outcome.COMPLETED or question.ttft_s is None:
        return False
    within_s = slo.ttft_s[question.arrival.priority_class]
    return question.ttft_s <= within_s and question.tpot_s <= slo.tpot_s


def summarise(run: Run, setup: Setup, knee_per_s: float | None = None) -> Figures:
    """Return the figures of a run, over the questions that arrived in the measured window.

    A question is what a client wants answered, a request each time it asks. Keys with a
    unit in their name are in that unit; ``*_ratio`` are shares. By class and by kind of
    traffic where that matters. ``goodput_ratio`` is of ``knee_per_s``, None without one.
    ``jain`` is over ``served_shares``. ``wasted_token_ratio`` is of all tokens the engines
    processed: those of requests that did not complete, and recomputed ones.
    """
    window_s = setup.duration_s - setup.warmup_s
    measured = [each for each in run.questions if setup.measures(each.arrival.arrival_s)]
    good = sum(is_good(each, setup.slo) for each in measured)
    goodput_per_s = good / window_s
    asked = max(1, len(run.questions))
    return {
        "questions": len(run.questions),
        "requests": run.offered_attempts,
        "offered_per_s": len(measured) / window_s,
        "knee_per_s": knee_per_s,
        "goodput_per_s": goodput_per_s,
        "goodput_ratio": goodput_per_s / knee_per_s if knee_per_s else None,
        "good_ratio": _by_class(measured, lambda each: is_good(each, setup.slo)),
        "shed_ratio": _by_class(measured, lambda each: each.outcome is None),
        "failed_ratio": _by_class(
            measured, lambda each: each.outcome in (Outcome.CANCELLED, Outcome.FAILED)
        ),
        "ttft_p50_s": _ttft(measured, 0.5),
        "ttft_p90_s": _ttft(measured, 0.9),
        "ttft_p99_s": _ttft(measured, 0.99),
        "ttft_p99_s_by_kind": _ttft_by_kind(measured, 0.99),
        "tpot_p95_s": percentile((each.tpot_s for each in _completed(measured)), 0.95),
        "jain": jain_index(list(served_shares(run, setup).values())),
        "wasted_token_ratio": _wasted(run),
        "prefix_hit_ratio": run.prefix_hit_tokens / max(1, run.prefix_query_tokens),
        "preemptions": {each.name.lower(): run.preemptions[each] for each in PriorityClass},
        "rejects": _rejects(run),
        "notices": dict(sorted(run.notices.items())),
        "retry_amplification": run.offered_attempts / asked,
        "restarts": sum(each.restarts for each in run.questions),
        "over_admitted_max": max(0, run.over_admitted_max),
        "over_bound_requests": run.over_bound_requests,
        "critical_passed_s": run.critical_passed_s,
        "lost_requests": run.lost_requests,
        "duplicated_tokens": run.duplicated_tokens,
        "degraded_ratio": sum(each.degraded for each in run.questions) / asked,
        "replica_hours": run.replica_s / HOUR_S,
        "simulated_s": run.ended_at_s,
        "requests_per_wall_s": run.offered_attempts / run.wall_s if run.wall_s else None,
        "requests_per_cpu_s": run.offered_attempts / run.cpu_s if run.cpu_s else None,
    }


def served_shares(run: Run, setup: Setup) -> dict[str, float]:
    """Return what each tenant was served as a share of its max-min fair share.

    Both in fair queueing's cost, over the measured window: a tenant's demand is what it
    asked there, its service what was completed there. So a baseline that serves everybody
    at last, long after the window, does not look fair.
    """
    demands: dict[str, float] = defaultdict(float)
    served: dict[str, float] = defaultdict(float)
    for each in run.questions:
        arrival = each.arrival
        if setup.measures(arrival.arrival_s):
            demands[arrival.tenant] += service_cost(arrival.prompt_tokens, arrival.output_tokens)
        completed = each.outcome is Outcome.COMPLETED
        if completed and setup.warmup_s <= each.ended_s < setup.duration_s:
            served[arrival.tenant] += service_cost(arrival.prompt_tokens, each.output_tokens)
    shares = max_min_shares(demands, sum(served.values()))
    return {tenant: served[tenant] / share for tenant, share in sorted(shares.items()) if share}


def _completed(questions: Iterable[Question]) -> list[Question]:
    return [each for each in questions if each.outcome is Outcome.COMPLETED]


def _by_class(questions: Sequence[Question], holds: Callable[[Question], bool]) -> Figures:
    """Return the share of each class's questions for which ``holds``; None if it had none."""
    figures: Figures = {}
    for priority_class in PriorityClass:
        mine = [each for each in questions if each.arrival.priority_class is priority_class]
        share = sum(map(holds, mine)) / len(mine) if mine else None
        figures[priority_class.name.lower()] = share
    return figures


def _ttft(questions: Sequence[Question], ratio: float) -> Figures:
    figures: Figures = {}
    for priority_class in PriorityClass:
        figures[priority_class.name.lower()] = percentile(
            (
                each.ttft_s
                for each in questions
                if each.arrival.priority_class is priority_class and each.ttft_s is not None
            ),
            ratio,
        )
    return figures


def _ttft_by_kind(questions: Sequence[Question], ratio: float) -> Figures:
    by_kind: dict[str, list[float]] = defaultdict(list)
    for each in questions:
        if each.ttft_s is not None:
            by_kind[each.arrival.kind].append(each.ttft_s)
    return {kind: percentile(values, ratio) for kind, values in sorted(by_kind.items())}


def _wasted(run: Run) -> float:
    useful = sum(
        each.arrival.prompt_tokens - each.cached_tokens + max(0, each.output_tokens - 1)
        for each in _completed(run.questions)
    )
    return max(0.0, 1.0 - useful / run.processed_tokens) if run.processed_tokens else 0.0


def _rejects(run: Run) -> Figures:
    figures: Figures = {each.name.lower(): {} for each in PriorityClass}
    for (priority_class, reason), count in sorted(run.rejects.items()):
        figures[priority_class.name.lower()][reason.value] = count
    return figures
