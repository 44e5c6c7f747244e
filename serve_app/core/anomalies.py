"""What costs unlike before: jumps against one's own history, and slow rises.

A value is judged by the median of what came before it and by the median absolute deviation
(MAD), which a few wild hours do not move. It is a jump only if it is far out by both: many
deviations, and a multiple of the median. Everybody is compared with themselves, so a large
customer is no anomaly for being large. Who has no usual value yet, having spent nothing or
for too short a time, is compared with what others spend.

What a token or a request costs depends on how many others share the engine's steps: with
half the load it may cost nearly twice as much, and nothing is odd about that. So it is
compared with what it cost at a similar load.

Source: Iglewicz & Hoaglin, How to Detect and Handle Outliers (1993): the modified z-score.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from serve_app.core.calendar import day_start_s

# Makes the MAD of a normal distribution its standard deviation.
_MAD_SCALE: Final = 1.4826
# Where history hardly varies, this part of the median counts as its deviation.
_DEVIATION_MIN_RATIO: Final = 0.05
# So many hours of the nearest loads say what is usual at a load.
_SIMILAR: Final = 12


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
class Work:
    """What came out in an hour, what it cost, and the load at which it did.

    ``at_s`` is wall seconds; ``units``, ``cost`` and ``load`` are in any units that stay the
    same, and above zero. Load is work per replica and time, of all who share the engines.
    """

    at_s: int
    load: float
    units: float
    cost: float


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


class UsualCost:
    """What a unit usually costs at a load: the middle of the hours with the nearest loads.

    A step takes some time whatever is in it, and more for each who is: a unit costs less at
    a higher load, and never less than in proportion. So an hour of a higher load than the one
    asked for counts in proportion, one of a lower load as it is. Where no hour was similar,
    that is the most which the difference in load explains.
    """

    def __init__(self, history: Iterable[Work]) -> None:
        self._hours = sorted(history, key=lambda work: work.load)
        self._loads = [work.load for work in self._hours]

    def at(self, load: float, not_day_s: int | None = None) -> float | None:
        """Return it, without the hours of one day; None if there are no others."""
        costs: list[float] = []
        above = bisect_left(self._loads, load)
        below = above - 1
        while len(costs) < _SIMILAR and (below >= 0 or above < len(self._loads)):
            # By the ratio of loads: twice as much is as far away as half.
            upward = below < 0 or (
                above < len(self._loads) and self._loads[above] * self._loads[below] <= load * load
            )
            work = self._hours[above if upward else below]
            above, below = (above + 1, below) if upward else (above, below - 1)
            if not_day_s is None or day_start_s(work.at_s) != not_day_s:
                costs.append(work.cost / work.units * max(1.0, work.load / load))
        return median(costs) if costs else None

    def ratio(self, day: Sequence[Work], day_s: int) -> float:
        """Return a day's cost over what other days make usual; 0 if there are no others."""
        usual = sum((self.at(work.load, day_s) or 0.0) * work.units for work in day)
        return sum(work.cost for work in day) / usual if usual else 0.0


def dearer(
    hours: Iterable[Work], recent: int, by: Sensitivity, history_max: int = 28
) -> Anomaly | None:
    """Return the unit cost of the last ``recent`` days if it is far above the usual at its load.

    For what gets dearer slowly or for good, where no single hour stands out. Days are judged
    by their cost over what their hours would have cost usually. Where history is long enough
    its older half is what is usual: the newer one may have risen already. ``at_s`` of what is
    found is the start of its last day, ``value`` the cost of a unit.
    """
    days: dict[int, list[Work]] = {}
    for work in hours:
        days.setdefault(day_start_s(work.at_s), []).append(work)
    known = sorted(days)
    if len(known) <= recent:
        return None
    before = _history(known[:-recent], history_max, by)
    usual = UsualCost(work for day in before for work in days[day])
    late = known[-recent:]
    ratios = [Point(day, usual.ratio(days[day], day)) for day in before]
    now = median([usual.ratio(days[day], day) for day in late])
    # What was free, or alone, says nothing.
    found = _judge(Point(known[-1], now), [point for point in ratios if point.value], by)
    if found is None:
        return None
    last = [work for day in late for work in days[day]]
    value = sum(work.cost for work in last) / sum(work.units for work in last)
    return Anomaly(found.at_s, value, value / found.ratio, found.ratio, found.score)


def dearer_at_load(
    found: Sequence[Anomaly], hours: Sequence[Work], by: Sensitivity, history_max: int = 24 * 28
) -> list[Anomaly]:
    """Return those of the anomalies in a unit cost that its load does not explain.

    ``hours`` are the same one's, in the order of time. What is usual becomes what was so at
    a similar load; what has no load, or nothing before it, stays as it was found.
    """
    odd = {each.at_s for each in found}
    load_of = {work.at_s: work.load for work in hours if work.at_s in odd}
    kept: list[Anomaly] = []
    for each in found:
        before = [work for work in hours if work.at_s < each.at_s and work.at_s not in odd]
        load = load_of.get(each.at_s)
        usual = None if load is None else UsualCost(before[-history_max:]).at(load)
        if usual is None:
            kept.append(each)
        elif each.value >= by.ratio_min * usual:
            kept.append(Anomaly(each.at_s, each.value, usual, each.value / usual, each.score))
    return kept


def _history(days: Sequence[int], history_max: int, by: Sensitivity) -> Sequence[int]:
    days = days[-history_max:]
    return days[: len(days) // 2] if len(days) >= 2 * by.history_min else days


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
