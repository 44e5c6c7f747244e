"""Measure what the gateway costs, beside its peers: python -m benchmarks.overhead"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.overhead import peers, profiling
from benchmarks.overhead.contenders import CONTENDERS, OURS, VLLM, Contender, model_is_there
from benchmarks.overhead.figures import Figures, figures
from benchmarks.overhead.load import Generator, Tally, Workload
from benchmarks.overhead.report import (
    PACED_64,
    PLAIN_1,
    PLAIN_32,
    STREAMS_32,
    table,
    targets,
)
from benchmarks.overhead.usage import UsageMeter

PACED_TOKENS = 100
PACED_STREAMS = 64
PACED_RATE_PER_S = PACED_STREAMS / (PACED_TOKENS * 0.02)

WORKLOADS = {
    each.name: each
    for each in (
        Workload(PLAIN_1, "sim", stream=False, output_tokens=8, concurrency=1),
        Workload(PLAIN_32, "sim", stream=False, output_tokens=8, concurrency=32),
        Workload(STREAMS_32, "sim", stream=True, output_tokens=100, concurrency=32),
        Workload(
            PACED_64,
            "paced",
            stream=True,
            output_tokens=PACED_TOKENS,
            concurrency=PACED_STREAMS,
            rate_per_s=PACED_RATE_PER_S,
        ),
    )
}
PACKAGES = ("headrace", "ray", "uvicorn", "uvloop", "starlette")
SHORT = {"plain1": PLAIN_1, "plain32": PLAIN_32, "streams": STREAMS_32, "paced": PACED_64}


def main() -> int:
    """Run, print and write. Returns 1 if any answer was not complete."""
    options = _options()
    results = _earlier(options)
    for name in _chosen(options):
        started_s = time.perf_counter()
        print(f"{name}: starting", end="", flush=True)
        with CONTENDERS[name]() as contender:
            print(f", took {time.perf_counter() - started_s:.1f} s", flush=True)
            results[name] = _measure(contender, options)
            if options.profile and name.startswith(OURS):
                _profile(contender, options)
        if options.json is not None:
            _write(options, results)
    print(f"\n{table(results)}\n{targets(results)}")
    if options.json is not None:
        print(f"written to {options.json}")
    failures = sum(run.failures for runs in results.values() for run in runs.values())
    if failures:
        print(f"{failures} answers were not complete and as asked for", file=sys.stderr)
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description="Measure what the gateway costs around a simulated engine, beside its peers.",
    )
    parser.add_argument("--only", metavar="NAMES", help="`ours`, or names divided by `;`")
    parser.add_argument("--quick", action="store_true", help="short runs: a first impression")
    parser.add_argument("--workloads", metavar="NAMES", help=f"some of {','.join(SHORT)}")
    parser.add_argument("--profile", action="store_true", help="py-spy on router and engine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same figures there")
    parser.add_argument("--add", action="store_true", help="keep what FILE holds of others")
    options = parser.parse_args()
    if options.add and options.json is None:
        parser.error("--add: say to which --json FILE")
    options.workloads = (options.workloads or ",".join(SHORT)).split(",")
    for short in options.workloads:
        if short not in SHORT:
            parser.error(f"--workloads: {short!r} is none of {', '.join(SHORT)}")
    return options


def _earlier(options: argparse.Namespace) -> dict[str, dict[str, Figures]]:
    """Return what the file holds that this run adds to."""
    if not options.add or not options.json.exists():
        return {}
    results = json.loads(options.json.read_text())["results"]
    return {
        name: {workload: Figures(**run) for workload, run in runs.items()}
        for name, runs in results.items()
    }


def _chosen(options: argparse.Namespace) -> list[str]:
    """Return which contenders run, saying which do not."""
    if options.only is None:
        wanted = list(CONTENDERS)
    else:
        wanted = [OURS if name == "ours" else name for name in options.only.split(";")]
        if unknown := [name for name in wanted if name not in CONTENDERS]:
            raise SystemExit(f"--only: {unknown[0]!r} is none of {'; '.join(CONTENDERS)}")
    chosen = []
    for name in wanted:
        if name in peers.REQUIREMENTS and not peers.installed(name):
            print(f"{name}: not installed, left out (make bench-overhead PEERS=1 installs it)")
        elif name == VLLM and not model_is_there():
            print(f"{name}: the default model is not prepared, left out (make model prepares it)")
        else:
            chosen.append(name)
    return chosen


def _measure(contender: Contender, options: argparse.Namespace) -> dict[str, Figures]:
    """Run every workload once on a contender, each after a warm-up of its own."""
    warm_s, duration_s = (1.0, 6.0) if options.quick else (3.0, 20.0)
    results = {}
    for short in options.workloads:
        workload = WORKLOADS[SHORT[short]]
        if workload.model not in contender.models:
            continue
        _run(contender, workload, warm_s)
        meter = UsageMeter(contender.roles)
        began_s = time.perf_counter()
        tally = _run(contender, workload, duration_s)
        run = figures(workload, tally, meter.read(time.perf_counter() - began_s))
        results[workload.name] = run
        chunks = f", {run.chunks_per_s:.0f} chunks/s" if run.chunks_per_s else ""
        print(f"  {workload.name}: {run.requests_per_s:.0f} requests/s{chunks}", flush=True)
        for error in run.errors:
            print(f"    {error}", file=sys.stderr)
    return results


def _run(contender: Contender, workload: Workload, duration_s: float) -> Tally:
    generator = Generator(contender.url, contender.key, workload, simulated=contender.simulated)
    return uvloop.run(generator.run(duration_s))


def _profile(contender: Contender, options: argparse.Namespace) -> None:
    """Print where router and engine spend their time in each workload that saturates them."""
    for short in options.workloads:
        workload = WORKLOADS[SHORT[short]]
        if workload.concurrency == 1:
            continue
        roles = contender.roles()
        recordings = {
            "router": profiling.Recording(roles["router"][0], profiling.SECONDS),
            "engine": profiling.Recording(
                profiling.of_pool(roles["engine"], workload.model), profiling.SECONDS
            ),
        }
        _run(contender, workload, profiling.SECONDS + 2)
        for role, recording in recordings.items():
            print(f"\n{role}, {workload.name}\n{recording.tables()}", flush=True)


def _write(options: argparse.Namespace, results: Mapping[str, Mapping[str, Figures]]) -> None:
    document: dict[str, Any] = {
        "machine": _machine(),
        "load_average_after": os.getloadavg()[0],
        "quick": options.quick,
        "results": {
            name: {workload: asdict(run) for workload, run in runs.items()}
            for name, runs in results.items()
        },
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=2) + "\n")


def _machine() -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": models[0] if models else platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(main())
