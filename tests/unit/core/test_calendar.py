"""Dates agree with the standard library's, leap years included."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.calendar import (
    day_start_s,
    month_start_s,
    next_month_start_s,
    week_start_s,
    year_and_month,
)

SECONDS = st.integers(0, 250_000_000_000)  # until the year 9892


@given(SECONDS)
def test_days_weeks_and_months_begin_where_the_calendar_says(wall_s: int) -> None:
    moment = datetime.fromtimestamp(wall_s, UTC)
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    first = day.replace(day=1)
    following = (first + timedelta(days=32)).replace(day=1)
    assert year_and_month(wall_s) == (moment.year, moment.month)
    assert day_start_s(wall_s) == day.timestamp()
    assert week_start_s(wall_s) == (day - timedelta(days=day.weekday())).timestamp()
    assert month_start_s(wall_s) == first.timestamp()
    assert next_month_start_s(wall_s) == following.timestamp()


def test_a_leap_day_belongs_to_february() -> None:
    leap = int(datetime(2028, 2, 29, 23, 59, 59, tzinfo=UTC).timestamp())
    assert month_start_s(leap) == datetime(2028, 2, 1, tzinfo=UTC).timestamp()
    assert next_month_start_s(leap) == leap + 1
