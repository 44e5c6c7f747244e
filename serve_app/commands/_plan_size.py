"""``headrace plan size``: replicas and dollars for a traffic profile within an SLO."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.commands._numbers import positive, share
from serve_app.commands._plan_config import Configured, add_config_options, configured
from serve_app.commands._plan_model import Served, add_model_options, replica, served
from serve_app.errors import ConfigError
from serve_app.terminal import CommandFailed, Subparsers, command, note, out

if TYPE_CHECKING:
    from serve_app.core.engine_parts import EngineParams
    from serve_app.core.fit import Trial
    from serve_app.core.sizing import Cost, Impossible, Knee, Size, Steady, TrafficProfile

_EXAMPLE = """\
headrace plan size --rate-per-s 40 --input-tokens 1200 --output-tokens 200 --usd-per-gpu-hour 2.5
headrace plan size --config configs/prod.yaml --pool llama-8b --trace trace.csv
headrace plan size --trace trace.csv --model ./llama-70b --gpu H200 --quantization fp8
headrace plan size --rate-per-s 6 --input-tokens 900 --output-tokens 230 \\
  --knee-concurrency 24 --stay-s 12"""
_FIXES = {
    "TTFT": "shorter or cached prompts, a faster GPU, fewer bits or tensor parallelism",
    "TPOT": "a faster GPU, fewer bits or tensor parallelism",
    "KV cache": "a smaller context, fp8 KV (--kv-dtype), fewer bits or more GPUs a replica",
    "replicas": "a higher --max-replicas, a looser SLO, or less traffic",
}


def add_parser(actions: Subparsers) -> None:
    """Register the action."""
    parser = command(
        actions,
        "size",
        "Say how many replicas a traffic profile takes within an SLO, and what they cost.",
        _EXAMPLE,
    )
    add_config_options(parser)
    traffic = parser.add_argument_group("traffic", "rates and lengths, or a trace")
    traffic.add_argument(
        "--rate-per-s", type=float, metavar="X", help="requests/s in the busiest minutes (P99)"
    )
    traffic.add_argument(
        "--mean-rate-per-s", type=float, metavar="X", help="on average (default: the same)"
    )
    for name in ("--input-tokens", "--output-tokens"):
        traffic.add_argument(name, type=float, metavar="N", help="mean of a request")
    traffic.add_argument(
        "--input-p95-tokens", type=float, metavar="N", help="default: 3 times the mean, as in chat"
    )
    traffic.add_argument(
        "--cache-hit-ratio", type=float, default=0.0, metavar="X", help="of prompts (default: 0)"
    )
    traffic.add_argument("--trace", type=Path, metavar="FILE", help="as `headrace simulate` reads")
    add_target_options(parser)
    add_price_options(parser)
    parser.add_argument(
        "--stay-s", type=float, metavar="S", help="a request's stay at the knee, as measured"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_model_options(parser, required=False)
    parser.set_defaults(run=run)


def add_target_options(parser: argparse.ArgumentParser, safety_ratio: float = 0.75) -> None:
    """Add the SLO, the knee and the bounds of the pool."""
    target = parser.add_argument_group("targets")
    target.add_argument(
        "--ttft-slo-s", type=float, default=1.0, metavar="S", help="95 %% within (default: 1)"
    )
    target.add_argument(
        "--tpot-slo-s", type=float, default=0.05, metavar="S", help="95 %% within (default: 0.05)"
    )
    target.add_argument(
        "--knee-concurrency",
        type=int,
        metavar="N",
        help="of a replica, as `calibrate` or `simulate --find-knee` says (default: estimated)",
    )
    target.add_argument(
        "--safety-ratio",
        type=float,
        default=safety_ratio,
        metavar="X",
        help="of the knee (default: %(default)s)",
    )
    target.add_argument(
        "--min-replicas", type=int, default=1, metavar="N", help="default: %(default)s"
    )
    target.add_argument(
        "--max-replicas",
        type=int,
        metavar="N",
        help="default: no bound; in a replay twice what the busiest minutes take",
    )


def add_price_options(parser: argparse.ArgumentParser) -> None:
    """Add the price."""
    parser.add_argument("--usd-per-gpu-hour", type=float, metavar="USD", help="no dollars without")


def check_target(args: argparse.Namespace) -> None:
    """Check what ``add_target_options`` and ``add_price_options`` took.

    Raises:
        ConfigError: a number is out of range, or the least is above the most.
    """
    positive("--ttft-slo-s", args.ttft_slo_s, 3600)
    positive("--tpot-slo-s", args.tpot_slo_s, 3600)
    positive("--knee-concurrency", args.knee_concurrency, 10**5)
    positive("--max-replicas", args.max_replicas, 4096)
    share("--safety-ratio", args.safety_ratio)
    if args.knee_concurrency is not None and args.knee_concurrency > args.max_num_seqs:
        raise ConfigError(
            f"--knee-concurrency {args.knee_concurrency} is more than --max-num-seqs "
            f"{args.max_num_seqs}"
        )
    if not 0 <= args.min_replicas <= 4096:
        raise ConfigError(f"--min-replicas must be from 0 to 4096, not {args.min_replicas}")
    if args.max_replicas is not None and args.min_replicas > args.max_replicas:
        raise ConfigError(
            f"--min-replicas {args.min_replicas} is above --max-replicas {args.max_replicas}"
        )
    usd = args.usd_per_gpu_hour
    if usd is not None and not 0 <= usd <= 100_000:
        raise ConfigError(f"--usd-per-gpu-hour must be from 0 to 100000, not {usd:g}")


def run(args: argparse.Namespace) -> int:
    """Print the size. Returns 0.

    Raises:
        ConfigError: an argument is unusable; the message names it.
        CommandFailed: the SLO or the bounds cannot be kept; the message says by how much.
    """
    from serve_app.core.sizing import pool_cost

    pool = configured(args)
    check_target(args)
    positive("--stay-s", args.stay_s, 10**6)
    if args.stay_s is not None and args.knee_concurrency is None:
        raise ConfigError("--stay-s is measured at a knee; give --knee-concurrency with it")
    profile = _profile(args)
    model = served(args)
    engine, trial = replica(model)
    if pool is not None and pool.engine is not None:
        engine = pool.engine
    knee = None if args.knee_concurrency is not None else _found_knee(args, engine, profile)
    state = _at_knee(args, engine, profile, knee)
    size = _size(args, profile, state)
    gpus = trial.layout.gpus
    cost = None
    if args.usd_per_gpu_hour is not None:
        cost = pool_cost(size.replicas * gpus * args.usd_per_gpu_hour, profile)
    if args.json:
        document = {
            "traffic": asdict(profile),
            "knee": {**asdict(state), "rate_per_s": state.rate_per_s},
            "knee_bound": None if knee is None else str(knee.bound),
            "size": asdict(size),
            "gpus_per_replica": gpus,
            "cost": None if cost is None else asdict(cost),
            "calibration": asdict(engine),
        }
        out(json.dumps(document))
        return 0
    lines = _lines(model, engine, trial, profile)
    if pool is not None:
        if pool.engine is not None:
            lines = [line.replace(" (estimated)", " (configured)") for line in lines]
        lines.insert(0, pool_line(args, pool))
    lines += _knee_lines(args, state, knee)
    lines += _size_lines(args, size, state, profile, engine) + _cost_lines(cost, size, gpus)
    out("\n".join(lines))
    return 0


def pool_line(args: argparse.Namespace, pool: Configured) -> str:
    """Return whose figures follow."""
    return f"pool     {pool.name} of {args.config}; other options count before it"


def impossible(found: Impossible) -> str:
    """Return what cannot be had, by how much, and what would help."""
    from serve_app.core.sizing import Bound

    bound, wanted, best = found.bound, found.wanted, found.best
    fix = _FIXES[str(bound)]
    if bound is Bound.REPLICAS:
        return (
            f"impossible within --max-replicas {best:.0f}: {wanted:.0f} replicas are needed, "
            f"{wanted - best:.0f} more; {fix}."
        )
    if bound is Bound.KV:
        return (
            f"impossible: one request takes {best:.2f} of a replica's KV cache, at most "
            f"{wanted:.2f} is planned with; {fix}"
        )
    flag = "--ttft-slo-s" if bound is Bound.TTFT else "--tpot-slo-s"
    what = "its first token" if bound is Bound.TTFT else "each later token"
    return (
        f"impossible {bound} SLO: alone on a replica a request's 95th percentile is {best:.4g} s "
        f"for {what}, {best / wanted:.3g} times {flag} {wanted:g} ({best - wanted:.3g} s too "
        f"much); {fix}"
    )


def _profile(args: argparse.Namespace) -> TrafficProfile:
    from serve_app.core.sizing import TrafficProfile

    if not 0 <= args.cache_hit_ratio < 1:
        raise ConfigError(
            f"--cache-hit-ratio must be at least 0 and below 1, not {args.cache_hit_ratio:g}"
        )
    if args.trace is not None:
        return replace(trace_profile(args), cached_ratio=args.cache_hit_ratio)
    for flag in ("--rate-per-s", "--input-tokens", "--output-tokens"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if value is None:
            raise ConfigError(f"{flag} is missing; give it, or a --trace")
        positive(flag, value, 10**7)
    positive("--mean-rate-per-s", args.mean_rate_per_s, 10**7)
    positive("--input-p95-tokens", args.input_p95_tokens, 10**7)
    mean = args.mean_rate_per_s or args.rate_per_s
    if mean > args.rate_per_s:
        raise ConfigError(
            f"--mean-rate-per-s {mean:g} is above --rate-per-s {args.rate_per_s:g}, which is the "
            "busiest minutes'"
        )
    inputs, outputs = max(1.0, args.input_tokens), max(1.0, args.output_tokens)
    p95 = args.input_p95_tokens or 3.0 * inputs
    if p95 < inputs:
        raise ConfigError(f"--input-p95-tokens {p95:g} is below the mean, {inputs:g}")
    return TrafficProfile(args.rate_per_s, mean, inputs, outputs, p95, args.cache_hit_ratio)


def counted(count: int, noun: str) -> str:
    """Return a number with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def trace_profile(args: argparse.Namespace) -> TrafficProfile:
    """Return what a trace asks for; a long silence in it is told on standard error.

    Raises:
        ConfigError: it cannot be read, or has no rate; the message names the row.
    """
    from serve_app.core.sizing import TrafficProfile
    from serve_app.sim.trace_summary import summarise_trace
    from serve_app.sim.traces import TraceDefaults, TraceError, read_trace

    for name in ("rate_per_s", "mean_rate_per_s", "input_tokens", "output_tokens"):
        if getattr(args, name) is not None:
            raise ConfigError(f"--{name.replace('_', '-')} and --trace exclude each other")
    try:
        summary = summarise_trace(list(read_trace(args.trace, TraceDefaults())))
    except TraceError as error:
        raise ConfigError(f"--trace: {error}") from error
    except ValueError as error:
        raise ConfigError(f"--trace {args.trace}: {error}") from error
    if summary.has_gap:
        note(gap_warning(summary.gap_s, summary.gap_at_s))
    return TrafficProfile(
        summary.peak_per_s,
        summary.mean_per_s,
        summary.input_tokens,
        summary.output_tokens,
        args.input_p95_tokens or summary.input_p95_tokens,
    )


