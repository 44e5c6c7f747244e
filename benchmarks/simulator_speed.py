"""How many requests the simulator runs per second of one core, under the full policies.

    python -m benchmarks.simulator_speed [--repeats N] [--report FILE]

Requests are clients' HTTP requests, retries included. Each scenario is run several times in one
process and the fastest run counts, since other processes can only slow it down; ``wall`` is
judged, ``cpu`` says how much of the wall time this process really had.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from serve_app.sim.contenders import PRODUCT, THREE_ROUTERS, contend
from serve_app.sim.records import Run
from serve_app.sim.scenarios import KNEES, Scenario, build_scenario, chat_mix, default_setup
from serve_app.sim.simulator import simulate

REPORT = Path("benchmarks/reports/simulator_speed.md")


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest run of one load."""

    name: str
    target_per_s: int | None
    requests: int
    per_wall_s: float
    per_cpu_s: float


def main() -> int:
    """Measure, print and write the page. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator_speed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each load (default: 3)")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page to write")
    args = parser.parse_args()
    setup = default_setup()
    chat = Scenario("chat", "", "chat", setup, chat_mix(0.9 * KNEES["chat"][0]))
    loads = [
        ("overload, 2 C with retries", build_scenario("overload", setup), PRODUCT, 10_000),
        ("chat at 0.9 C, no retries", chat, PRODUCT, None),
        ("prefix-heavy, 1.2 C", build_scenario("prefix-heavy", setup), PRODUCT, 3_000),
        ("overload, three routers", build_scenario("overload", setup), THREE_ROUTERS, None),
    ]
    results = []
    for name, scenario, contender, target_per_s in loads:
        results.append(measure(name, scenario, contender, target_per_s, max(1, args.repeats)))
        print(row(results[-1]), flush=True)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(page(results), encoding="utf-8")
    missed = [each for each in results if each.per_wall_s < (each.target_per_s or 0)]
    return 1 if missed else 0


def measure(
    name: str, scenario: Scenario, contender: str, target_per_s: int | None, repeats: int
) -> Measured:
    """Run a load several times and return its fastest run."""
    setup = contend(replace(scenario.setup, drain_s=60.0), contender)
    runs: list[Run] = []
    for _ in range(repeats):
        run = simulate(setup, scenario.streams, 0)
        run.questions.clear()
        runs.append(run)
    best = min(runs, key=lambda each: each.wall_s)
    requests = best.offered_attempts
    cpu_s = min(each.cpu_s for each in runs)
    return Measured(name, target_per_s, requests, requests / best.wall_s, requests / cpu_s)


def row(each: Measured) -> str:
    """Return a line of the table."""
    target = f">= {each.target_per_s:,}" if each.target_per_s else "-"
    kept = "-" if each.target_per_s is None else _kept(each)
    return (
        f"| {each.name} | {each.requests:,} | {each.per_wall_s:,.0f} | {each.per_cpu_s:,.0f} "
        f"| {target} | {kept} |"
    )


def page(results: list[Measured]) -> str:
    """Return the report."""
    lines = [
        "# Speed of the simulator",
        "",
        "Produced by `python -m benchmarks.simulator_speed`: simulated requests, retries included, "
        "per second of one core; eight replicas, the full policies, the fastest of several runs.",
        "",
        f"{platform.python_implementation()} {platform.python_version()}, {os.cpu_count()} CPUs.",
        "",
        "| load | requests | per wall second | per CPU second | target | kept |",
        "|---|---|---|---|---|---|",
        *map(row, results),
    ]
    return "\n".join(lines) + "\n"


def _kept(each: Measured) -> str:
    return "yes" if each.per_wall_s >= (each.target_per_s or 0) else "**no**"


if __name__ == "__main__":
    sys.exit(main())
