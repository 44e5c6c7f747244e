"""Who and what costs unlike before: users by their hours and requests, models by their tokens.

Dollars are compared with dollars. Hours of which a part has no price are compared by engine
seconds with all hours before them, so that one unpriced hour hides nothing and spoils no other.
What a token or a request costs is compared with what it cost at a similar load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, TypeAlias

from sqlalchemy import Connection, func, select

from serve_app.config_costs import CostSettings
from serve_app.core.anomalies import (
    Anomaly,
    Point,
    Sensitivity,
    Work,
    dearer,
    dearer_at_load,
    jumps,
    median,
    outbreaks,
    usual_of,
)
from serve_app.core.calendar import DAY_S, HOUR_S, day_start_s
from serve_app.core.pricing import CURRENCY
from serve_app.ledger.cost_sums import (
    HourSums,
    Spent,
    hour_sums,
    loads_by_hour,
    tokens_by_hour,
)
from serve_app.ledger.schema import ENGINE_TIME
from serve_app.usage_report import UsageQuery, iso_time

HISTORY_S: Final = 28 * DAY_S
SECONDS: Final = "engine seconds"

# A user's hour, a user's requests, and a model's tokens, each against what they were.
_SPENDING: Final = Sensitivity(6.0, 4.0, history_min=24, history_span_s=7 * DAY_S)
_PER_REQUEST: Final = Sensitivity(6.0, 2.5, history_min=24, history_span_s=7 * DAY_S)
_UNIT_COST: Final = Sensitivity(score_min=4.0, ratio_min=1.3, history_min=5)
_REQUESTS_MIN: Final = 5
_RECENT_DAYS: Final = 2
# Who starts from nothing is nobody's concern below this part of what all spend in an hour.
_NEW_SHARE_MIN: Final = 0.1
_NANO: Final = 10**9

_Hours: TypeAlias = Mapping[int, Spent]


def anomalies(connection: Connection, query: UsageQuery, settings: CostSettings) -> dict[str, Any]:
    """Return who and what cost unlike before in the hours of ``query``: the last day's if open.

    Each finding says its ``unit``; the report's is that of whatever has a price.
    """
    latest = connection.execute(select(func.max(ENGINE_TIME.c.hour))).scalar_one() or 0
    until_s = query.to_s if query.to_s is not None else int(latest) + HOUR_S
    from_s = query.from_s if query.from_s is not None else until_s - DAY_S
    read = UsageQuery((), from_s - HISTORY_S, until_s)
    tokens = tokens_by_hour(connection, read)
    loads = loads_by_hour(connection, read, tokens)
    sums = hour_sums(connection, read, settings.prices(), loads)
    data = [*_of_users(sums, from_s), *_of_models(sums, tokens, from_s)]
    data.sort(key=lambda each: -each["score"])
    spent = [each for hours in sums.users.values() for each in hours.values()]
    priced = not spent or any(each.cost_nanousd is not None for each in spent)
    return {
        "object": "anomalies",
        **replace(query, from_s=from_s, to_s=until_s).window(),
        "unit": CURRENCY if priced else SECONDS,
        "data": data,
    }


def _of_users(sums: HourSums, from_s: int) -> Iterable[dict[str, Any]]:
    spent = [each for hours in sums.users.values() for each in hours.values()]
    some_unpriced = any(each.cost_nanousd is None for each in spent)
    for unit in (CURRENCY, SECONDS) if some_unpriced else (CURRENCY,):
        everybody = (point for hours in sums.users.values() for point in _points(unit, hours))
        others = [point for point in everybody if point.at_s < from_s and point.value > 0]
        others.sort(key=lambda point: point.at_s)
        usual = usual_of(others)
        news = replace(_SPENDING, value_min=_NEW_SHARE_MIN * _usual_of_all(others))
        for (tenant, user), hours in sorted(sums.users.items()):
            odd = _only(unit, hours)
            subject = f"{tenant}/{user}" if user else tenant
            hourly = _points(unit, hours)
            each = [
                Point(point.at_s, point.value / hours[point.at_s].requests)
                for point in hourly
                if hours[point.at_s].requests >= _REQUESTS_MIN
            ]
            for kind, found in (
                ("spending_per_hour", jumps(hourly, from_s, _SPENDING)),
                ("spending_from_nothing", outbreaks(hourly, from_s, usual, news)),
                ("cost_per_request", _dearer_requests(each, hours, from_s)),
            ):
                yield from _worst(kind, subject, unit, [one for one in found if odd(one.at_s)])


def _of_models(
    sums: HourSums, tokens: Mapping[tuple[str, int], int], from_s: int
) -> Iterable[dict[str, Any]]:
    for model, hours in sorted(sums.models.items()):
        # Without a load there is nothing to compare with.
        used = {
            at_s: each
            for at_s, each in hours.items()
            if tokens.get((model, at_s), 0) > 0 and each.load > 0
        }
        recent = sorted({day_start_s(at_s) for at_s in used})[-_RECENT_DAYS:]
        if not recent or recent[-1] < from_s - DAY_S:
            continue
        late = [each for at_s, each in used.items() if day_start_s(at_s) in recent]
        unit = CURRENCY if all(each.cost_nanousd is not None for each in late) else SECONDS
        work = [
            Work(point.at_s, used[point.at_s].load, tokens[model, point.at_s] / 10**6, point.value)
            for point in _points(unit, used)
        ]
        found = dearer(work, _RECENT_DAYS, _UNIT_COST)
        yield from _worst("cost_per_million_tokens", model, unit, [found] if found else [])


def _dearer_requests(each: Sequence[Point], hours: _Hours, from_s: int) -> list[Anomaly]:
    """Return the hours whose requests cost unlike before, and unlike at a similar load."""
    found = jumps(each, from_s, _PER_REQUEST)
    if not found:
        return []
    work = [
        Work(point.at_s, hours[point.at_s].load, 1.0, point.value)
        for point in each
        if hours[point.at_s].load > 0
    ]
    return dearer_at_load(found, work, _PER_REQUEST)


def _points(unit: str, hours: _Hours) -> list[Point]:
    """Return the values of hours in a unit, in the order of time; those that have one."""
    return [
        Point(at_s, value / _NANO)
        for at_s, spent in sorted(hours.items())
        if (value := spent.time_ns if unit == SECONDS else spent.cost_nanousd) is not None
    ]


def _only(unit: str, hours: _Hours) -> Callable[[int], bool]:
    """Return whether an hour is judged in a unit: in seconds if it has no price."""
    return lambda at_s: (hours[at_s].cost_nanousd is None) == (unit == SECONDS)


def _usual_of_all(points: Sequence[Point]) -> float:
    """Return what all together spend in the middle one of their hours."""
    whole: dict[int, float] = {}
    for point in points:
        whole[point.at_s] = whole.get(point.at_s, 0.0) + point.value
    return median(list(whole.values())) if whole else 0.0


def _worst(
    kind: str, subject: str, unit: str, found: Sequence[Anomaly]
) -> Iterable[dict[str, Any]]:
    if found:
        worst = max(found, key=lambda each: each.score)
        yield {
            "kind": kind,
            "subject": subject,
            "unit": unit,
            "at": iso_time(worst.at_s),
            "first_at": iso_time(found[0].at_s),
            "times": len(found),
            "value": worst.value,
            "usual": worst.usual,
            "ratio": round(worst.ratio, 3),
            "score": round(worst.score, 1),
        }
