"""What a pod is on this machine: a process with all that it starts, ended as a kubelet ends it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

from tests.stack import _namespace, can_isolate, free_port

OBJECT_STORE_BYTES = 100_000_000


def ray_start(resources: str) -> list[str]:
    """Return `ray start` for a node with these resources, a group's ``resources`` as JSON.

    All nodes share one loopback: each gets ports of its own where pods have an address each.
    """
    left: dict[str, str] = json.loads(resources)
    cpus, gpus = left.pop("CPU", "0"), left.pop("GPU", "0")
    custom = json.dumps({name: float(amount) for name, amount in left.items()})
    return [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--num-cpus={cpus}",
        f"--num-gpus={gpus}",
        f"--resources={custom}",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--dashboard-agent-grpc-port={free_port()}",
        f"--runtime-env-agent-port={free_port()}",
        f"--metrics-export-port={free_port()}",
        "--min-worker-port=0",
        "--max-worker-port=0",
        "--disable-usage-stats",
    ]


class Node:
    """One pod's processes, in a session and, where there are any, process ids of their own."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, name: str
    ) -> None:
        """Start ``command``; what it prints goes to ``folder/name.log``."""
        self.log = folder / f"{name}.log"
        output: BinaryIO
        with open(self.log, "ab") as output:
            self._process = subprocess.Popen(
                [*_namespace(), *command],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._command = list(command)

    @property
    def pid(self) -> int:
        """The process below which all of the pod's are."""
        return self._process.pid

    def exit_status(self) -> int | None:
        """Return the status the pod's command ended with, None while it runs."""
        return self._process.poll()

    def processes(self) -> list[psutil.Process]:
        """Return every living process of the pod."""
        try:
            root = psutil.Process(self.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def notify(self) -> None:
        """Send SIGTERM to the pod's command, as at the start of a grace period."""
        for process in self._mains():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every process of the pod at once and wait until they are gone."""
        below = self.processes()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # the namespace goes with it
        self._process.wait()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(below, timeout=120)

    def _mains(self) -> list[psutil.Process]:
        """Return the command's own process: below the namespace's first one, if there is one."""
        if not can_isolate():
            return [psutil.Process(self.pid)] if self.exit_status() is None else []
        found = []
        for process in self.processes()[1:]:
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[-len(self._command) :] == self._command and (
                    process.name() not in ("bash", "unshare", "setpriv")
                ):
                    found.append(process)
        return found[:1]
