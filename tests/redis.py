"""A Redis of the tests' own: on loopback, in a temporary folder, gone afterwards.

What serves is what `scripts/find_redis.py` finds.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import find_redis
import pytest
from fetch_package import NotFetched

START_TIMEOUT_S = 120.0
POLL_S = 0.05


class Redis:
    """A server that keeps what it has answered, however it ends; it can be started again."""

    def __init__(self, program: Path, folder: Path) -> None:
        """``folder`` is where its data and its log are."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.address = f"127.0.0.1:{self._port}"
        self.password = secrets.token_hex(16)
        self._program = program
        self._folder = folder

    def start(self) -> None:
        """Start it and wait until it answers. It ends with the thread that calls this."""
        settings = {
            "bind": "127.0.0.1",
            "port": self._port,
            "requirepass": self.password,
            "dir": self._folder,
            "appendonly": "yes",
            "save": '""',
        }
        dies_with_us = ("setpriv", "--pdeathsig", "KILL", "--")
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*dies_with_us, self._program, "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        lines = "".join(f"{name} {value}\n" for name, value in settings.items())
        # Not on its command line, which everybody may read.
        assert self._process.stdin is not None
        self._process.stdin.write(lines.encode())
        self._process.stdin.close()
        self._wait()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait(120)

    def _wait(self) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            story = (self._folder / "log").read_text(errors="replace")
            assert self._process.poll() is None, story
            assert time.monotonic() < deadline_s, story
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._port), 1) as connection,
        ):
            connection.settimeout(5)
            connection.sendall(f"AUTH {self.password}\r\nPING\r\nQUIT\r\n".encode())
            return b"+PONG" in connection.makefile("rb").read()
        return False


@contextmanager
def running_redis() -> Iterator[Redis]:
    """Start a server; yield it, and end it with its data. Skips where there is none."""
    try:
        program = find_redis.find()
    except NotFetched as error:
        pytest.skip(f"no Redis: {error}")
    with tempfile.TemporaryDirectory(prefix="redis") as folder:
        redis = Redis(program, Path(folder))
        redis.start()
        try:
            yield redis
        finally:
            redis.kill()
