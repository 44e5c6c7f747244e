"""From a run's tally and its use of the machine to the figures of the report."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.overhead.load import Tally, Workload, percentile
from benchmarks.overhead.usage import Used


@dataclass(frozen=True, slots=True)
class Figures:
    """One workload on one contender. Seconds, bytes; None where it does not apply.

    ``first_*`` is the time to the first event of a stream, ``gap_p99_s`` the time between
    two reads that brought events. CPU is of all the contender's processes, by role, the load
    generator apart. ``chunks`` are events with content, of one token each unless merged.
    """

    workload: str
    requests: int
    failures: int
    errors: list[str]
    wall_s: float
    requests_per_s: float
    latency_p50_s: float | None
    latency_p99_s: float | None
    first_p50_s: float | None
    first_p99_s: float | None
    gap_p99_s: float | None
    chunks_per_s: float | None
    tokens_per_s: float | None
    events_per_read: float | None
    cpu_s_per_1000_requests: float | None
    cpu_s_per_million_chunks: float | None
    cpu_by_role_cores: dict[str, float]
    rss_bytes: int
    rss_by_role_bytes: dict[str, int]
    elsewhere_cores: float


def figures(workload: Workload, tally: Tally, used: Used) -> Figures:
    """Return the figures of one run."""
    requests, wall_s = len(tally.latencies_s), tally.wall_s
    cpu_s = sum(spent for role, spent in used.cpu_s.items() if role != "client")
    streams = workload.stream and tally.chunks
    return Figures(
        workload=workload.name,
        requests=requests,
        failures=tally.failures,
        errors=tally.errors,
        wall_s=wall_s,
        requests_per_s=requests / wall_s,
        latency_p50_s=percentile(tally.latencies_s, 0.5),
        latency_p99_s=percentile(tally.latencies_s, 0.99),
        first_p50_s=percentile(tally.first_s, 0.5),
        first_p99_s=percentile(tally.first_s, 0.99),
        gap_p99_s=percentile(tally.gaps_s, 0.99),
        chunks_per_s=tally.chunks / wall_s if streams else None,
        tokens_per_s=tally.tokens / wall_s if streams else None,
        events_per_read=tally.events / tally.reads if streams else None,
        cpu_s_per_1000_requests=cpu_s / requests * 1000 if requests else None,
        cpu_s_per_million_chunks=cpu_s / tally.chunks * 1e6 if streams else None,
        cpu_by_role_cores={role: spent / wall_s for role, spent in used.cpu_s.items()},
        rss_bytes=sum(used.rss_bytes.values()),
        rss_by_role_bytes=used.rss_bytes,
        elsewhere_cores=used.elsewhere_cores,
    )
