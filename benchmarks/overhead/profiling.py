"""Where a process spends its time: py-spy's samples as a table of functions."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

SECONDS = 8.0
RATE_PER_S = 200
TOP = 25


class Recording:
    """Samples of one process, taken in the background from its making on."""

    def __init__(self, process: psutil.Process, seconds: float) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "stacks"
        self._spy = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("py-spy")), "record"),
                *("--pid", str(process.pid), "--duration", str(int(seconds))),
                *("--rate", str(RATE_PER_S), "--format", "raw", "--output", str(self._file)),
                "--nonblocking",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def table(self) -> str:
        """Wait for the last sample; return the top functions by their own and whole time."""
        output, _ = self._spy.communicate()
        if not self._file.exists():
            return f"py-spy recorded nothing: {output.strip()[-500:]}"
        text = self._file.read_text()
        self._folder.cleanup()
        return _table(text)


def of_pool(engines: Sequence[psutil.Process], pool: str) -> psutil.Process:
    """Return the engine process that serves a pool."""
    [found] = [each for each in engines if f"pool-{pool}:" in " ".join(each.cmdline())]
    return found


def _table(stacks: str) -> str:
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    total = 0
    for line in stacks.splitlines():
        frames, _, count_text = line.rpartition(" ")
        count = int(count_text)
        names = [_short(frame) for frame in frames.split(";")]
        total += count
        own[names[-1]] += count
        for name in set(names):
            whole[name] += count
    if not total:
        return "no samples: it was idle"
    lines = [f"{total} samples", "   own  whole  function"]
    ranked = {name: None for name, _ in [*own.most_common(TOP), *whole.most_common(TOP)]}
    for name in sorted(ranked, key=lambda each: -whole[each]):
        lines.append(f"{own[name] / total:6.1%} {whole[name] / total:6.1%}  {name}")
    return "\n".join(lines)


def _short(frame: str) -> str:
    """Return ``function (folder/file)`` of py-spy's ``function (path:line)``."""
    name, _, where = frame.partition(" (")
    path = where.rstrip(")").rpartition(":")[0] or where.rstrip(")")
    return f"{name} ({'/'.join(Path(path).parts[-2:])})"
