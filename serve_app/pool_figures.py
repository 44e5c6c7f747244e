"""What a pool's metrics say of it: read from the endpoint's /metrics by commands that watch it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One pool at one moment. Counts grow from the processes' starts.

    ``slots`` is how many requests its engines run at once, all ``replicas`` together.
    ``step_s`` is the mean over replicas of what a step takes by part, seconds; empty where
    engines do not measure. ``kv_usage_ratio`` is the fullest replica's, ``start_s`` by stage
    the slowest one's.
    """

    replicas: int = 0
    slots: int = 0
    running: int = 0
    kv_usage_ratio: float = 0.0
    preemptions: int = 0
    queued_s: float = 0.0
    queued: int = 0
    fit_error_ratio: float = 0.0
    step_s: Mapping[str, float] = field(default_factory=dict)
    provisional: bool = False
    start_s: Mapping[str, float] = field(default_factory=dict)


def pools_in(text: str) -> dict[str, PoolFigures]:
    """Return every pool that has an engine in a page of metrics, by name.

    Raises:
        ValueError: the page is not one of metrics.
    """
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    peaks: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    steps: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    starts: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    replicas: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            pool = sample.labels.get("pool")
            if pool is None:
                continue
            sums[pool][sample.name] += sample.value
            peaks[pool][sample.name] = max(peaks[pool][sample.name], sample.value)
            if sample.name == "headrace_engine_slots":
                replicas[pool].add(sample.labels.get("replica", ""))
            if sample.name == "headrace_start_seconds":
                stage = sample.labels["stage"]
                starts[pool][stage] = max(starts[pool][stage], sample.value)
            if sample.name == "headrace_engine_step_cost_seconds":
                steps[pool][sample.labels["part"]].append(sample.value)
    return {
        pool: PoolFigures(
            replicas=len(names),
            slots=int(sums[pool]["headrace_engine_slots"]),
            running=int(sums[pool]["headrace_engine_running"]),
            kv_usage_ratio=peaks[pool]["headrace_engine_kv_usage_ratio"],
            preemptions=int(sums[pool]["headrace_engine_preemptions_total"]),
            queued_s=sums[pool]["headrace_queue_wait_seconds_sum"],
            queued=int(sums[pool]["headrace_queue_wait_seconds_count"]),
            fit_error_ratio=peaks[pool]["headrace_engine_step_fit_error_ratio"],
            step_s={part: sum(each) / len(each) for part, each in steps[pool].items()},
            provisional=peaks[pool]["headrace_engine_coefficients_provisional"] > 0,
            start_s=dict(starts[pool]),
        )
        for pool, names in replicas.items()
    }
