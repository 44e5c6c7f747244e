"""Sizing a pool over a day: the product's policy against others, in the simulator.

    python -m benchmarks.scaling [--seeds N] [--report FILE]

A day's shape from 0.2 to 1.3 of eight replicas' knee, 20 times as fast, while a replica takes
120 s to start; every scaler runs under the product's admission on the same arrivals. Others'
windows are shortened by 20 as well, but for the cold start nothing is made easier.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from serve_app.core.scaling import ScalingPolicy
from serve_app.core.types import Outcome
from serve_app.sim.records import Run
from serve_app.sim.scalers import (
    ClairvoyantScaler,
    KnativeScaler,
    OngoingRequestsScaler,
    PolicyScaler,
    SaturationScaler,
    oscillations,
)
from serve_app.sim.scenarios import DAY_S, KNEES, build_scenario, default_setup
from serve_app.sim.setup import Scaler, Setup
from serve_app.sim.simulator import simulate
from serve_app.sim.summary import is_good
from serve_app.sim.workload import day_shape

REPORT = Path("benchmarks/reports/scaling.md")
PRODUCT, CLAIRVOYANT = "headrace", "clairvoyant"
SPEED = 20.0
LEAST, MOST, FLEET = 2, 16, 8
SLO_RATIO, HOURS_RATIO, TURNS_PER_HOUR = 0.99, 1.15, 2.0
# Measured: at C a replica holds 82 requests, each for 5.6 s; alone one takes 1.55 s.
HELD_AT_KNEE, SLOWDOWN_AT_KNEE = 82.0, 3.6


def product_policy(cold_start_s: float) -> ScalingPolicy:
    """Return the product's policy for a day that is SPEED times as fast."""
    return ScalingPolicy(
        least=LEAST,
        most=MOST,
        knee_concurrency=HELD_AT_KNEE,
        safety_ratio=0.9,
        slowdown_at_knee=SLOWDOWN_AT_KNEE,
        cold_start_s=cold_start_s,
        down_after_s=60.0,
    )


def scalers(setup: Setup) -> Mapping[str, Callable[[], Scaler]]:
    """Return every contender by name."""
    knee_per_s, _ = KNEES["chat"]
    shape = day_shape(DAY_S, 0.2, 1.3)
    cold_start_s = setup.pools[0].cold_start_s
    bounds = {"least": LEAST, "most": MOST}
    return {
        CLAIRVOYANT: lambda: ClairvoyantScaler(
            rate_per_s=lambda now_s: 1.3 * knee_per_s * shape(now_s),
            replica_per_s=knee_per_s / FLEET,
            cold_start_s=cold_start_s,
            **bounds,
        ),
        PRODUCT: lambda: PolicyScaler(product_policy(cold_start_s)),
        "Ray Serve's default": lambda: OngoingRequestsScaler(
            target_ongoing=64.0,
            period_s=5.0,
            upscale_delay_s=30.0 / SPEED,
            downscale_delay_s=600.0 / SPEED,
            **bounds,
        ),
        "KPA": lambda: KnativeScaler(
            target_ongoing=64.0,
            stable_s=180.0 / SPEED,
            panic_s=60.0 / SPEED,
            down_after_s=300.0 / SPEED,
            **bounds,
        ),
        "WVA": lambda: SaturationScaler(period_s=60.0 / SPEED, **bounds),
    }


def figures(run: Run, setup: Setup) -> dict[str, float]:
    """Return what a day cost and how it was served."""
    measured = [each for each in run.questions if setup.measures(each.arrival.arrival_s)]
    admitted = [each for each in measured if each.outcome is not None]
    good = sum(is_good(each, setup.slo) for each in measured)
    return {
        "requests": len(measured),
        "slo_of_admitted": sum(is_good(each, setup.slo) for each in admitted) / len(admitted),
        "good_of_offered": good / len(measured),
        "refused": sum(each.outcome is None for each in measured) / len(measured),
        "failed": sum(each.outcome is Outcome.FAILED for each in measured) / len(measured),
        "replica_hours": run.replica_s / 3600.0,
        "turns_per_hour": oscillations(run.sizes) / (run.ended_at_s / 3600.0),
        "largest": max(size for _, size in run.sizes),
    }


