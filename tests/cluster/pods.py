"""Pods on this machine as far as the network sees them: each has an address of its own.

A pod is a network namespace with all that runs in it, on one bridge with the others. Only root
can make them; `scripts/isolated` keeps the bridge from everything else.
"""

from __future__ import annotations

import contextlib
import ipaddress
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

NETWORK = ipaddress.ip_network("10.77.0.0/24")
BRIDGE = "pods"
Runs = list[tuple[int, int]]
LISTENING, GONE = "0A", "07"  # as in /proc/net/tcp
# Memory of its own for what a container may write; then wait for the network.
PREPARE = 'mount -t tmpfs tmpfs /tmp && ip link set lo up && read -r _ && exec "$@"'


@dataclass(frozen=True)
class Socket:
    """A line of /proc/net/tcp; addresses are those of IPv4."""

    local: str
    local_port: int
    remote: str
    remote_port: int
    state: str


class Pod:
    """A namespace with an address, and the process that was started in it.

    With ``allowed``, ports by address, it can begin no other connection to the pods' network.
    """

    def __init__(
        self,
        name: str,
        number: int,
        command: Sequence[str],
        *,
        allowed: Mapping[str, Runs] | None = None,
        **options: object,
    ) -> None:
        self.name = name
        self.address = address(number)
        unshare = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc"]
        self._process = subprocess.Popen(
            [*unshare, "--kill-child", "bash", "-c", PREPARE, "bash", *command],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
        try:
            self._connect(number)
            if allowed is not None:
                self._restrict(allowed)
            self._go()
        except BaseException:
            self.end()
            raise

    def _connect(self, number: int) -> None:
        while not (children := psutil.Process(self._process.pid).children()):
            pass
        self.pid = children[0].pid
        inside = f"nsenter --net --target {self.pid} ip"
        for line in (
            f"ip link add veth{number} type veth peer name eth0 netns {self.pid}",
            f"ip link set veth{number} master {BRIDGE} up",
            f"{inside} addr add {self.address}/{NETWORK.prefixlen} dev eth0",
            f"{inside} link set eth0 up",
            f"{inside} route add default via {NETWORK[1]}",
        ):
            subprocess.run(line.split(), check=True)

    def _restrict(self, allowed: Mapping[str, Runs]) -> None:
        """Drop what begins any other connection, as a network plug-in does."""
        begins = "tcp flags & (syn | ack) == syn"
        rules = [
            f"ip daddr {to} {begins} tcp dport {{ {_set(runs)} }} accept"
            for to, runs in allowed.items()
            if runs
        ]
        rules.append(f"ip daddr {NETWORK} ip daddr != {self.address} {begins} drop")
        hook = "type filter hook output priority 0"
        lines = ["table ip policies {", "chain output {", hook, *rules, "}", "}", ""]
        subprocess.run(
            ["nsenter", "--net", "--target", str(self.pid), "nft", "--file", "-"],
            input="\n".join(lines),
            text=True,
            check=True,
        )

    def _go(self) -> None:
        assert self._process.stdin is not None
        stdin: IO[str] = self._process.stdin
        stdin.write("\n")
        stdin.flush()

    def run(
        self, *command: str | Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the pod's namespaces."""
        enter = ["nsenter", "--net", "--mount", "--pid", "--target", str(self.pid)]
        return subprocess.run(
            [*enter, *map(str, command)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def sockets(self) -> Iterator[Socket]:
        """Yield the TCP sockets of the pod that are in use or were just now."""
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[3] != GONE:
                        yield Socket(*_end(words[1]), *_end(words[2]), words[3])

    def ended(self) -> bool:
        """Whether what was started in the pod has ended."""
        return self._process.poll() is not None

    def end(self) -> None:
        """End everything in the pod."""
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def bridge() -> Iterator[None]:
    """The network of the pods; ended with everything else of `scripts/isolated`."""
    for line in (
        f"ip link add {BRIDGE} type bridge",
        f"ip addr add {NETWORK[1]}/{NETWORK.prefixlen} dev {BRIDGE}",
        f"ip link set {BRIDGE} up",
    ):
        subprocess.run(line.split(), check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


def address(number: int) -> str:
    """Return the address of the pod with this number."""
    return str(NETWORK[number])


def _set(runs: Runs) -> str:
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _end(text: str) -> tuple[str, int]:
    """Return address and port of one end; addresses stand there as words of the processor's."""
    host, _, port = text.partition(":")
    return str(ipaddress.ip_address(bytes.fromhex(host[-8:])[::-1])), int(port, 16)
