"""``headrace plan replay``: a trace through the simulator with the autoscaler in the loop."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.commands._numbers import positive
from serve_app.commands._plan_config import add_config_options, configured
from serve_app.commands._plan_model import add_model_options, replica, served
from serve_app.commands._plan_size import (
    add_price_options,
    add_target_options,
    check_target,
    counted,
    gap_warning,
    impossible,
    pool_line,
)
from serve_app.commands._plan_what_if import KEYS, Base, what_if
from serve_app.errors import ConfigError
from serve_app.terminal import CommandFailed, Subparsers, command, note, out, table

if TYPE_CHECKING:
    from serve_app.core.engine_parts import EngineParams
    from serve_app.core.sizing import Steady, TrafficProfile
    from serve_app.sim.backtest import Case, Outturn, Pool
    from serve_app.sim.records import Run
    from serve_app.sim.workload import Arrival

CASES_MOST = 32
_EXAMPLE = """\
headrace plan replay --trace trace.csv --usd-per-gpu-hour 2.5
headrace plan replay --trace trace.csv --usd-per-gpu-hour 2.5 --fixed 8 \\
  --what-if quantization=fp8 --what-if gpu=H200,price=3.5 --what-if spot=0.5,interruptions=0.1"""


def add_parser(actions: Subparsers) -> None:
    """Register the action."""
    parser = command(
        actions,
        "replay",
        "Replay a trace with the autoscaler in the loop: SLO, replica-hours, dollars, what-ifs.",
        _EXAMPLE,
    )
    add_config_options(parser)
    parser.add_argument(
        "--trace",
        type=Path,
        required=True,
        metavar="FILE",
        help="as `headrace simulate` reads: a CSV, an Azure, Mooncake or AIBrix trace",
    )
    parser.add_argument("--time-scale", type=float, metavar="X", help="0.5 doubles the rate")
    parser.add_argument(
        "--fixed",
        type=int,
        action="append",
        metavar="N",
        help="a fixed size to compare with, may be given several times (default: by Little's law "
        "for the busiest minutes and for the mean)",
    )
    parser.add_argument(
        "--what-if",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="a case that differs, may be given several times; keys: " + ", ".join(KEYS),
    )
    parser.add_argument(
        "--cold-start-s", type=float, default=120.0, metavar="S", help="default: 120"
    )
    add_target_options(parser, safety_ratio=0.85)
    add_price_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_model_options(parser, required=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay the trace in every case and print a table. Returns 0.

    Raises:
        ConfigError: an argument or the trace is unusable; the message names it.
        CommandFailed: the SLO cannot be kept even by an idle replica.
    """
    pool_of_file = configured(args)
    _check(args)
    model = served(args)
    engine, trial = replica(model)
    if pool_of_file is not None and pool_of_file.engine is not None:
        engine = pool_of_file.engine
    arrivals, profile = _trace(args, engine)
    if args.trace.suffix == ".jsonl":
        engine = replace(engine, blocks_per_hash=_blocks_per_hash(engine))
    base = Base(model, engine, trial.layout.gpus, args.usd_per_gpu_hour, profile)
    knee, alone_s = _knee(args, base)
    baseline = _case("autoscaled", base, knee, alone_s)
    pool = _pool(args, profile, knee)
    cases = [baseline, *_fixed(args, baseline, profile)]
    cases += [_what_if_case(args, text, base, knee) for text in args.what_if]
    if len(cases) > CASES_MOST:
        raise ConfigError(f"{len(cases)} cases are more than {CASES_MOST}; leave some out")
    outturns = _run_all(cases, pool, arrivals)
    if args.json:
        out(json.dumps(_document(args, cases, outturns, profile)))
        return 0
    if pool_of_file is not None:
        out(pool_line(args, pool_of_file))
    for line in _facts(args, cases[0], pool, profile, len(arrivals)):
        out(line)
    out("")
    out(_table(outturns))
    return 0


def _check(args: argparse.Namespace) -> None:
    check_target(args)
    positive("--time-scale", args.time_scale, 10**6)
    for size in args.fixed or ():
        positive("--fixed", size, 4096)
    if not 0 <= args.cold_start_s <= 86_400:
        raise ConfigError(f"--cold-start-s must be from 0 to 86400, not {args.cold_start_s:g}")


