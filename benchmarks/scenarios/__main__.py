"""Run the scenarios with every contender and write ``benchmarks/reports/policies.md``."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scenarios.report import page
from benchmarks.scenarios.targets import verdicts
from serve_app.sim import plots
from serve_app.sim.compare import Result, calibration, compare, to_json
from serve_app.sim.contenders import PRODUCT, THREE_ROUTERS
from serve_app.sim.scenarios import KNEES, MIX_OF, SCENARIOS, build_scenario, default_setup

REPORT = Path("benchmarks/reports/policies.md")
DEFAULT = (
    PRODUCT,
    "round-robin",
    "least-loaded",
    "power-of-two",
    "gie-scorer",
    "sticky",
    "cache-aware",
)
CONTENDERS_OF = {
    "diurnal": (PRODUCT, "least-loaded"),
    "engine-faults": DEFAULT,
}
"""The day is four hundred thousand requests: only two contenders run it."""
SEVERAL = (PRODUCT, THREE_ROUTERS, *DEFAULT[1:])
PICTURES = {"overload": ("goodput", "ttft"), "tenant-burst": ("service",)}
"""Which plots of the first seed stand in the page."""

Section = tuple[str, str, list[dict[str, Any]]]


def main() -> int:
    """Run, write the page, and say which promises are broken. Returns 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scenarios", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default: 5)")
    parser.add_argument("--scenario", action="append", choices=sorted(SCENARIOS))
    parser.add_argument("--policy", action="append", metavar="NAME")
    parser.add_argument("--duration-s", type=float, help="shorter than the scenarios' own")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page to write")
    parser.add_argument("--out", type=Path, metavar="DIR", help="figures and plots go here")
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="write the page anew from an --out's figures"
    )
    args = parser.parse_args()
    if args.again is not None:
        return _write(_earlier(args), args, {})
    sections: list[Section] = []
    pictures: dict[str, list[str]] = {}
    setup = default_setup()
    for name in args.scenario or SCENARIOS:
        contenders = args.policy or CONTENDERS_OF.get(name, SEVERAL)
        scenario = build_scenario(name, setup, duration_s=args.duration_s)
        started_s = time.monotonic()
        results = compare(
            scenario,
            contenders,
            range(args.seeds),
            knee_goodput_per_s=KNEES[MIX_OF.get(name, "chat")][1],
            on_progress=_bar(name),
        )
        _say(f"\r{name}: {time.monotonic() - started_s:.0f} s\n")
        if args.out is not None:
            folder = args.out / name
            folder.mkdir(parents=True, exist_ok=True)
            plots.draw(results, name, folder)
        pictures[name] = _pictures(results, name, args.report)
        sections.append((name, scenario.summary, [to_json(result) for result in results]))
        if args.out is not None:
            figures = {name: results for name, _, results in sections}
            file = args.out / "policies.json"
            file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return _write(sections, args, pictures)


def _earlier(args: argparse.Namespace) -> list[Section]:
    """Return the sections of a run whose figures were kept."""
    kept = json.loads(args.again.read_text(encoding="utf-8"))
    setup = default_setup()
    return [(name, build_scenario(name, setup).summary, results) for name, results in kept.items()]


def _write(
    sections: Sequence[Section], args: argparse.Namespace, pictures: Mapping[str, list[str]]
) -> int:
    """Write the page and say which promises are kept. Returns 0."""
    judged = verdicts(
        {name: {each["policy"]: each for each in results} for name, _, results in sections}
    )
    if not pictures:
        pictures = {name: _drawn(args.report, name) for name, _, _ in sections}
    text = page(
        sections,
        judged,
        seeds=max((len(each["per_seed"]) for _, _, results in sections for each in results)),
        knees=KNEES,
        calibration=calibration(default_setup()),
        command="make bench-policies",
        pictures=pictures,
    )
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(text, encoding="utf-8")
    for each in judged:
        mark = {True: "kept  ", False: "BROKEN", None: "not run"}[each.kept]
        print(f"{mark} {each.scenario}: {each.promise} {each.limit}, measured {each.measured}")
    return 0


def _drawn(report: Path, name: str) -> list[str]:
    """Return the plots of a scenario that lie beside the page."""
    names = [f"{report.stem}-{name}-{kind}.png" for kind in PICTURES.get(name, ())]
    return [each for each in names if (report.parent / each).exists()]


def _pictures(results: Sequence[Result], name: str, report: Path) -> list[str]:
    """Draw a scenario's plots beside the page; return their names."""
    wanted = PICTURES.get(name, ())
    if not wanted:
        return []
    drawn = []
    with tempfile.TemporaryDirectory() as folder:
        for file in plots.draw(results, name, Path(folder)):
            if file.stem in wanted:
                report.parent.mkdir(parents=True, exist_ok=True)
                drawn.append(f"{report.stem}-{name}-{file.name}")
                shutil.copyfile(file, report.parent / drawn[-1])
    return drawn


def _bar(name: str):
    def show(done: float) -> None:
        if sys.stderr.isatty():
            _say(f"\r{name}: {100 * done:3.0f} %")

    return show


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
