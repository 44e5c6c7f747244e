"""Run two commands at once, the first in what the second leaves of the processors.

side_by_side.py COMMAND... -- COMMAND...

The second's output is shown as it comes, the first's in one piece when it ends. Exits with
1 if either failed; interrupted, it ends both.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

NICE = 10
POLL_S = 0.2
STOP_TIMEOUT_S = 20.0


def main(arguments: Sequence[str]) -> int:
    """Run both; return 0 if both did."""
    place = arguments.index("--") if "--" in arguments else 0
    first, second = arguments[:place], arguments[place + 1 :]
    if not first or not second:
        print(__doc__, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryFile() as kept:
        behind = subprocess.Popen(
            first,
            stdin=subprocess.DEVNULL,
            stdout=kept,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _step_back(behind.pid)
            before = subprocess.Popen(second)
            try:
                _watch(behind, before, kept)
            except KeyboardInterrupt:
                # A terminal interrupts the second itself; the first is of another session.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    before.wait(STOP_TIMEOUT_S)
                raise
            finally:
                _end(before, os.kill, signal.SIGTERM)
        finally:
            _end(behind, os.killpg, signal.SIGINT)
    return 1 if before.returncode or behind.returncode else 0


def _watch(
    behind: subprocess.Popen[bytes], before: subprocess.Popen[bytes], kept: BinaryIO
) -> None:
    """Wait for both; show what the first printed as soon as it has ended."""
    while behind.poll() is None:
        time.sleep(POLL_S)
    sys.stdout.flush()
    kept.seek(0)
    shutil.copyfileobj(kept, sys.stdout.buffer)
    sys.stdout.buffer.flush()
    before.wait()


def _step_back(pid: int) -> None:
    """Give a process that has just begun a session a tenth of another's weight.

    Where the kernel groups sessions (autogroup), niceness counts within one only, and the
    session has a niceness of its own.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, 0) + NICE
    os.setpriority(os.PRIO_PROCESS, pid, niceness)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(min(niceness, 19)))


def _end(
    process: subprocess.Popen[bytes], send: Callable[[int, int], None], gently: signal.Signals
) -> None:
    """End a process that still runs, or a session by its first process."""
    for number in (gently, signal.SIGKILL):
        if process.poll() is not None:
            return
        send(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