def _trace(args: argparse.Namespace, engine: EngineParams) -> tuple[list[Arrival], TrafficProfile]:
    from serve_app.core.sizing import TrafficProfile
    from serve_app.sim.trace_summary import summarise_trace
    from serve_app.sim.traces import TraceDefaults, TraceError, read_trace

    defaults = TraceDefaults(
        time_scale=args.time_scale or 1.0,
        segment_tokens=engine.block_tokens * engine.blocks_per_hash,
    )
    try:
        arrivals = list(read_trace(args.trace, defaults))
        summary = summarise_trace(arrivals)
    except TraceError as error:
        raise ConfigError(f"--trace: {error}") from error
    except ValueError as error:
        raise ConfigError(f"--trace {args.trace}: {error}") from error
    if summary.has_gap:
        note(gap_warning(summary.gap_s, summary.gap_at_s))
    # What precedes the first request is nobody's traffic.
    begin_s = arrivals[0].arrival_s
    shifted = [replace(each, arrival_s=each.arrival_s - begin_s) for each in arrivals]
    return shifted, TrafficProfile(
        summary.peak_per_s,
        summary.mean_per_s,
        summary.input_tokens,
        max(1.0, summary.output_tokens),
        summary.input_p95_tokens,
    )


def _blocks_per_hash(engine: EngineParams) -> int:
    from serve_app.sim.traces import MOONCAKE_SEGMENT_TOKENS

    return MOONCAKE_SEGMENT_TOKENS // engine.block_tokens


def _knee(args: argparse.Namespace, base: Base) -> tuple[Steady, float]:
    """Return the baseline's knee, as told or estimated, and a request's stay alone."""
    from serve_app.core.sizing import steady

    alone_s = steady(base.engine, base.profile, 1).stay_s
    if args.knee_concurrency is not None:
        return steady(base.engine, base.profile, args.knee_concurrency), alone_s
    return _estimated_knee(args, base.engine, base.profile), alone_s


def _estimated_knee(
    args: argparse.Namespace, engine: EngineParams, profile: TrafficProfile
) -> Steady:
    from serve_app.core.knee import Slo
    from serve_app.core.sizing import Impossible, find_knee

    found = find_knee(engine, profile, Slo(args.ttft_slo_s, args.tpot_slo_s))
    if isinstance(found, Impossible):
        raise CommandFailed(impossible(found))
    return found.steady


def _case(name: str, base: Base, knee: Steady, alone_s: float) -> Case:
    from serve_app.sim.backtest import Case

    return Case(name, base.engine, knee, alone_s, base.gpus, base.usd_per_gpu_hour)


def _what_if_case(args: argparse.Namespace, text: str, base: Base, told: Steady) -> Case:
    """Return a case that differs; a knee that was told moves as the estimate of it does."""
    from serve_app.core.sizing import steady

    changed = what_if(text, base)
    try:
        after = _estimated_knee(args, changed.engine, changed.profile)
    except CommandFailed as error:
        raise CommandFailed(f"--what-if {text}: {error}") from error
    if args.knee_concurrency is not None:
        before = _estimated_knee(args, base.engine, base.profile)
        moved = told.concurrency * after.concurrency / before.concurrency
        after = steady(changed.engine, changed.profile, max(1, round(moved)))
    alone_s = steady(changed.engine, changed.profile, 1).stay_s
    case = _case(text, changed, after, alone_s)
    return replace(case, cached_ratio=changed.cached_ratio, spot=changed.spot)


def _pool(args: argparse.Namespace, profile: TrafficProfile, knee: Steady) -> Pool:
    from serve_app.sim.backtest import Pool, sizes_by_little
    from serve_app.sim.setup import Slo

    peak, mean = sizes_by_little(knee, (profile.peak_per_s, profile.mean_per_s), args.safety_ratio)
    # Without a bound, room for twice the busiest minutes: nobody's policy grows for ever.
    most = args.max_replicas or max(2 * peak, args.min_replicas, 1)
    begin = min(max(mean, args.min_replicas), most)
    slo = Slo((args.ttft_slo_s,) * 3, args.tpot_slo_s)
    return Pool(slo, args.min_replicas, most, begin, args.safety_ratio, args.cold_start_s)


