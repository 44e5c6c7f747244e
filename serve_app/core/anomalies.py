"""What costs unlike before: jumps against one's own history, and slow rises.

A value is judged by the median of what came before it and by the median absolute deviation
(MAD), which a few wild hours do not move. It is a jump only if it is far out by both: many
deviations, and a multiple of the median. Everybody is compared with themselves, so a large
customer is no anomaly for being large.

Source: Iglewicz & Hoaglin, How to Detect and Handle Outliers (1993): the modified z-score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# Makes the MAD of a normal distribution its standard deviation.
_MAD_SCALE: Final = 1.4826
# Where history hardly varies, this part of the median counts as its deviation.
_DEVIATION_MIN_RATIO: Final = 0.05


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a time, wall seconds."""

    at_s: int
    value: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """When a value is an anomaly: beyond both thresholds, with enough history.

    ``history_min`` is how many earlier values are needed and ``history_span_s`` how far back
    the first of them lies: who has been seen by night only has no history of days.
    ``value_min`` is what is not worth anybody's time.
    """

    score_min: float = 6.0
    ratio_min: float = 3.0
    history_min: int = 24
    history_span_s: int = 0
    value_min: float = 0.0


@dataclass(frozen=True, slots=True)
class Anomaly:
    """A value, what was usual before it, and how far out it is."""

    at_s: int
    value: float
    usual: float
    ratio: float
    score: float


def median(values: Sequence[float]) -> float:
    """Return the middle of the values in order; of an even number, the mean of the two."""
    assert values, "nothing has no middle"
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def deviation(values: Sequence[float]) -> float:
    """Return the scaled MAD of the values, and never less than a part of their median."""
    middle = median(values)
    spread = _MAD_SCALE * median([abs(value - middle) for value in values])
    return max(spread, _DEVIATION_MIN_RATIO * abs(middle))


def jumps(
    points: Sequence[Point], from_s: int, by: Sensitivity, history_max: int = 24 * 28
) -> list[Anomaly]:
    """Return the values from ``from_s`` on that are far above what came before them.

    ``points`` are in the order of time. A value that was found is no history for those that
    follow within ``history_max // 4`` places, so that what runs away does not hide itself.
    """
    found: list[Anomaly] = []
    history: list[Point] = []
    odd: list[Point] = []
    for point in points:
        before = history[-history_max:]
        anomaly = _judge(point, before, by) if point.at_s >= from_s else None
        if anomaly is None:
            history.append(point)
            continue
        found.append(anomaly)
        odd.append(point)
        if len(odd) > history_max // 4:
            # By now it is what is usual.
            history.append(odd.pop(0))
    return found


def rise(
    points: Sequence[Point], recent: int, by: Sensitivity, history_max: int = 28
) -> Anomaly | None:
    """Return the median of the last ``recent`` values if it is far above the earlier ones.

    For what rises slowly or for good, where no single value stands out. Where history is
    long enough its older half is what is usual: the newer one may have risen already.
    """
    if len(points) <= recent:
        return None
    before = points[:-recent][-history_max:]
    if len(before) >= 2 * by.history_min:
        before = before[: len(before) // 2]
    late = median([each.value for each in points[-recent:]])
    return _judge(Point(points[-1].at_s, late), before, by)


def _judge(point: Point, history: Sequence[Point], by: Sensitivity) -> Anomaly | None:
    if not history or len(history) < by.history_min or point.value < by.value_min:
        return None
    if point.at_s - history[0].at_s < by.history_span_s:
        return None
    before = [each.value for each in history]
    usual = median(before)
    if usual <= 0:
        return None
    ratio = point.value / usual
    score = (point.value - usual) / deviation(before)
    if ratio < by.ratio_min or score < by.score_min:
        return None
    return Anomaly(point.at_s, point.value, usual, ratio, score)
