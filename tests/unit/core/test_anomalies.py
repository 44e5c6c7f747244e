"""Jumps and rises against one's own history; nothing where nothing happened."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from serve_app.core.anomalies import (
    Point,
    Sensitivity,
    UsualCost,
    Work,
    dearer,
    dearer_at_load,
    deviation,
    jumps,
    median,
    outbreaks,
    usual_of,
)

HOUR_S = 3600
DAY_S = 24 * HOUR_S
BY = Sensitivity(score_min=6.0, ratio_min=3.0, history_min=24)
HOURLY = replace(BY, ratio_min=4.0, history_span_s=7 * 24 * HOUR_S)


def month(seed: int) -> list[Point]:
    """Return hourly values of a user with days, nights, weekends and heavy-tailed requests."""
    chance = random.Random(seed)
    points = []
    for index in range(24 * 30):
        of_day = 1.0 if 8 <= index % 24 < 20 else 0.3
        of_week = 1.0 if index // 24 % 7 < 5 else 0.4
        count = round(30 * of_day * of_week * chance.uniform(0.6, 1.4))
        value = sum(chance.lognormvariate(0, 0.7) for _ in range(count))
        points.append(Point(index * HOUR_S, value))
    return points


@pytest.mark.parametrize("seed", range(20))
def test_a_quiet_month_gives_no_alarm(seed: int) -> None:
    assert jumps(month(seed), 0, HOURLY) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_runaway_agent_is_found_in_its_first_hour_and_stays_found(seed: int) -> None:
    points = month(seed)
    start = 24 * 28
    loud = [Point(each.at_s, each.value * 12) for each in points[start : start + 20]]
    found = jumps(points[:start] + loud, start * HOUR_S, HOURLY)
    day = [each for each in found if 8 <= each.at_s // HOUR_S % 24 < 20]
    assert len(day) == 12
    assert all(each.ratio > 4 for each in day)


def test_wild_hours_of_the_past_hide_no_jump() -> None:
    values = [1.0, 1.1, 0.9, 1.2] * 12
    values[5] = values[17] = values[30] = 500.0
    points = [Point(place, value) for place, value in enumerate([*values, 8.0])]
    found = jumps(points, len(values), BY)
    assert [(each.value, each.usual) for each in found] == [(8.0, 1.1)]


def test_what_lasts_becomes_usual_after_a_quarter_of_the_history() -> None:
    points = [Point(place, 1.0 if place < 100 else 10.0) for place in range(300)]
    found = jumps(points, 0, BY, history_max=80)
    assert found[0].at_s == 100
    assert found[-1].at_s < 200


def test_what_runs_away_is_not_its_own_history() -> None:
    points = [Point(place, 1.0 if place < 30 else 10.0) for place in range(90)]
    assert [each.usual for each in jumps(points, 0, BY)] == [1.0] * 60


def test_without_history_or_worth_or_a_usual_value_nothing_is_odd() -> None:
    short = [Point(place, 1.0) for place in range(23)]
    assert jumps([*short, Point(23, 99.0)], 0, BY) == []
    flat = [Point(place, 0.0) for place in range(50)]
    assert jumps([*flat, Point(50, 9.0)], 0, BY) == []
    night = [Point(place, 1.0) for place in range(50)]
    assert jumps([*night, Point(50, 9.0)], 0, replace(BY, history_span_s=60)) == []
    small = [Point(place, 0.001) for place in range(50)]
    dear = Sensitivity(value_min=0.1)
    assert jumps([*small, Point(50, 0.05)], 0, dear) == []


HOURS = [Point(place, 1.0 + place % 3 / 10) for place in range(60)]
OTHERS = usual_of(HOURS)


def test_who_starts_from_nothing_is_judged_by_what_others_spend() -> None:
    found = outbreaks([Point(60, 1.2), Point(61, 50.0)], 60, OTHERS, BY)
    assert [(each.at_s, each.usual) for each in found] == [(61, 1.1)]
    assert outbreaks([Point(61, 50.0)], 60, OTHERS, replace(BY, value_min=51.0)) == []
    never = [Point(place, 0.0) for place in range(60)]
    assert outbreaks([*never, Point(61, 50.0)], 60, OTHERS, BY)


def test_who_has_a_usual_value_is_not_judged_by_others_and_nobody_is_where_there_are_none() -> None:
    own = [Point(place, 9.0) for place in range(60)]
    assert outbreaks([*own, Point(61, 50.0)], 60, OTHERS, BY) == []
    assert outbreaks([Point(61, 50.0)], 60, usual_of(HOURS[:20]), BY) == []
    assert outbreaks([Point(61, 50.0)], 60, usual_of([]), BY) == []
    assert outbreaks([Point(59, 50.0)], 60, OTHERS, BY) == []


def test_the_middle_and_the_deviation_of_few_values() -> None:
    assert median([3.0, 1.0]) == 2.0
    assert median([3.0, 1.0, 9.0]) == 3.0
    assert deviation([2.0, 2.0, 2.0]) == pytest.approx(0.1)
    assert deviation([1.0, 2.0, 3.0]) == pytest.approx(1.4826)


def work(at_s: int, load: float, times: float = 1.0) -> Work:
    """Return an hour whose unit costs what a batch's does: half the load, 1.7 times as much."""
    return Work(at_s, load, units=load, cost=times * load * (0.7 / load + 0.3))


