"""``headrace gpu-health``: watch this node's GPUs and act on their faults, as a DaemonSet."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from serve_app.commands._numbers import positive
from serve_app.terminal import CommandFailed, Subparsers, command, note, out

if TYPE_CHECKING:
    from serve_app.gpu_health import GpuWatch
    from serve_app.gpu_sources import FaultSource
    from serve_app.gpu_turn import Turn

NODE_VARIABLE: Final = "HEADRACE_NODE"
_EXAMPLE: Final = """\
headrace gpu-health --source http://127.0.0.1:9400/metrics --gcs-address headrace-head:6379
headrace gpu-health --source nvml --no-kubernetes --dry-run
headrace gpu-health --print-rbac headrace-gpu-health serving | kubectl apply -f -"""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers,
        "gpu-health",
        "Watch this node's GPUs and act on their faults: restart an engine, drain the node.",
        _EXAMPLE,
    )
    parser.add_argument(
        "--source",
        default="http://127.0.0.1:9400/metrics",
        help="DCGM exporter's URL, `nvml`, or `file:PATH` of the exporter's text (%(default)s)",
    )
    parser.add_argument(
        "--node",
        help=f"Kubernetes' name of this node (default: {NODE_VARIABLE}, or the host name)",
    )
    parser.add_argument("--gcs-address", metavar="HOST:PORT", help="Ray's GCS, for draining")
    parser.add_argument(
        "--no-kubernetes", action="store_true", help="not in a cluster: restart and drain only"
    )
    parser.add_argument("--period-s", type=float, default=5.0, metavar="S", help="(5)")
    parser.add_argument(
        "--drain-notice-s",
        type=float,
        default=600.0,
        metavar="S",
        help="what runs may take until its pods are evicted (600)",
    )
    parser.add_argument(
        "--nodes-out-max",
        type=int,
        default=2,
        metavar="N",
        help="nodes out of service for their GPUs at a time (2)",
    )
    parser.add_argument(
        "--lock",
        type=Path,
        default=Path("/var/run/headrace/gpu-health.lock"),
        help="shared by the watchers of a node, a hostPath: one acts (%(default)s)",
    )
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve metrics there")
    parser.add_argument("--metrics-host", default="127.0.0.1", metavar="HOST", help="(%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="decide and say so, do nothing")
    parser.add_argument(
        "--print-rbac",
        nargs=2,
        metavar=("NAME", "NAMESPACE"),
        help="print the roles that its service account needs, and end",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Watch until SIGINT or SIGTERM. Returns 0.

    Raises:
        CommandFailed: the source, the cluster or the lock cannot be used.
    """
    if args.print_rbac:
        import yaml

        from serve_app.kubernetes import rbac

        out(yaml.safe_dump_all(rbac(*args.print_rbac), sort_keys=False).rstrip())
        return 0
    positive("--period-s", args.period_s, most=3600)
    positive("--drain-notice-s", args.drain_notice_s, most=86_400)
    positive("--nodes-out-max", args.nodes_out_max)
    args.node = args.node or os.environ.get(NODE_VARIABLE) or platform.node()
    from serve_app.telemetry.logs import configure, process_stderr

    configure(process_stderr())
    asyncio.run(_watch(args))
    return 0


async def _watch(args: argparse.Namespace) -> None:
    from prometheus_client import CollectorRegistry, start_http_server

    from serve_app.gpu_health import WatchMetrics
    from serve_app.gpu_turn import Turn

    registry = CollectorRegistry()
    metrics = WatchMetrics(registry)
    try:
        turn = Turn(args.lock, metrics)
        if args.metrics_port is not None:
            start_http_server(args.metrics_port, args.metrics_host, registry)
    except OSError as error:
        raise CommandFailed(f"{error}; see --lock and --metrics-port") from error
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    watch = _build(args, metrics)
    note(f"watching the GPUs of {args.node} by {args.source}")
    await _until(stop, watch, turn, args.lock, period_s=args.period_s)


async def _until(
    stop: asyncio.Event, watch: GpuWatch, turn: Turn, lock: Path, *, period_s: float
) -> None:
    import logging

    try:
        while not stop.is_set():
            if _is_mine(turn, lock):
                try:
                    await watch.tick()
                except Exception:
                    logging.getLogger("headrace.gpu").exception("gpu watch failed")
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), period_s)
    finally:
        turn.over()


def _is_mine(turn: Turn, lock: Path) -> bool:
    try:
        return turn.mine()
    except OSError as error:
        raise CommandFailed(
            f"cannot lock {lock}: {error.strerror or error}; if another user left it there "
            "remove it, or give --lock FILE"
        ) from error


def _build(args: argparse.Namespace, metrics: object) -> GpuWatch:
    from serve_app.gpu_engines import ProcessEngines
    from serve_app.gpu_health import GpuWatch, WatchMetrics, WatchSettings
    from serve_app.kubernetes import KubernetesFailed, in_cluster
    from serve_app.ray_nodes import RayNodes

    assert isinstance(metrics, WatchMetrics)
    kubernetes = None
    if not args.no_kubernetes:
        try:
            kubernetes = in_cluster(os.environ)
        except KubernetesFailed as error:
            raise CommandFailed(f"{error}; --no-kubernetes goes without") from error
    settings = WatchSettings(
        node=args.node,
        host_names=(args.node, platform.node()),
        drain_notice_s=args.drain_notice_s,
        nodes_out_max=args.nodes_out_max,
        dry_run=args.dry_run,
    )
    return GpuWatch(
        settings,
        _source(args.source),
        ProcessEngines(),
        metrics,
        clock=time.monotonic,
        kubernetes=kubernetes,
        ray=RayNodes(args.gcs_address) if args.gcs_address else None,
    )


def _source(name: str) -> FaultSource:
    import httpx

    from serve_app.gpu_sources import SourceFailed, dcgm_source, file_source, nvml_source

    if name.startswith("file:"):
        return file_source(Path(name.removeprefix("file:")))
    if name.startswith(("http://", "https://")):
        return dcgm_source(name, httpx.AsyncClient(trust_env=False))
    if name != "nvml":
        raise CommandFailed(f"--source must be a URL, nvml or file:PATH; got {name!r:.80}")
    try:
        return nvml_source()
    except SourceFailed as error:
        raise CommandFailed(str(error)) from error