def gap_warning(gap_s: float, at_s: float) -> str:
    """Return what is said of a trace that is silent for long."""
    return (
        f"warning: the trace is silent for {gap_s:,.0f} s from {at_s:,.0f} s on; that counts as no "
        "traffic. If data is missing there, cut the trace in two"
    )


def _found_knee(args: argparse.Namespace, engine: EngineParams, profile: TrafficProfile) -> Knee:
    from serve_app.core.knee import Slo
    from serve_app.core.sizing import Impossible, find_knee

    found = find_knee(engine, profile, Slo(args.ttft_slo_s, args.tpot_slo_s))
    if isinstance(found, Impossible):
        raise CommandFailed(impossible(found))
    return found


def _size(args: argparse.Namespace, profile: TrafficProfile, state: Steady) -> Size:
    from serve_app.core.sizing import Impossible, size_pool

    size = size_pool(
        profile,
        state.stay_s,
        state.concurrency,
        safety_ratio=args.safety_ratio,
        bounds=(args.min_replicas, args.max_replicas),
    )
    if isinstance(size, Impossible):
        carried = size.best * state.rate_per_s * args.safety_ratio
        raise CommandFailed(
            f"{impossible(size)} {size.best:.0f} replicas carry {carried:.1f}/s of "
            f"{profile.peak_per_s:g}/s"
        )
    return size