def days(count: int, dear_from: int = 99, quiet_from: int = 99, times: float = 2.0) -> list[Work]:
    """Return hours of days and nights, dearer from one day on, much quieter from another."""
    chance = random.Random(4)
    return [
        work(
            index * HOUR_S,
            (1.0 if 8 <= index % 24 < 20 else 0.4)
            * (0.1 if index // 24 >= quiet_from else 1.0)
            * chance.uniform(0.8, 1.2),
            times if index // 24 >= dear_from else 1.0,
        )
        for index in range(24 * count)
    ]


UNIT = Sensitivity(score_min=4.0, ratio_min=1.3, history_min=5)


def test_what_a_unit_costs_is_compared_at_a_similar_load() -> None:
    usual = UsualCost(days(14))
    for load in (0.4, 1.0):
        assert usual.at(load) == pytest.approx(0.7 / load + 0.3, rel=0.03)
    # Never seen at so little: no more than in proportion; nor at so much: no less than ever.
    lowest = min(each.load for each in days(14))
    assert usual.at(lowest / 4) == pytest.approx(4 * (0.7 / lowest + 0.3), rel=0.1)
    highest = max(each.load for each in days(14))
    assert usual.at(4 * highest) == pytest.approx(0.7 / highest + 0.3, rel=0.1)
    assert UsualCost([]).at(1.0) is None
    assert UsualCost([work(5, 1.0)]).at(1.0, not_day_s=0) is None


def test_a_quiet_day_is_no_drift_and_a_drift_on_a_quiet_day_is_one() -> None:
    assert dearer(days(14), 2, UNIT) is None
    assert dearer(days(14, quiet_from=12), 2, UNIT) is None
    found = dearer(days(14, dear_from=12), 2, UNIT)
    assert found is not None
    assert found.ratio == pytest.approx(2.0, rel=0.1)
    assert found.at_s == 13 * 24 * HOUR_S
    both = dearer(days(14, dear_from=12, quiet_from=12, times=3.0), 2, UNIT)
    assert both is not None
    # Some of it may be what so little a load explains.
    assert 1.3 < both.ratio < 3.0
    assert dearer(days(5, dear_from=3), 2, UNIT) is None
    assert dearer(days(2), 2, UNIT) is None
    assert dearer([], 2, UNIT) is None


def test_an_hour_that_its_load_explains_is_no_jump_and_another_stays_one() -> None:
    by = replace(BY, ratio_min=2.5, history_min=24)
    for load, times, odd in ((0.1, 1.0, False), (1.0, 9.0, True)):
        hours = [*days(14), work(14 * 24 * HOUR_S, load, times)]
        points = [Point(each.at_s, each.cost / each.units) for each in hours]
        found = jumps(points, 14 * 24 * HOUR_S, by)
        assert len(found) == 1
        each_one = [Work(each.at_s, each.load, 1.0, each.cost / each.units) for each in hours]
        kept = dearer_at_load(found, each_one, by)
        assert bool(kept) is odd
        if kept:
            assert kept[0].usual == pytest.approx(1.0, rel=0.1)
            assert kept[0].ratio == pytest.approx(9.0, rel=0.1)
        # Nobody knows the load: it stays as it was found.
        assert dearer_at_load(found, [], by) == found


def test_a_slow_rise_is_found_where_no_single_day_stands_out() -> None:
    assert dearer(days(28), 2, UNIT) is None
    slow = [
        replace(each, cost=each.cost * (1 + max(0.0, each.at_s / DAY_S - 13) / 14))
        for each in days(28)
    ]
    found = dearer(slow, 2, UNIT)
    assert found is not None
    assert 1.5 < found.ratio < 2.2
