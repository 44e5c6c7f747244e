"""Whether `headrace calibrate` finds the knee: the same one twice, and the analytic one.

    scripts/isolated .venv/bin/python -m benchmarks.knees [--only sim|real] [--report FILE]

On a live stack with one replica: the simulated engine, whose knee follows from its step times,
and the default model on this machine's processor, whose knee nobody knows beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

REPORT = Path("benchmarks/reports/knees.md")
SIM_RATIO, REAL_RATIO = 0.03, 0.10
CALIBRATION_S = 1800


@dataclass(frozen=True)
class Subject:
    """A pool, what it is asked, and its targets; ``analytic`` is its knee where that is known."""

    name: str
    pool: str
    prompt_tokens: int
    output_tokens: int
    ttft_s: float
    tpot_s: float
    limit_ratio: float
    analytic: float | None = None


def simulated() -> tuple[Subject, dict[str, Any]]:
    """Return the simulated pool: prompts fit into the weights' time, contexts cost."""
    prompt, output, tpot_s = 64, 128, 0.02
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    _, pool, gateway = document["applications"]
    engine = {"overhead_s": 0.00115, "weights_s": 0.0057, "prefill_s_per_token": 20e-6}
    engine |= {"context_s_per_token": 2.2e-6, "batch_s_per_request": 4.4e-6}
    pool["args"]["engine"] |= engine
    pool["args"]["replicas"] |= {"num_replicas": 1}
    policy = gateway["deployments"][0]["user_config"]["pools"]["sim"]
    policy |= {"max_concurrency_per_replica": 256, "early_rejection": False}
    per_request_s = engine["context_s_per_token"] * (prompt + output / 2)
    per_request_s += engine["batch_s_per_request"]
    analytic = (tpot_s - engine["overhead_s"] - engine["weights_s"]) / per_request_s
    return Subject("simulated", "sim", prompt, output, 1.0, tpot_s, SIM_RATIO, analytic), document


def real() -> tuple[Subject, dict[str, Any]]:
    """Return the default model on the processor, as configs/local.yaml serves it."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "local.yaml").read_text())
    policy = document["applications"][2]["deployments"][0]["user_config"]["pools"]["smollm2"]
    policy["early_rejection"] = False
    return Subject("SmolLM2-135M, CPU", "smollm2", 64, 48, 3.0, 0.1, REAL_RATIO), document


def found(stack: Stack, subject: Subject, most: int | None) -> Mapping[str, Any]:
    """Calibrate once; return the report."""
    words = [
        *("calibrate", "--pool", subject.pool, "--url", stack.url, "--key", stack.key, "--json"),
        *("--prompt-tokens", str(subject.prompt_tokens)),
        *("--output-tokens", str(subject.output_tokens)),
        *("--ttft-s", str(subject.ttft_s), "--tpot-s", str(subject.tpot_s)),
        *("--usd-per-hour", "1", "--hardware", f"{os.cpu_count()} cores"),
        *(("--max-concurrency", str(most)) if most else ()),
    ]
    told = stack.command(sys.executable, "-m", "serve_app.cli", *words, timeout_s=CALIBRATION_S)
    print(told.stderr, file=sys.stderr, flush=True)
    if told.returncode != 0:
        raise SystemExit(told.stderr)
    report: Mapping[str, Any] = json.loads(told.stdout)
    return report


def _wait_for_metrics(stack: Stack, pool: str) -> None:
    """Return when the pool's engine is on the service's page of metrics."""
    until(lambda: stack.metric("headrace_engine_slots", pool=pool) > 0, "its engine is known")


def main() -> int:
    """Calibrate each pool so many times and write the page. Returns 1 if a knee is off."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.knees", description=__doc__)
    parser.add_argument("--only", choices=("sim", "real"), help="one of them; others' rows stay")
    parser.add_argument("--times", type=int, default=2, help="default: 2")
    parser.add_argument("--max-concurrency", type=int, metavar="N", help="go no higher")
    parser.add_argument("--report", type=Path, default=REPORT, help="the page to write")
    args = parser.parse_args()
    rows, held = _kept_rows(args.report) if args.only else {}, True
    for name, (subject, document) in {"sim": simulated(), "real": real()}.items():
        if args.only not in (None, name):
            continue
        with running_stack(document) as stack:
            _wait_for_metrics(stack, subject.pool)
            reports = [found(stack, subject, args.max_concurrency) for _ in range(args.times)]
        rows[subject.name], kept = _row(subject, reports)
        held = held and kept
    args.report.write_text(_page(rows))
    print(_page(rows))
    return 0 if held else 1


def _row(subject: Subject, reports: list[Mapping[str, Any]]) -> tuple[str, bool]:
    results = [each["results"]["knee"] for each in reports]
    knees = [each["concurrency_per_replica"] for each in results]
    reference = subject.analytic or knees[0]
    off = max(abs(knee / reference - 1.0) for knee in knees)
    kept = off <= subject.limit_ratio
    cells = [
        subject.name,
        f"{subject.prompt_tokens} in, {subject.output_tokens} out",
        f"TTFT {subject.ttft_s:g} s, TPOT {subject.tpot_s * 1e3:g} ms",
        "-" if subject.analytic is None else f"{subject.analytic:.1f}",
        ", ".join(f"{knee:g}" for knee in knees),
        ", ".join(f"{each['output_tokens_per_s']:.0f}" for each in results),
        f"{off:.1%} of {subject.limit_ratio:.0%}" + ("" if kept else ", **missed**"),
    ]
    return f"| {' | '.join(cells)} |", kept


def _kept_rows(file: Path) -> dict[str, str]:
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| pool |")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


def _page(rows: Mapping[str, str]) -> str:
    head = [
        "# Knees found by `headrace calibrate`",
        "",
        "Produced by `scripts/isolated .venv/bin/python -m benchmarks.knees`: a live stack, one "
        f'replica on {os.cpu_count()} cores, calibrated several times. "Off" is the largest '
        "distance from the analytic knee, or from the first one found where none is known, and "
        "what it may be. The analytic knee is where a step takes the TPOT target.",
        "",
        "| pool | requests | targets | analytic | found | output tokens/s | off |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *rows.values()]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
