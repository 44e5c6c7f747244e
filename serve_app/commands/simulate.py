"""``headrace simulate``: run the real policies over simulated engines in virtual time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from serve_app import config_file
from serve_app.config import SimSettings
from serve_app.core.capacity import queue_threshold
from serve_app.core.engine_model import EngineParams
from serve_app.core.types import PoolName, PriorityClass
from serve_app.engine.sim import engine_params
from serve_app.errors import ConfigError
from serve_app.sim.compare import Result, calibration, compare, compare_replay, to_json
from serve_app.sim.contenders import CONTENDERS, PRODUCT, contend
from serve_app.sim.knee import Knee, find_knee
from serve_app.sim.output import Bar, table
from serve_app.sim.scenarios import KNEES, MIX_OF, MIXES, SCENARIOS, build_scenario, default_setup
from serve_app.sim.setup import PoolSetup, Setup
from serve_app.sim.traces import MOONCAKE_SEGMENT_TOKENS, TraceDefaults, read_trace
from serve_app.sim.workload import Arrival

SEEDS_MOST = 1000
REPLICAS_MOST = 4096
ROUTERS_MOST = 64

T = TypeVar("T")


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
        usage="headrace simulate (--scenario NAME | --trace FILE) [options]; see --help",
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
        "--pool", metavar="NAME", help="the configuration's pool to load (default: its first)"
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
    parser.add_argument("--replicas", type=int, metavar="N", help="replicas of the loaded pool")
    parser.add_argument("--routers", type=int, default=1, metavar="N", help="router replicas")


def _add_trace_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--time-scale", type=float, metavar="X", help="0.5 doubles a trace's rate")
    parser.add_argument(
        "--tenants", type=int, metavar="N", help="tenants dealt to a trace without any"
    )
    for name in ("--prompt-tokens", "--output-tokens"):
        parser.add_argument(
            name, type=int, metavar="N", help="for a trace without lengths (default: as in chat)"
        )
    parser.add_argument(
        "--knee-per-s", type=float, metavar="X", help="good requests/s that count as 1 for a trace"
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
        _named("--out", lambda: args.out.mkdir(parents=True, exist_ok=True))
    if args.find_knee:
        return _find_knee(args, setup)
    policies = args.policy or [PRODUCT]
    if "all" in policies:
        policies = list(CONTENDERS)
    policies = list(dict.fromkeys(policies))
    _named("--policy", lambda: [contend(setup, name) for name in policies])
    bar = Bar(sys.stderr.isatty())
    if args.scenario:
        results, setup = _scenario(args, setup, policies, bar)
    else:
        results = _trace(args, setup, policies, bar)
    bar.clear()
    _report(args, results, setup)
    return 0


def _scenario(
    args: argparse.Namespace, setup: Setup, policies: Sequence[str], bar: Bar
) -> tuple[list[Result], Setup]:
    _named("--scenario", lambda: build_scenario(args.scenario, setup))
    knee_per_s, knee_goodput_per_s = KNEES[MIX_OF.get(args.scenario, "chat")]
    if args.config or args.replicas:
        knee = _knee(args.scenario, setup)
        knee_per_s, knee_goodput_per_s = knee.rate_per_s, knee.goodput_per_s
    scenario = _named(
        "--scenario", lambda: build_scenario(args.scenario, setup, knee_per_s, args.duration_s)
    )
    results = compare(
        scenario,
        policies,
        range(args.seeds),
        knee_goodput_per_s=knee_goodput_per_s,
        on_progress=bar.show,
    )
    return results, scenario.setup


def _trace(
    args: argparse.Namespace, setup: Setup, policies: Sequence[str], bar: Bar
) -> list[Result]:
    defaults = TraceDefaults(
        tenants=tuple(f"tenant-{number}" for number in range(args.tenants or 1)),
        classes=args.classes,
        time_scale=args.time_scale or 1.0,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        segment_tokens=_segment_tokens(setup),
    )
    arrivals = _named("--trace", lambda: list(read_trace(args.trace, defaults)))
    if not arrivals:
        raise ConfigError(f"--trace {args.trace}: the trace is empty; it needs a row per request")
    duration_s = args.duration_s or arrivals[-1].arrival_s + 1.0
    if duration_s <= setup.warmup_s:
        raise ConfigError(
            f"--warmup-s {setup.warmup_s:g} leaves nothing of {duration_s:g} s to measure; "
            "choose a shorter one"
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

    return compare_replay(
        setup,
        again,
        policies,
        range(args.seeds),
        knee_goodput_per_s=args.knee_per_s,
        on_progress=bar.show,
    )


def _segment_tokens(setup: Setup) -> int:
    engine = setup.pools[0].engine
    return engine.block_tokens * engine.blocks_per_hash


def _setup(args: argparse.Namespace) -> Setup:
    setup = default_setup()
    if args.config is not None:
        setup = _configured(setup, args)
    elif args.pool is not None:
        raise ConfigError("--pool names a pool of --config, which is missing")
    if args.replicas is not None:
        first, *others = setup.pools
        setup = replace(setup, pools=(replace(first, replicas=args.replicas), *others))
    return replace(setup, warmup_s=args.warmup_s, routers=args.routers)


def _configured(setup: Setup, args: argparse.Namespace) -> Setup:
    """Return the configuration's pools, the loaded one first, and its pool for long contexts.

    A real engine is simulated with the default physics.
    """
    served = config_file.load(args.config)
    pools = []
    for name, pool in served.pools.items():
        engine = EngineParams()
        if isinstance(pool.engine, SimSettings):
            engine = engine_params(pool.engine)
        if name not in served.router.pools:
            continue
        policy = served.router.pools[name].to_core()
        replicas = max(1, pool.replicas.num_replicas)
        pools.append(PoolSetup(PoolName(name), policy, engine, replicas))
    names = [pool.name for pool in pools]
    loaded = args.pool or names[0]
    if loaded not in names:
        raise ConfigError(f"--pool {loaded!r:.60} is none of {args.config}'s: {', '.join(names)}")
    pools.sort(key=lambda pool: pool.name != loaded)
    heavy = served.router.pools[loaded].heavy
    return replace(setup, pools=tuple(pools), heavy=heavy.to_core() if heavy else None)


def _check_numbers(args: argparse.Namespace) -> None:
    if not 1 <= args.seeds <= SEEDS_MOST:
        raise ConfigError(f"--seeds must be from 1 to {SEEDS_MOST}, not {args.seeds}")
    of_traces = ("time_scale", "tenants", "prompt_tokens", "output_tokens", "knee_per_s")
    for name in ("duration_s", "replicas", "routers", *of_traces):
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if value is not None and args.scenario and name in of_traces:
            raise ConfigError(f"{flag} is for --trace; a scenario has its own traffic")
        most = {"replicas": REPLICAS_MOST, "routers": ROUTERS_MOST}.get(name, 10**6)
        if value is not None and not 0 < value <= most:
            raise ConfigError(f"{flag} must be above 0 and at most {most}, not {value}")
    if args.classes and args.scenario:
        raise ConfigError("--classes is for --trace; a scenario has its own traffic")
    if not 0 <= args.warmup_s < (args.duration_s or 10**9):
        raise ConfigError(
            f"--warmup-s must be at least 0 and less than --duration-s, not {args.warmup_s:g}"
        )


def _named(flag: str, act: Callable[[], T]) -> T:
    """Return what ``act`` returns; what is wrong with the flag's value names the flag."""
    try:
        return act()
    except OSError as error:
        raise ConfigError(f"{flag} {error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error


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
    concurrency = max(1, round(knee.in_flight / setup.pools[0].replicas))
    figures = {
        "knee_per_s": knee.rate_per_s,
        "knee_concurrency": concurrency,
        "queue_threshold": queue_threshold(concurrency),
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
    sys.stdout.write(
        f"knee: {knee.rate_per_s:.1f}/s, {knee.goodput_per_s:.1f}/s good; "
        f"{concurrency} in flight per replica (max_concurrency_per_replica); another replica "
        f"when more than {queue_threshold(concurrency)} wait for each\n"
    )
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
