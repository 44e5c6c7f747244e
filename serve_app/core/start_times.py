"""How long replicas take from being wanted to being there: the whole cold start, as it was seen.

Scheduling, a machine, the process, the model and the first token: whoever orders replicas and
hears of them measures all of it without knowing any part.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import Final

KEPT: Final = 8
# Who is silent for a moment, or is heard of late, did not start: ids that were ever there.
KNOWN_MAX: Final = 4096
# Whoever orders replicas begins by hearing of those that are there, one after the other.
SETTLING_S: Final = 5.0
# A start that was held up for an hour is no reason to order an hour ahead.
TOLD_RATIO_MAX: Final = 4.0


class StartTimes:
    """One pool's latest starts. Orders are met in the order they were given."""

    def __init__(self) -> None:
        self._ordered_at_s: deque[float] = deque()
        self._took_s: deque[float] = deque(maxlen=KEPT)
        self._known: dict[str, None] = {}
        self._measures_from_s: float | None = None

    def look(self, now_s: float, wanted: int, replicas: Collection[str]) -> None:
        """Take what is wanted and who is there, at ``now_s``.

        Nothing is measured in the SETTLING_S after the first look.
        A replica that is missing counts as ordered from the first look that missed it; what
        is no longer wanted is taken off the latest orders.
        """
        there = frozenset(replicas)
        new = [each for each in sorted(there) if each not in self._known]
        self._known.update(dict.fromkeys(new))
        while len(self._known) > KNOWN_MAX:
            del self._known[next(iter(self._known))]
        if self._measures_from_s is None:
            self._measures_from_s = now_s + SETTLING_S
        if now_s < self._measures_from_s:
            return
        for _ in range(min(len(new), len(self._ordered_at_s))):
            self._took_s.append(max(0.0, now_s - self._ordered_at_s.popleft()))
        missing = max(0, wanted - len(there))
        while len(self._ordered_at_s) > missing:
            self._ordered_at_s.pop()
        while len(self._ordered_at_s) < missing:
            self._ordered_at_s.append(now_s)

    def estimate_s(self, told_s: float) -> float:
        """Return how long a start takes: the median of those seen, ``told_s`` before any.

        At most TOLD_RATIO_MAX times what was told.
        """
        if not self._took_s:
            return told_s
        seen_s = sorted(self._took_s)[len(self._took_s) // 2]
        return min(seen_s, TOLD_RATIO_MAX * told_s) if told_s > 0 else seen_s
