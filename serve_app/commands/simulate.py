"""``headrace simulate``: run the real policies over simulated engines in virtual time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve_app import config_file
from serve_app.config import SimSettings
from serve_app.core.engine_model import EngineParams
from serve_app.core.types import PoolName, PriorityClass
from serve_app.engine.sim import engine_params
from serve_app.errors import ConfigError
from serve_app.sim.compare import Result, calibration, compare, compare_replay, to_json
from serve_app.sim.contenders import CONTENDERS, PRODUCT, contend
from serve_app.sim.knee import Knee, find_knee
from serve_app.sim.scenarios import KNEES, MIX_OF, MIXES, SCENARIOS, build_scenario, default_setup
from serve_app.sim.setup import PoolSetup, Setup
from serve_app.sim.traces import MOONCAKE_SEGMENT_TOKENS, TraceDefaults, read_trace
from serve_app.sim.workload import Arrival

BAR_CHARACTERS = 30
SEEDS_MOST = 1000


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "simulate",
        help="run the policies over simulated engines in virtual time",
        description="Run the router's own policies over simulated engines in virtual time, "
        "beside baselines on the same traffic, and print a table.",
        epilog="examples:\n"
        "  headrace simulate --scenario overload --policy headrace --policy least-loaded\n"
        "  headrace simulate --trace trace.csv --config configs/sim.yaml --out out/trace --json\n"
        "  headrace simulate --scenario overload --find-knee",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scenario", metavar="NAME", help="one of: " + ", ".join(SCENARIOS))
    what.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="a CSV with arrival_s and any of tenant, class, prompt_tokens, output_tokens, "
        "prefix_hashes; or an Azure LLM inference, Mooncake or AIBrix trace",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="take pools, policies and engine sizes from this configuration "
        "(default: 8 replicas of an 8B model on an H100)",
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help="a contender, may be given several times: "
        + ", ".join(CONTENDERS)
        + f", {PRODUCT}+ROUTING; `all` for every one (default: {PRODUCT})",
    )
    _add_numbers(parser)
    _add_trace_options(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and plots here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--find-knee", action="store_true", help="find the knee of the scenario's mix and stop"
    )
    parser.set_defaults(run=run)


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default: %(default)s)"
    )
    parser.add_argument("--duration-s", type=float, metavar="S", help="simulated time of arrivals")
    parser.add_argument(
        "--warmup-s", type=float, default=20.0, metavar="S", help="unmeasured start (default: 20)"
    )
    parser.add_argument("--replicas", type=int, metavar="N", help="replicas of the first pool")
    parser.add_argument("--routers", type=int, default=1, metavar="N", help="router replicas")


def _add_trace_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--time-scale", type=float, default=1.0, metavar="X", help="0.5 doubles a trace's rate"
    )
    parser.add_argument(
        "--tenants", type=int, default=1, metavar="N", help="tenants dealt to a trace without any"
    )
    parser.add_argument(
        "--classes",
        type=_class_shares,
        metavar="C/S/S",
        help="shares of Critical/Standard/Sheddable for a trace without classes, e.g. 20/30/50",
    )


def run(args: argparse.Namespace) -> int:
    """Simulate as asked. Returns 0.

    Raises:
        ConfigError: a file, a name or a number is unusable; the message says which.
    """
    try:
        return _run(args)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _run(args: argparse.Namespace) -> int:
    _check_numbers(args)
    setup = _setup(args)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.find_knee:
        return _find_knee(args, setup)
    policies = args.policy or [PRODUCT]
    if "all" in policies:
        policies = list(CONTENDERS)
    bar = _Bar(sys.stderr.isatty())
    if args.scenario:
        results, setup = _scenario(args, setup, policies, bar)
    else:
        results = _trace(args, setup, policies, bar)
    bar.clear()
    _report(args, results, setup)
    return 0


def _scenario(
    args: argparse.Namespace, setup: Setup, policies: Sequence[str], bar: _Bar
) -> tuple[list[Result], Setup]:
    knee_per_s, knee_goodput_per_s = KNEES[MIX_OF.get(args.scenario, "chat")]
    if args.config or args.replicas:
        knee = _knee(args.scenario, setup)
        knee_per_s, knee_goodput_per_s = knee.rate_per_s, knee.goodput_per_s
    scenario = build_scenario(args.scenario, setup, knee_per_s, args.duration_s)
    results = compare(
        scenario,
        policies,
        range(args.seeds),
        knee_goodput_per_s=knee_goodput_per_s,
        on_progress=bar.show,
    )
    return results, scenario.setup


def _trace(
    args: argparse.Namespace, setup: Setup, policies: Sequence[str], bar: _Bar
) -> list[Result]:
    defaults = TraceDefaults(
        tenants=tuple(f"tenant-{number}" for number in range(args.tenants)),
        classes=args.classes,
        time_scale=args.time_scale,
        segment_tokens=_segment_tokens(setup),
    )
    arrivals = list(read_trace(args.trace, defaults))
    if not arrivals:
        raise ConfigError(f"{args.trace}: the trace is empty")
    duration_s = args.duration_s or arrivals[-1].arrival_s + 1.0
    if duration_s <= setup.warmup_s:
        raise ConfigError(
            f"--warmup-s {setup.warmup_s:g} leaves nothing of {duration_s:g} s to measure"
        )
    per_hash = 1
    if args.trace.suffix == ".jsonl":
        per_hash = MOONCAKE_SEGMENT_TOKENS // setup.pools[0].engine.block_tokens
    pools = tuple(
        replace(pool, engine=replace(pool.engine, blocks_per_hash=per_hash)) for pool in setup.pools
    )
    setup = replace(setup, pools=pools, duration_s=duration_s)

    def again() -> Iterator[Arrival]:
        return iter(arrivals)

    return compare_replay(setup, again, policies, range(args.seeds), on_progress=bar.show)


def _segment_tokens(setup: Setup) -> int:
    engine = setup.pools[0].engine
    return engine.block_tokens * engine.blocks_per_hash


def _setup(args: argparse.Namespace) -> Setup:
    setup = default_setup()
    if args.config is not None:
        setup = replace(setup, pools=_pools(args.config))
    if args.replicas is not None:
        first, *others = setup.pools
        setup = replace(setup, pools=(replace(first, replicas=args.replicas), *others))
    return replace(setup, warmup_s=args.warmup_s, routers=args.routers)


def _pools(file: Path) -> tuple[PoolSetup, ...]:
    """Return the configuration's pools; a real engine is simulated with the default physics."""
    served = config_file.load(file)
    pools = []
    for name, args in served.pools.items():
        engine = EngineParams()
        if isinstance(args.engine, SimSettings):
            engine = engine_params(args.engine)
        policy = served.router.pools[name].to_core()
        replicas = max(1, args.replicas.num_replicas)
        pools.append(PoolSetup(PoolName(name), policy, engine, replicas))
    return tuple(pools)


