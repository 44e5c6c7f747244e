"""The table, and how far the targets are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.overhead.contenders import BARE, OURS, OURS_OFF
from benchmarks.overhead.figures import Figures
from benchmarks.overhead.peers import LITELLM

PLAIN_1, PLAIN_32 = "plain, 1 client", "plain, 32 clients"
STREAMS_32, PACED_64 = "100-chunk streams, 32 clients", "64 streams at 20 ms"

QUIET_CORES = 0.1
"""Busy elsewhere up to which a run counts as undisturbed."""

Results = Mapping[str, Mapping[str, Figures]]

_ROWS = [
    ("requests/s", "requests_per_s", 1.0, ".0f"),
    ("latency p50, ms", "latency_p50_s", 1e3, ".2f"),
    ("latency p99, ms", "latency_p99_s", 1e3, ".2f"),
    ("TTFT p50, ms", "first_p50_s", 1e3, ".1f"),
    ("TTFT p99, ms", "first_p99_s", 1e3, ".1f"),
    ("gap p99, ms", "gap_p99_s", 1e3, ".1f"),
    ("chunks/s", "chunks_per_s", 1.0, ".0f"),
    ("tokens/s", "tokens_per_s", 1.0, ".0f"),
    ("events per read", "events_per_read", 1.0, ".2f"),
    ("CPU s per 1,000 requests", "cpu_s_per_1000_requests", 1.0, ".2f"),
    ("CPU s per million chunks", "cpu_s_per_million_chunks", 1.0, ".1f"),
    ("RSS, MiB", "rss_bytes", 2**-20, ".0f"),
]


def table(results: Results) -> str:
    """Return every figure as one Markdown table, a column for each contender."""
    names = list(results)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for workload in dict.fromkeys(name for runs in results.values() for name in runs):
        lines.append(f"| **{workload}** |" + " |" * len(names))
        runs = [results[name].get(workload) for name in names]
        for label, field, factor, form in _ROWS:
            values = [None if run is None else getattr(run, field) for run in runs]
            if all(value is None for value in values):
                continue
            cells = ["-" if value is None else f"{value * factor:{form}}" for value in values]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        lines.append("| CPU, cores | " + " | ".join(map(_cores, runs)) + " |")
        elsewhere = [f"{run.elsewhere_cores:.2f}" if run else "-" for run in runs]
        lines.append("| busy elsewhere, cores | " + " | ".join(elsewhere) + " |")
        if any(run and run.failures for run in runs):
            failed = [
                f"{run.failures} of {run.failures + run.requests}" if run else "-" for run in runs
            ]
            lines.append("| **failed** | " + " | ".join(failed) + " |")
    return "\n".join(lines) + "\n"


def targets(results: Results) -> str:
    """Return what was aimed at and what came of it, as far as its contenders ran."""
    ours, lines = results.get(OURS), []
    if ours is None:
        return ""
    for label, value, goal, most in _targets(ours, results):
        if value is not None:
            reached = value <= goal if most else value >= goal
            sign = "at most" if most else "at least"
            verdict = "reached" if reached else "NOT reached"
            lines.append(f"| {label} | {sign} {goal:g} | {value:.4g} | {verdict} |")
    disturbed = [
        f"{name} in {workload} ({run.elsewhere_cores:.1f} cores)"
        for name, runs in results.items()
        for workload, run in runs.items()
        if run.elsewhere_cores > QUIET_CORES
    ]
    if disturbed:
        lines += ["", "No verdict holds: others were busy beside " + ", ".join(disturbed) + "."]
    return "\n".join(["| target | goal | measured | |", "|---|---:|---:|---|", *lines]) + "\n"


def _targets(
    ours: Mapping[str, Figures], results: Results
) -> Sequence[tuple[str, float | None, float, bool]]:
    bare, off, litellm = (results.get(name, {}) for name in (BARE, OURS_OFF, LITELLM))

    def ratio(others: Mapping[str, Figures], workload: str, field: str) -> float | None:
        if workload not in ours or workload not in others:
            return None
        return float(getattr(ours[workload], field) / getattr(others[workload], field))

    def added_ms(workload: str, field: str) -> float | None:
        if workload not in ours or workload not in bare:
            return None
        return float(getattr(ours[workload], field) - getattr(bare[workload], field)) * 1e3

    def own(workload: str, field: str, factor: float = 1.0) -> float | None:
        return float(getattr(ours[workload], field)) * factor if workload in ours else None

    rate, chunks = "requests_per_s", "chunks_per_s"
    return [
        (f"{PLAIN_1}: added p50, ms", added_ms(PLAIN_1, "latency_p50_s"), 2.0, True),
        (f"{PLAIN_32}: of governance off", ratio(off, PLAIN_32, rate), 0.75, False),
        (f"{PLAIN_32}: times LiteLLM", ratio(litellm, PLAIN_32, rate), 8.0, False),
        (f"{PLAIN_32}: requests/s (stretch)", own(PLAIN_32, rate), 1000.0, False),
        (f"{STREAMS_32}: chunks/s", own(STREAMS_32, chunks), 40_000.0, False),
        (f"{STREAMS_32}: times LiteLLM", ratio(litellm, STREAMS_32, chunks), 20.0, False),
        (f"{PACED_64}: added TTFT p50, ms", added_ms(PACED_64, "first_p50_s"), 3.0, True),
        (f"{PACED_64}: added TTFT p99, ms", added_ms(PACED_64, "first_p99_s"), 15.0, True),
        (f"{PACED_64}: gap p99, ms", own(PACED_64, "gap_p99_s", 1e3), 26.0, True),
    ]


def _cores(run: Figures | None) -> str:
    if run is None:
        return "-"
    parts = [
        f"{role} {cores:.2f}" for role, cores in run.cpu_by_role_cores.items() if cores >= 0.005
    ]
    return ", ".join(sorted(parts))
