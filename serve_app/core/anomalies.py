"""What costs unlike before: jumps against one's own history, and slow rises.

A value is judged by the median of what came before it and by the median absolute deviation
(MAD), which a few wild hours do not move. It is a jump only if it is far out by both: many
deviations, and a multiple of the median. Everybody is compared with themselves, so a large
customer is no anomaly for being large. Who has no usual value yet, having spent nothing or
for too short a time, is compared with what others spend.

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


@dataclass(frozen=True, slots=True)
class Usual:
    """What a history comes to: its first time, its length, its median and its deviation."""

    from_s: int
    count: int
    middle: float
    deviation: float


def usual_of(history: Sequence[Point]) -> Usual | None:
    """Return what a history, in the order of time, comes to; None if there is none.

    It sorts the history: one that many are judged by is given to this once.
    """
    if not history:
        return None
    values = [each.value for each in history]
    return Usual(history[0].at_s, len(values), max(0.0, median(values)), deviation(values))


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


def outbreaks(
    points: Sequence[Point], from_s: int, others: Usual | None, by: Sensitivity
) -> list[Anomaly]:
    """Return the values from ``from_s`` on, of one who has no usual value, that others never have.

    ``others`` is what everybody's values before ``from_s`` come to; without enough of them
    nothing is odd. Where ``jumps`` can judge a value, this leaves it alone.
    """
    late = [point for point in points if point.at_s >= from_s]
    if others is None or not any(point.value >= by.value_min for point in late):
        return []
    own = usual_of([point for point in points if point.at_s < from_s])
    if own is not None and _can_judge(own, late[0].at_s, by):
        return []
    found = (_judge_by(point, others, by) for point in late)
    return [each for each in found if each is not None]


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
    # The history is sorted only for a value that may be odd.
    usual = usual_of(history) if point.value >= by.value_min else None
    return None if usual is None else _judge_by(point, usual, by)


def _judge_by(point: Point, usual: Usual, by: Sensitivity) -> Anomaly | None:
    if point.value < by.value_min or not _can_judge(usual, point.at_s, by):
        return None
    ratio = point.value / usual.middle
    score = (point.value - usual.middle) / usual.deviation
    if ratio < by.ratio_min or score < by.score_min:
        return None
    return Anomaly(point.at_s, point.value, usual.middle, ratio, score)


def _can_judge(usual: Usual, at_s: int, by: Sensitivity) -> bool:
    """Tell whether a history is long enough to judge what is at ``at_s``, and not of nothing."""
    long_enough = usual.count >= by.history_min and at_s - usual.from_s >= by.history_span_s
    return long_enough and usual.middle > 0
