"""What a trace asks of a pool: rates, lengths, and its longest silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from serve_app.sim.records import percentile
from serve_app.sim.workload import Arrival

WINDOW_S = 60.0
PEAK_RATIO = 0.99
GAP_S = 300.0
"""A silence as long as this is worth a warning: data may be missing."""


@dataclass(frozen=True, slots=True)
class TraceSummary:
    """A trace in numbers; ``gap_s`` is its longest silence, which begins at ``gap_at_s``.

    ``peak_per_s`` is the 99th percentile of the rate of whole minutes that had a request at
    all: a gap in the data does not make the rest look busier than it was, or the pool smaller.
    ``mean_per_s`` is over all of the time.
    """

    requests: int
    duration_s: float
    mean_per_s: float
    peak_per_s: float
    input_tokens: float
    input_p95_tokens: float
    output_tokens: float
    gap_s: float
    gap_at_s: float

    @property
    def has_gap(self) -> bool:
        """Whether data may be missing."""
        return self.gap_s >= GAP_S


def summarise_trace(arrivals: Sequence[Arrival]) -> TraceSummary:
    """Return a trace's numbers.

    Raises:
        ValueError: it has fewer than two requests, or all come at once: there is no rate.
    """
    if len(arrivals) < 2 or arrivals[-1].arrival_s <= arrivals[0].arrival_s:
        raise ValueError(
            f"{len(arrivals)} requests at one moment have no rate; a trace needs two times or more"
        )
    times_s = [each.arrival_s for each in arrivals]
    begin_s, end_s = times_s[0], times_s[-1]
    duration_s = end_s - begin_s
    silences = [(later - before, before) for before, later in pairwise(times_s)]
    gap_s, gap_at_s = max(silences)
    prompts = [each.prompt_tokens for each in arrivals]
    mean_per_s = (len(arrivals) - 1) / duration_s
    return TraceSummary(
        len(arrivals),
        duration_s,
        mean_per_s,
        max(mean_per_s, _peak_per_s(times_s, duration_s)),
        fmean(prompts),
        max(fmean(prompts), percentile(prompts, 0.95) or 0.0),
        fmean(each.output_tokens for each in arrivals),
        gap_s,
        gap_at_s,
    )


def _peak_per_s(times_s: Sequence[float], duration_s: float) -> float:
    windows = int(duration_s / WINDOW_S)
    if windows < 1:
        return 0.0
    # What is left of the last minute would be a rate of its own.
    counts = Counter(int((at_s - times_s[0]) / WINDOW_S) for at_s in times_s)
    busy = [counts[window] / WINDOW_S for window in range(windows) if counts[window]]
    return percentile(busy, PEAK_RATIO) or 0.0
