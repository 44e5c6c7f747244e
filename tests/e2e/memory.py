"""Whether processes grow."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from tests.stack import Stack

MIB = 2**20
SAMPLE_S = 1.0
GROWN_MIB = 8.0
# Allocators and bounded tables (prefixes, tenants, connections) settle in the first part.
SETTLING_RATIO = 0.5


@dataclass
class Memory:
    """Resident bytes of each of the stack's processes over time.

    ``roles`` names them by the words of their titles.
    """

    stack: Stack
    roles: Mapping[str, Sequence[str]]
    samples: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def __enter__(self) -> Memory:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        processes = {
            f"{role} {process.pid}": process
            for role, words in self.roles.items()
            for process in self.stack.processes(*words)
        }
        while not self._stop.wait(SAMPLE_S):
            for name, process in processes.items():
                try:
                    rss_bytes = process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
                self.samples.setdefault(name, []).append((time.monotonic(), rss_bytes))

    def growth_mib(self) -> dict[str, float]:
        """Return what each process grew by after it settled."""
        return {name: round(self._growth_bytes(name) / MIB, 1) for name in self.samples}

    def course_mib(self) -> dict[str, list[float]]:
        """Return what each process had at every tenth of the time: whether it levels off."""
        return {
            name: [round(found[(len(found) - 1) * tenth // 10][1] / MIB, 1) for tenth in range(11)]
            for name, found in self.samples.items()
        }

    def grown(self) -> dict[str, float]:
        """Return those that grew by more than allocators do."""
        return {name: grown for name, grown in self.growth_mib().items() if grown > GROWN_MIB}

    def _growth_bytes(self, name: str) -> float:
        """Along the least-squares line."""
        samples = self.samples[name]
        settled = samples[int(SETTLING_RATIO * len(samples)) :]
        mean_s = sum(at_s for at_s, _ in settled) / len(settled)
        mean = sum(rss for _, rss in settled) / len(settled)
        spread = sum((at_s - mean_s) ** 2 for at_s, _ in settled)
        slope = sum((at_s - mean_s) * (rss - mean) for at_s, rss in settled) / spread
        return slope * (settled[-1][0] - settled[0][0])