def _fixed(args: argparse.Namespace, baseline: Case, profile: TrafficProfile) -> list[Case]:
    from serve_app.sim.backtest import sizes_by_little

    rates = (profile.peak_per_s, profile.mean_per_s)
    sizes = args.fixed or sizes_by_little(baseline.knee, rates, args.safety_ratio)
    return [replace(baseline, name=f"fixed {size}", fixed=size) for size in dict.fromkeys(sizes)]


def _run_all(cases: list[Case], pool: Pool, arrivals: list[Arrival]) -> list[Outturn]:
    from serve_app.sim.backtest import run_case
    from serve_app.sim.output import Bar

    bar = Bar(sys.stderr.isatty())
    outturns: list[Outturn] = []
    reference: Run | None = None
    for place, case in enumerate(cases):

        def show(done: float, place: int = place) -> None:
            bar.show((place + done) / len(cases))

        outturn, finished = run_case(case, pool, arrivals, reference=reference, on_progress=show)
        reference = reference or finished
        outturns.append(outturn)
    bar.clear()
    return outturns


def _facts(
    args: argparse.Namespace, case: Case, pool: Pool, profile: TrafficProfile, requests: int
) -> list[str]:
    engine, knee = case.engine, case.knee
    source = "as told" if args.knee_concurrency is not None else "estimated"
    return [
        f"trace    {requests:,} requests, {profile.mean_per_s:.3g}/s on average, "
        f"{profile.peak_per_s:.3g}/s in the busiest minutes; {profile.input_tokens:,.0f} tokens "
        f"in, {profile.output_tokens:,.0f} out",
        f"engine   {counted(case.gpus, 'GPU')} a replica: {engine.overhead_s * 1e3:.2f} ms + "
        f"max({engine.weights_s * 1e3:.2f} ms, {engine.prefill_s_per_token * 1e6:.1f} us x new "
        f"tokens) + {engine.context_s_per_token * 1e9:.1f} ns x context tokens a step",
        f"knee     {knee.concurrency} requests a replica ({source}), {pool.safety_ratio:g} of it "
        f"planned with; {pool.least} to {pool.most} replicas, cold start {pool.cold_start_s:g} s",
        f"SLO      first token within {args.ttft_slo_s:g} s, then {args.tpot_slo_s:g} s a token",
    ]


def _table(outturns: list[Outturn]) -> str:
    first = outturns[0]
    head = [
        "case", "SLO met", "of admitted", "refused", "lost", "hits", "replica-h", "mean", "most",
        "turns", "notices",
    ]  # fmt: skip
    priced = first.usd is not None
    if priced:
        head += ["$", "$/1M good", "$ vs first"]
    rows = []
    for each in outturns:
        row = [
            each.name,
            f"{each.slo_ratio:.2%}",
            f"{each.slo_of_admitted_ratio:.2%}",
            f"{each.refused_ratio:.2%}",
            f"{each.lost_ratio:.2%}",
            f"{each.hit_ratio:.0%}",
            f"{each.replica_hours:.2f}",
            f"{each.mean_replicas:.2f}",
            str(each.largest),
            str(each.turns),
            str(each.interruptions),
        ]
        if priced:
            row += _dollars(each, first)
        rows.append(row)
    return table(head, rows)


def _dollars(each: Outturn, first: Outturn) -> list[str]:
    if each.usd is None or first.usd is None:
        return ["-", "-", "-"]
    good = each.usd_per_million_good
    ratio = f"{each.usd / first.usd:.2f}" if first.usd else "-"
    return [f"{each.usd:.2f}", "-" if good is None else f"{good:.3f}", ratio]


def _document(
    args: argparse.Namespace,
    cases: list[Case],
    outturns: list[Outturn],
    profile: TrafficProfile,
) -> dict[str, Any]:
    return {
        "trace": str(args.trace),
        "traffic": asdict(profile),
        "slo": {"ttft_s": args.ttft_slo_s, "tpot_s": args.tpot_slo_s},
        "cases": [
            {
                **asdict(outturn),
                "gpus_per_replica": case.gpus,
                "knee_concurrency": case.knee.concurrency,
                "calibration": asdict(case.engine),
            }
            for case, outturn in zip(cases, outturns, strict=True)
        ],
    }
