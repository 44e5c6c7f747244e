"""A clock for a simulated engine in real time: it stands still while the process does.

Else an engine that was left no processor for seconds has made all its tokens when its test
gets to look.
"""

from __future__ import annotations

import time

LONGEST_S = 0.05


class SteadyClock:
    """Monotonic seconds, of which no more than ``LONGEST_S`` pass between two looks."""

    def __init__(self) -> None:
        self._looked_at_s = time.monotonic()
        self._now_s = self._looked_at_s

    def __call__(self) -> float:
        now_s = time.monotonic()
        self._now_s += min(LONGEST_S, now_s - self._looked_at_s)
        self._looked_at_s = now_s
        return self._now_s