def _at_knee(
    args: argparse.Namespace, engine: EngineParams, profile: TrafficProfile, knee: Knee | None
) -> Steady:
    """Return the replica at its knee, as estimated or as told."""
    from serve_app.core.sizing import steady

    if knee is not None:
        return knee.steady
    state = steady(engine, profile, args.knee_concurrency)
    return state if args.stay_s is None else replace(state, stay_s=args.stay_s)


def _lines(model: Served, engine: EngineParams, trial: Trial, profile: TrafficProfile) -> list[str]:
    layout = trial.layout
    of = f"TP {layout.tensor_parallel}" if layout.stages == 1 else (
        f"TP {layout.tensor_parallel} x PP {layout.stages}"
    )  # fmt: skip
    return [
        f"model    {model.shape.name} in {model.wish.weights_type}, KV in {model.wish.kv_type}, "
        f"on {layout.gpus} x {model.gpu.name} ({of}) a replica",
        f"engine   {engine.overhead_s * 1e3:.2f} ms + max({engine.weights_s * 1e3:.2f} ms, "
        f"{engine.prefill_s_per_token * 1e6:.1f} us x new tokens) + "
        f"{engine.context_s_per_token * 1e9:.1f} ns x context tokens a step; "
        f"{engine.kv_blocks * engine.block_tokens:,} tokens of KV (estimated)",
        f"traffic  {profile.peak_per_s:.4g}/s in the busiest minutes, {profile.mean_per_s:.4g}/s "
        f"on average; {profile.input_tokens:,.0f} tokens in (P95 {profile.input_p95_tokens:,.0f}, "
        f"{profile.cached_ratio:.0%} cached), {profile.output_tokens:,.0f} out",
    ]


