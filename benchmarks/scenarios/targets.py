"""What the policies promise, and whether a set of results keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import ge, le
from typing import Any

PRODUCT = "headrace"
SEVERAL = "headrace-3-routers"
STICKY_BASELINES = ("sticky", "cache-aware", "abandon-affinity", "gie-scorer")

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Scenario -> contender -> mean figures."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One promise: the value measured, the limit, and whether it is kept.

    ``kept`` is None when the scenario was not run.
    """

    scenario: str
    promise: str
    limit: str
    measured: float | None
    kept: bool | None


def verdicts(results: Results) -> list[Verdict]:
    """Return every promise in order, judged by the product's mean figures."""
    overload = _of(results, "overload")
    burst = _of(results, "tenant-burst")
    flood = _of(results, "long-context-flood")
    prefix = _of(results, "prefix-heavy")
    best_hits = max(
        (
            figures["prefix_hit_ratio"]
            for name, figures in results.get("prefix-heavy", {}).items()
            if name in STICKY_BASELINES
        ),
        default=None,
    )
    hits = prefix.get("prefix_hit_ratio")
    hits_ratio = hits / best_hits if hits is not None and best_hits else None
    return [
        _least("overload", "goodput of the knee", 0.95, overload.get("goodput_ratio")),
        _most("overload", "Critical TTFT p99, s", 1.0, _class(overload, "ttft_p99_s", "critical")),
        _least(
            "overload", "Standard good of offered", 0.8, _class(overload, "good_ratio", "standard")
        ),
        _most("overload", "wasted tokens", 0.01, overload.get("wasted_token_ratio")),
        _least("tenant-burst", "Jain's index", 0.99, burst.get("jain")),
        _most(
            "tenant-burst",
            "victims' TTFT p99 over theirs alone",
            1.2,
            burst.get("victims_ttft_p99_ratio"),
        ),
        _most(
            "long-context-flood",
            "short requests' TTFT p99 over theirs alone",
            1.5,
            flood.get("victims_ttft_p99_ratio"),
        ),
        _most(
            "long-context-flood",
            "preemptions, of any class",
            0,
            _sum(flood.get("preemptions")),
        ),
        _least("prefix-heavy", "hit rate over the best sticky policy's", 0.95, hits_ratio),
        _least("prefix-heavy", "Jain's index", 0.95, prefix.get("jain")),
        *_of_several_routers(results),
    ]


def _of_several_routers(results: Results) -> list[Verdict]:
    """Three routers against one on the same traffic."""
    one = _of(results, "overload")
    three = results.get("overload", {}).get(SEVERAL, {})

    def ratio(name: str) -> float | None:
        if three.get(name) is None or not one.get(name):
            return None
        return three[name] / one[name]

    return [
        _within("overload", "3 routers' goodput over one's", 0.03, ratio("goodput_per_s")),
        _within("overload", "3 routers' Jain over one's", 0.03, ratio("jain")),
        _most(
            "overload",
            "3 routers: a Critical waits while a Sheddable goes, s",
            0.25,
            three.get("critical_passed_s"),
        ),
        _most(
            "overload",
            "3 routers: requests beyond the over-admission bound",
            0,
            three.get("over_bound_requests"),
        ),
    ]


def _of(results: Results, scenario: str) -> Mapping[str, Any]:
    return results.get(scenario, {}).get(PRODUCT, {})


def _class(figures: Mapping[str, Any], name: str, priority_class: str) -> float | None:
    return (figures.get(name) or {}).get(priority_class)


def _sum(counts: Mapping[str, float] | None) -> float | None:
    return None if counts is None else sum(counts.values())


def _least(scenario: str, promise: str, limit: float, measured: float | None) -> Verdict:
    kept = None if measured is None else ge(measured, limit)
    return Verdict(scenario, promise, f">= {limit:g}", measured, kept)


def _within(scenario: str, promise: str, ratio: float, measured: float | None) -> Verdict:
    """Judge a value by its distance from 1, above or below."""
    kept = None if measured is None else abs(measured - 1.0) <= ratio
    return Verdict(scenario, promise, f"1 +- {ratio:g}", measured, kept)


def _most(scenario: str, promise: str, limit: float, measured: float | None) -> Verdict:
    kept = None if measured is None else le(measured, limit)
    return Verdict(scenario, promise, f"<= {limit:g}", measured, kept)