def _check_numbers(args: argparse.Namespace) -> None:
    if not 1 <= args.seeds <= SEEDS_MOST:
        raise ConfigError(f"--seeds must be from 1 to {SEEDS_MOST}, not {args.seeds}")
    for name in ("duration_s", "time_scale", "replicas", "routers", "tenants"):
        value = getattr(args, name)
        if value is not None and not 0 < value < 10**9:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if not 0 <= args.warmup_s < (args.duration_s or 10**9):
        raise ConfigError(f"--warmup-s must be from 0 to the duration, not {args.warmup_s}")


def _class_shares(text: str) -> dict[PriorityClass, float]:
    try:
        shares = [float(part) for part in text.split("/")]
    except ValueError:
        shares = []
    if len(shares) != len(PriorityClass) or min(shares) < 0 or not 0 < sum(shares) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not three shares such as 20/30/50")
    return dict(zip(PriorityClass, shares, strict=True))


def _knee(scenario: str, setup: Setup) -> Knee:
    mix = MIX_OF.get(scenario, "chat")
    policy = "sticky" if mix == "prefix" else "least-loaded"
    built = build_scenario(scenario, setup)
    measured = replace(
        built.setup,
        duration_s=setup.warmup_s + 90.0,
        faults=(),
        scaler=None,
    )
    return find_knee(contend(measured, policy), MIXES[mix])


