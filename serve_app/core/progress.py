"""Whether an engine that answers still generates: by its own steps, not by test requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# So many looks at least, before an engine is called stalled.
LOOKS_MIN: Final = 4


@dataclass(frozen=True, slots=True)
class Progress:
    """What an engine has done: its steps so far, and whether requests are in it now."""

    steps: int
    busy: bool


class ProgressWatch:
    """Tells an engine that hangs from one that idles or has a long step.

    Time counts while requests are in the engine and its steps stay as many as they were; a
    step, or an engine without requests, ends the wait. Between two looks no more counts than
    a LOOKS_MIN-th of the bound: a process that was stopped itself, or whose machine slept,
    must not take its own absence for the engine's.
    """

    def __init__(self, stalled_after_s: float) -> None:
        """``stalled_after_s`` has to allow the longest step: a long prefill, a compilation."""
        self._stalled_after_s = stalled_after_s
        self._seen = Progress(0, busy=False)
        self._looked_s = 0.0
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """For how long requests have been in the engine without a step, seconds."""
        return self._waited_s

    @property
    def stalled(self) -> bool:
        """Whether that is too long."""
        return self._waited_s >= self._stalled_after_s

    def look(self, seen: Progress, now_s: float) -> None:
        """Take in what the engine has done by now. A clock that goes back counts nothing."""
        waits = seen.busy and self._seen.busy and seen.steps == self._seen.steps
        passed_s = max(0.0, now_s - self._looked_s)
        if waits:
            self._waited_s += min(passed_s, self._stalled_after_s / LOOKS_MIN)
        else:
            self._waited_s = 0.0
        self._seen, self._looked_s = seen, now_s
