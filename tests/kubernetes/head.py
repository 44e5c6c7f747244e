"""What runs in the head pod: `ray start --head`, the autoscaler beside it, and the applications.

    python -m tests.kubernetes.head --port P --dashboard-port D --resources JSON
        --cluster NAME --namespace NS FILE

As Kubernetes and KubeRay would, it starts the autoscaler again when that ends; and when the head
ends, the whole of it anew, applications included.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.kubernetes.nodes import ray_start
from tests.stack import _namespace

POLL_S = 0.1
# What KubeRay calls the variable with it.
REDIS_PASSWORD = "REDIS_PASSWORD"
BIN = Path(sys.executable).parent


def main() -> None:
    """Run heads, one after the other, until this process is ended."""
    args = _arguments()
    while True:
        _run_head(args)
        print("the head has ended; starting another", flush=True)


def _run_head(args: argparse.Namespace) -> None:
    head = subprocess.Popen([*_namespace(), *_head_command(args)], start_new_session=True)
    sidecars: list[subprocess.Popen[bytes]] = []
    try:
        if _listens(args.port, head) and _listens(args.dashboard_port, head):
            sidecars.append(_autoscaler(args))
            _deploy(args, head)
        while head.poll() is None:
            if sidecars[0].poll() is not None:
                print("the autoscaler has ended; starting another", flush=True)
                sidecars[0] = _autoscaler(args)
            time.sleep(POLL_S)
    finally:
        head.kill()
        head.wait()
        for sidecar in sidecars:
            sidecar.kill()
            sidecar.wait()


def _head_command(args: argparse.Namespace) -> Sequence[str]:
    password = os.environ.get(REDIS_PASSWORD)
    return [
        *ray_start(args.resources),
        "--head",
        f"--port={args.port}",
        f"--dashboard-port={args.dashboard_port}",
        "--dashboard-host=127.0.0.1",
        "--no-monitor",
        *(() if password is None else (f"--redis-password={password}",)),
    ]


def _autoscaler(args: argparse.Namespace) -> subprocess.Popen[bytes]:
    with open("autoscaler.log", "ab") as log:
        return subprocess.Popen(
            [
                BIN / "ray",
                "kuberay-autoscaler",
                f"--cluster-name={args.cluster}",
                f"--cluster-namespace={args.namespace}",
                f"--gcs-address=127.0.0.1:{args.port}",
            ],
            # It calls `ray health-check` by name.
            env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _deploy(args: argparse.Namespace, head: subprocess.Popen[bytes]) -> None:
    """Hand Serve the applications through the dashboard, as KubeRay's RayService does."""
    dashboard = f"http://127.0.0.1:{args.dashboard_port}"
    command = [BIN / "serve", "deploy", args.file, "--address", dashboard]
    while head.poll() is None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        print(done.stdout + done.stderr, flush=True)
        time.sleep(POLL_S)


def _listens(port: int, head: subprocess.Popen[bytes]) -> bool:
    """Wait until somebody listens on a port; False if the head ended before."""
    while head.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        time.sleep(POLL_S)
    return False


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dashboard-port", type=int, required=True)
    parser.add_argument("--resources", required=True)
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
