"""The scenarios' results as one page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.scenarios.targets import Verdict

COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("good/s", ("goodput_per_s",), "{:.1f}"),
    ("of knee", ("goodput_ratio",), "{:.2f}"),
    ("Jain", ("jain",), "{:.3f}"),
    ("TTFT p99 Crit, s", ("ttft_p99_s", "critical"), "{:.2f}"),
    ("TTFT p99 Std, s", ("ttft_p99_s", "standard"), "{:.2f}"),
    ("TTFT p99 Shed, s", ("ttft_p99_s", "sheddable"), "{:.2f}"),
    ("good Crit", ("good_ratio", "critical"), "{:.2f}"),
    ("good Std", ("good_ratio", "standard"), "{:.2f}"),
    ("good Shed", ("good_ratio", "sheddable"), "{:.2f}"),
    ("wasted", ("wasted_token_ratio",), "{:.3f}"),
)
EXTRA: Mapping[str, tuple[tuple[str, tuple[str, ...], str], ...]] = {
    "tenant-burst": (("victims' p99 / alone", ("victims_ttft_p99_ratio",), "{:.2f}"),),
    "long-context-flood": (
        ("short p99 / alone", ("victims_ttft_p99_ratio",), "{:.2f}"),
        ("short p99, s", ("victims_ttft_p99_s",), "{:.2f}"),
        ("preemptions Std", ("preemptions", "standard"), "{:.0f}"),
        ("preemptions Shed", ("preemptions", "sheddable"), "{:.0f}"),
    ),
    "prefix-heavy": (
        ("hit rate", ("prefix_hit_ratio",), "{:.3f}"),
        ("TTFT p90 Std, s", ("ttft_p90_s", "standard"), "{:.3f}"),
    ),
    "diurnal": (
        ("replica-hours", ("replica_hours",), "{:.1f}"),
        ("turns", ("oscillations",), "{:.0f}"),
    ),
    "overload": (
        ("attempts / question", ("retry_amplification",), "{:.2f}"),
        ("over cap, requests", ("over_admitted_max",), "{:.1f}"),
        ("Critical passed, s", ("critical_passed_s",), "{:.2f}"),
    ),
    "overload-standard": (("attempts / question", ("retry_amplification",), "{:.2f}"),),
    "engine-faults": (
        ("lost", ("lost_requests",), "{:.0f}"),
        ("duplicated tokens", ("duplicated_tokens",), "{:.0f}"),
        ("recovery after kill, s", ("recovery_s", "kill@40"), "{:.0f}"),
        ("prefill", ("recovery_s", "prefill@70"), "{:.0f}"),
        ("drain", ("recovery_s", "drain@180"), "{:.0f}"),
        ("hang", ("recovery_s", "hang@330"), "{:.0f}"),
    ),
}


def page(
    sections: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]],
    judged: Sequence[Verdict],
    *,
    seeds: int,
    knees: Mapping[str, tuple[float, float]],
    calibration: Mapping[str, Any],
    command: str,
    pictures: Mapping[str, Sequence[str]],
) -> str:
    """Return the page; a section is a scenario's name, summary and its contenders' results.

    ``pictures`` are files beside the page, by scenario.
    """
    lines = [
        "# Policies against baselines, simulated",
        "",
        f"Produced by `{command}`. Eight simulated H100 replicas of an 8B model; {seeds} seeds, "
        "every contender on the same arrivals. Cells are means, in brackets the least and the "
        "most over the seeds. Baselines send every request to an engine at once; its queue is "
        "first come, first served.",
        "",
        "Good: answered whole, TTFT within the class's target, TPOT <= 50 ms. The knee "
        "(TTFT p95 <= 1 s, TPOT p95 <= 50 ms) of each mix, offered and good requests/s: "
        + ", ".join(f"{name} {rate:g} and {good:g}" for name, (rate, good) in knees.items())
        + ".",
        "",
        "Calibration of the engine model (derived, not measured on hardware):",
        "",
        "| pool | " + " | ".join(next(iter(calibration.values()))) + " |",
        "|---" * (1 + len(next(iter(calibration.values())))) + "|",
        *(
            f"| {name} | " + " | ".join(f"{value:g}" for value in numbers.values()) + " |"
            for name, numbers in calibration.items()
        ),
        "",
        "## Targets",
        "",
        "| scenario | promise | limit | measured | kept |",
        "|---|---|---|---|---|",
        *(
            f"| {each.scenario} | {each.promise} | {each.limit} | "
            f"{'-' if each.measured is None else f'{each.measured:.4g}'} | "
            f"{'not run' if each.kept is None else 'yes' if each.kept else '**no**'} |"
            for each in judged
        ),
    ]
    for name, summary, results in sections:
        lines += ["", f"## {name}", "", f"{summary}.", "", *_table(name, results)]
        lines += [line for each in pictures.get(name, ()) for line in ("", f"![{name}]({each})")]
    return "\n".join(lines) + "\n"


def _table(scenario: str, results: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = [
        column
        for column in (*COLUMNS, *EXTRA.get(scenario, ()))
        if any(_dig(result, column[1]) is not None for result in results)
    ]
    lines = ["| policy | " + " | ".join(title for title, _, _ in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for result in results:
        cells = [_cell(result, path, form) for _, path, form in columns]
        lines.append(f"| {result['policy']} | " + " | ".join(cells) + " |")
    return lines


def _cell(result: Mapping[str, Any], path: tuple[str, ...], form: str) -> str:
    mean = _dig(result, path)
    if mean is None:
        return "-"
    low, high = _dig(result["spread"]["low"], path), _dig(result["spread"]["high"], path)
    shown = [form.format(value) for value in (mean, low, high)]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]}-{shown[2]})"


def _dig(figures: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        figures = None if figures is None else figures.get(key)
    return figures