def _find_knee(args: argparse.Namespace, setup: Setup) -> int:
    if not args.scenario:
        raise ConfigError("--find-knee needs --scenario: a trace has one rate only")
    knee = _knee(args.scenario, setup)
    figures = {
        "knee_per_s": knee.rate_per_s,
        "goodput_per_s": knee.goodput_per_s,
        "points": [
            {"offered_per_s": point.offered_per_s, "goodput_per_s": point.goodput_per_s}
            for point in knee.points
        ],
        "calibration": calibration(setup),
    }
    if args.out is not None:
        (args.out / "knee.json").write_text(json.dumps(figures, indent=2) + "\n")
        _try_plots(lambda: _draw_knee(knee, args))
    if args.json:
        sys.stdout.write(json.dumps(figures) + "\n")
        return 0
    for point in knee.points:
        sys.stdout.write(
            f"{point.offered_per_s:8.1f}/s offered {point.goodput_per_s:8.1f}/s good  "
            f"TTFT p95 {point.ttft_p95_s or 0:.3f} s  TPOT p95 {point.tpot_p95_s or 0:.4f} s"
            f"{'' if point.holds else '  misses'}\n"
        )
    sys.stdout.write(f"knee: {knee.rate_per_s:.1f}/s, {knee.goodput_per_s:.1f}/s good\n")
    return 0


def _draw_knee(knee: Knee, args: argparse.Namespace) -> None:
    from serve_app.sim import plots

    plots.draw_knee(knee, args.scenario, args.out)


def _report(args: argparse.Namespace, results: list[Result], setup: Setup) -> None:
    first, *others = results
    document = {
        "scenario": args.scenario,
        "trace": str(args.trace) if args.trace else None,
        "seeds": args.seeds,
        **to_json(first),
        "baselines": {result.contender: to_json(result) for result in others},
        "calibration": calibration(setup),
    }
    if args.out is not None:
        (args.out / "results.json").write_text(json.dumps(document, indent=2) + "\n")
        title = args.scenario or args.trace.name

        def draw() -> None:
            from serve_app.sim import plots

            plots.draw(results, title, args.out)

        _try_plots(draw)
    if args.json:
        sys.stdout.write(json.dumps(document) + "\n")
    else:
        sys.stdout.write(table(results))


def _try_plots(draw: Callable[[], None]) -> None:
    try:
        draw()
    except ModuleNotFoundError as error:
        sys.stderr.write(f"no plots: {error}; install the `plots` extra\n")


def table(results: Sequence[Result]) -> str:
    """Return the results as a text table, a line per contender."""
    head = (
        "policy", "good/s", "of knee", "jain", "TTFT p99 crit", "std", "shed", "shed crit",
        "std", "shed", "wasted", "hits", "req/wall s",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        mean = result.mean
        ttft_s, shed = mean["ttft_p99_s"], mean["shed_ratio"]
        rows.append(
            (
                result.contender,
                _number(mean["goodput_per_s"], "{:.1f}"),
                _number(mean["goodput_ratio"], "{:.3f}"),
                _number(mean["jain"], "{:.3f}"),
                *(_number(ttft_s[name], "{:.2f}") for name in ("critical", "standard")),
                _number(ttft_s["sheddable"], "{:.2f}"),
                *(_number(shed[name], "{:.3f}") for name in ("critical", "standard")),
                _number(shed["sheddable"], "{:.3f}"),
                _number(mean["wasted_token_ratio"], "{:.4f}"),
                _number(mean["prefix_hit_ratio"], "{:.3f}"),
                _number(mean["requests_per_wall_s"], "{:.0f}"),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


class _Bar:
    """A progress bar on standard error; silent where that is no terminal."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._shown = -1

    def show(self, done: float) -> None:
        """Draw the share done, in [0, 1]."""
        percent = int(100 * done)
        if not self._enabled or percent == self._shown:
            return
        self._shown = percent
        filled = int(BAR_CHARACTERS * done)
        sys.stderr.write(f"\r[{'#' * filled:<{BAR_CHARACTERS}}] {percent:3d} %")
        sys.stderr.flush()

    def clear(self) -> None:
        """Remove the bar."""
        if self._enabled:
            sys.stderr.write("\r" + " " * (BAR_CHARACTERS + 9) + "\r")
