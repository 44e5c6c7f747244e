"""Hours, days, weeks and months in UTC, from wall seconds and back, in whole numbers.

Source: H. Hinnant, "chrono-compatible low-level date algorithms".
"""

from __future__ import annotations

from typing import Final

NS_PER_S: Final = 10**9
PS_PER_S: Final = 10**12
HOUR_S: Final = 3600
HOUR_NS: Final = HOUR_S * NS_PER_S
DAY_S: Final = 86_400
WEEK_S: Final = 7 * DAY_S
# 1970-01-01 was a Thursday: the first Monday was on the 5th.
_FIRST_MONDAY_S: Final = 4 * DAY_S
_DAYS_OF_400_YEARS: Final = 146_097
_DAYS_TO_EPOCH: Final = 719_468


def day_start_s(wall_s: int) -> int:
    """Return when the day of ``wall_s`` began."""
    return wall_s // DAY_S * DAY_S


def week_start_s(wall_s: int) -> int:
    """Return when the week of ``wall_s`` began, on a Monday."""
    return (wall_s - _FIRST_MONDAY_S) // WEEK_S * WEEK_S + _FIRST_MONDAY_S


def month_start_s(wall_s: int) -> int:
    """Return when the month of ``wall_s`` began."""
    year, month = year_and_month(wall_s)
    return _days(year, month) * DAY_S


def next_month_start_s(wall_s: int) -> int:
    """Return when the month after that of ``wall_s`` begins."""
    year, month = year_and_month(wall_s)
    return (_days(year + 1, 1) if month == 12 else _days(year, month + 1)) * DAY_S


def year_and_month(wall_s: int) -> tuple[int, int]:
    """Return the year and the month, 1 to 12, of wall seconds."""
    days = wall_s // DAY_S + _DAYS_TO_EPOCH
    era, of_era = divmod(days, _DAYS_OF_400_YEARS)
    year = (of_era - of_era // 1460 + of_era // 36_524 - of_era // 146_096) // 365
    of_year = of_era - (365 * year + year // 4 - year // 100)
    from_march = (5 * of_year + 2) // 153
    month = from_march + 3 if from_march < 10 else from_march - 9
    return era * 400 + year + (month <= 2), month


def _days(year: int, month: int) -> int:
    """Return the days from the epoch to the first of a month."""
    year -= month <= 2
    era, of_era = divmod(year, 400)
    of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5
    return (
        era * _DAYS_OF_400_YEARS
        + of_era * 365
        + of_era // 4
        - of_era // 100
        + of_year
        - (_DAYS_TO_EPOCH)
    )