def _knee_lines(args: argparse.Namespace, state: Steady, knee: Knee | None) -> list[str]:
    line = f"knee     {state.concurrency} requests a replica, {state.rate_per_s:.2f}/s, each stays "
    line += f"{state.stay_s:.2f} s"
    if knee is None:
        return [line + " (as told)"]
    return [
        f"{line}; more would exceed {knee.bound} (estimated)",
        f"         there 95 % have a first token in {state.ttft_p95_s:.2f} s (SLO "
        f"{args.ttft_slo_s:g}), then one per {state.tpot_p95_s * 1e3:.0f} ms (SLO "
        f"{args.tpot_slo_s * 1e3:.0f})",
    ]


def _size_lines(
    args: argparse.Namespace,
    size: Size,
    state: Steady,
    profile: TrafficProfile,
    engine: EngineParams,
) -> list[str]:
    from serve_app.core.sizing import cap_concurrency, steady

    planned = state.concurrency * args.safety_ratio
    load = profile.peak_per_s * state.stay_s
    alone_s = steady(engine, profile, 1).stay_s
    slowdown = max(1.0, state.stay_s / alone_s)
    why = "" if size.replicas == size.needed else f" ({size.needed} needed; --min-replicas)"
    return [
        f"size     {profile.peak_per_s:.4g}/s x {state.stay_s:.2f} s = {load:.1f} in flight, over "
        f"{state.concurrency} x {args.safety_ratio:g} = {planned:g}: "
        f"{counted(size.replicas, 'replica')}{why}, for up to {size.carried_per_s:.1f}/s",
        f"         {size.utilisation_peak:.0%} of the knee in the busiest minutes, "
        f"{size.utilisation_mean:.0%} on average; another replica when more than "
        f"{size.queue_threshold} wait for each",
        f"         pool: {{max_concurrency_per_replica: {cap_concurrency(state.concurrency)}, "
        f"scaling: {{knee_concurrency: {state.concurrency}, safety_ratio: {args.safety_ratio:g}, "
        f"slowdown_at_knee: {slowdown:.1f}}}}}",
    ]


def _cost_lines(cost: Cost | None, size: Size, gpus: int) -> list[str]:
    if cost is None:
        return ["cost     give --usd-per-gpu-hour for dollars"]
    lines = [
        f"cost     {size.replicas} x {counted(gpus, 'GPU')}: ${cost.usd_per_hour:,.2f} an hour, "
        f"${cost.usd_per_month:,.0f} a month of 730 hours",
        f"         ${cost.usd_per_million_input:.3f} per million input tokens, "
        f"${cost.usd_per_million_output:.3f} output, ${cost.usd_per_million_total:.3f} of both: "
        "each bears all of the cost, at the mean rate",
    ]
    if 0 < size.utilisation_mean < 1:
        times = 1.0 / size.utilisation_mean
        lines.append(f"         {times:.2f} times what a token costs at the knee itself")
    return lines
