"""Where a process spends its time: its threads' CPU, and py-spy's samples by function.

Only samples that hold the interpreter lock count: a Python thread that waits in native code
looks busy to py-spy. What threads without Python use (gRPC, Ray, ZeroMQ) is in the threads'
CPU alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil

SECONDS = 8.0
RATE_PER_S = 250
FUNCTIONS = 30
THREADS_MIN_CORES = 0.01


class Recording:
    """One process while it works, from the making on."""

    def __init__(self, process: psutil.Process, seconds: float) -> None:
        self._process = process
        self._began_s = time.monotonic()
        self._threads_s = _threads_s(process)
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "stacks"
        self._spy = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("py-spy")), "record", "--gil"),
                *("--pid", str(process.pid), "--duration", str(int(seconds))),
                *("--rate", str(RATE_PER_S), "--format", "raw", "--output", str(self._file)),
                "--nonblocking",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def tables(self) -> str:
        """Wait for the last sample; return CPU by thread, time by package and by function."""
        output, _ = self._spy.communicate()
        wall_s = time.monotonic() - self._began_s
        threads = _thread_table(self._threads_s, _threads_s(self._process), wall_s)
        if not self._file.exists():
            return f"{threads}\npy-spy recorded nothing: {output.strip()[-500:]}"
        stacks = self._file.read_text().splitlines()
        self._folder.cleanup()
        return f"{threads}\n{_stack_tables(stacks)}"


def of_pool(engines: Sequence[psutil.Process], pool: str) -> psutil.Process:
    """Return the engine process that serves a pool."""
    [found] = [each for each in engines if f"pool-{pool}:" in " ".join(each.cmdline())]
    return found


def _threads_s(process: psutil.Process) -> dict[tuple[int, str], float]:
    """Return the CPU seconds of each thread, by its id and name."""
    spent = {}
    for thread in process.threads():
        comm = Path(f"/proc/{process.pid}/task/{thread.id}/comm")
        name = comm.read_text().strip() if comm.exists() else "ended"
        spent[thread.id, name] = thread.user_time + thread.system_time
    return spent


def _thread_table(
    first: dict[tuple[int, str], float], last: dict[tuple[int, str], float], wall_s: float
) -> str:
    cores: dict[str, float] = {}
    for thread, until_s in last.items():
        spent_s = until_s - first.get(thread, 0.0)
        cores[thread[1]] = cores.get(thread[1], 0.0) + spent_s / wall_s
    ranked = sorted(cores.items(), key=lambda each: -each[1])
    shown = [f"{name} {use:.2f}" for name, use in ranked if use >= THREADS_MIN_CORES]
    return "threads, cores: " + ", ".join(shown)


def _stack_tables(stacks: Iterable[str]) -> str:
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    packages: Counter[str] = Counter()
    total = 0
    for line in stacks:
        frames, _, count_text = line.rpartition(" ")
        count = int(count_text)
        names = frames.split(";")
        functions = [_function(frame) for frame in names]
        total += count
        own[functions[-1]] += count
        packages[_package(names[-1])] += count
        whole.update(dict.fromkeys(functions, count))
    if not total:
        return "no samples: it was idle"
    lines = [
        f"{total} samples; own time by package: "
        + ", ".join(f"{name} {count / total:.0%}" for name, count in packages.most_common(12)),
        "   own  whole  function",
    ]
    shown = {name for name, _ in [*own.most_common(FUNCTIONS), *whole.most_common(FUNCTIONS)]}
    for name in sorted(shown, key=lambda each: -whole[each]):
        lines.append(f"{own[name] / total:6.1%} {whole[name] / total:6.1%}  {name}")
    return "\n".join(lines)


def _path(frame: str) -> Path:
    """Return the file of py-spy's ``function (path:line)``."""
    where = frame.partition(" (")[2].rstrip(")")
    path = where.rpartition(":")[0] or where
    return Path(path.rpartition("site-packages/")[2])


def _function(frame: str) -> str:
    return f"{frame.partition(' (')[0]} ({'/'.join(_path(frame).parts[-3:])})"


def _package(frame: str) -> str:
    path = _path(frame)
    return path.parts[0] if not path.is_absolute() and len(path.parts) > 1 else "standard library"