def main() -> int:
    """Run all contenders and write the page. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1 (default: 3)")
    parser.add_argument("--only", action="append", metavar="NAME", help="one of the contenders")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page to write")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures by seed")
    parser.add_argument(
        "--add",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="figures that --json wrote before: those contenders are not run again",
    )
    args = parser.parse_args()
    knee_per_s, _ = KNEES["chat"]
    scenario = build_scenario("diurnal", default_setup(), knee_per_s)
    results: dict[str, list[dict[str, float]]] = {}
    for file in args.add:
        results |= json.loads(file.read_text())
    for name, scaler in scalers(scenario.setup).items():
        if name in results or (args.only and name not in args.only):
            continue
        for seed in range(args.seeds):
            begun_s = time.monotonic()
            setup = replace(scenario.setup, scaler=scaler)
            run = simulate(setup, scenario.streams, seed)
            results.setdefault(name, []).append(figures(run, setup))
            shown = {key: round(value, 3) for key, value in results[name][-1].items()}
            took_s = time.monotonic() - begun_s
            print(f"{name}, seed {seed}, {took_s:.0f} s: {shown}", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.only:
        return 0
    text, kept = _page(results)
    args.report.write_text(text)
    print(text)
    return 0 if kept else 1


COLUMNS = (
    ("SLO met, of admitted", "slo_of_admitted", "{:.4f}"),
    ("good, of offered", "good_of_offered", "{:.4f}"),
    ("refused", "refused", "{:.4f}"),
    ("replica-hours", "replica_hours", "{:.2f}"),
    ("turns per hour", "turns_per_hour", "{:.1f}"),
    ("largest", "largest", "{:.0f}"),
)


def _page(results: Mapping[str, list[dict[str, float]]]) -> tuple[str, bool]:
    mean = {
        name: {key: fmean(each[key] for each in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    ours, bound = mean[PRODUCT], mean[CLAIRVOYANT]
    hours_ratio = ours["replica_hours"] / bound["replica_hours"]
    targets: list[tuple[str, str, float, bool]] = [
        ("SLO met, of admitted", f">= {SLO_RATIO}", ours["slo_of_admitted"], True),
        ("replica-hours over the clairvoyant's", f"<= {HOURS_RATIO}", hours_ratio, False),
        ("direction changes per hour", f"<= {TURNS_PER_HOUR:g}", ours["turns_per_hour"], False),
    ]
    limits = (SLO_RATIO, HOURS_RATIO, TURNS_PER_HOUR)
    held = [
        value >= limit if least else value <= limit
        for (_, _, value, least), limit in zip(targets, limits, strict=True)
    ]
    lines = [
        "# Sizing a pool over a day, simulated",
        "",
        f"Produced by `python -m benchmarks.scaling`; {ours['requests']:.0f} requests a day, means "
        "over so many days (seeds from 0), in brackets least and most. A day from 0.2 "
        "to 1.3 of eight replicas' knee in 72 minutes, a replica starts in an unscaled 120 s; all "
        "under the product's admission, which refuses what would be late. Others' windows are "
        "20 times shorter, as the day is. The clairvoyant knows the rate and orders a cold start "
        "ahead; at the knee itself it has nothing left for bursts.",
        "",
        "| target | limit | measured | kept |",
        "|---|---|---|---|",
        *(
            f"| {what} | {limit} | {value:.4g} | {'yes' if kept else '**no**'} |"
            for (what, limit, value, _), kept in zip(targets, held, strict=True)
        ),
        "",
        "| scaler | days | "
        + " | ".join(title for title, _, _ in COLUMNS)
        + " | hours / clairvoyant |",
        "|---" * (len(COLUMNS) + 3) + "|",
    ]
    for name, runs in results.items():
        cells = [_cell([each[key] for each in runs], shape) for _, key, shape in COLUMNS]
        ratio = mean[name]["replica_hours"] / bound["replica_hours"]
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + f" | {ratio:.3f} |")
    return "\n".join(lines) + "\n", all(held)


def _cell(values: list[float], shape: str) -> str:
    mean, least, most = (shape.format(each) for each in (fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least}-{most})"


if __name__ == "__main__":
    sys.exit(main())
