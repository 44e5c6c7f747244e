"""Where engines' time went: replicas' periods, and whose it was, by the hour.

Periods are facts, each committed once; ``replica_hour`` and ``engine_time`` are derived, in
the ledger's own transactions, rebuilt and checked like the rollups of usage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from sqlalchemy import Column, Connection, Select, case, delete, func, insert, select, tuple_

from serve_app.core.types import Outcome
from serve_app.ledger.schema import (
    DIMENSIONS,
    ENGINE_TIME,
    PROVISIONAL_NS,
    REPLICA_HOUR,
    REPLICA_PERIOD,
    USAGE_EVENT,
    USES_NS,
)
from serve_app.ledger.statements import some_at_a_time, upsert
from serve_app.usage import ReplicaPeriod, Witness

_TIME_KEY: Final = ("hour", "replica", *DIMENSIONS)
_TIME_SUMS: Final = ("requests", "engine_ns", "wasted_ns", "kv_block_us")
_HOUR_KEY: Final = ("hour", "replica")
_PLACE: Final = ("pool", "node", "instance", "gpus")
_TIMES: Final = (*USES_NS, PROVISIONAL_NS)


def add_engine_time(connection: Connection, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add new rows of usage_event: those of engines that measured."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        if row["witness"] != Witness.ENGINE or not row["engine_ns"]:
            continue
        key = (row["engine_hour"], row["replica"], *(row[name] for name in DIMENSIONS))
        wasted_ns = 0 if row["outcome"] == Outcome.COMPLETED else row["engine_ns"]
        found = sums.setdefault(key, [0] * len(_TIME_SUMS))
        for place, value in enumerate((1, row["engine_ns"], wasted_ns, row["kv_block_us"])):
            found[place] += value
    if sums:
        new = upsert(connection, ENGINE_TIME)
        added = {name: ENGINE_TIME.c[name] + new.excluded[name] for name in _TIME_SUMS}
        statement = new.on_conflict_do_update(index_elements=_TIME_KEY, set_=added)
        names = (*_TIME_KEY, *_TIME_SUMS)
        rows = [dict(zip(names, (*key, *sums[key]), strict=True)) for key in sorted(sums)]
        connection.execute(statement, rows)


def add_periods(connection: Connection, periods: Sequence[ReplicaPeriod], now_s: float) -> int:
    """Add the periods that are not there yet; return how many were new."""
    known = _known(connection, periods)
    rows: list[dict[str, Any]] = []
    for period in periods:
        key = (period.replica, period.number)
        if key not in known:
            known.add(key)
            rows.append(_period_row(period, now_s))
    if rows:
        connection.execute(insert(REPLICA_PERIOD), rows)
        new = upsert(connection, REPLICA_HOUR)
        held, more = REPLICA_HOUR.c, new.excluded
        # Not MIN and MAX of SQL, which SQLite and PostgreSQL name differently.
        bounds = {
            "from_ns": case((held.from_ns < more.from_ns, held.from_ns), else_=more.from_ns),
            "until_ns": case((held.until_ns > more.until_ns, held.until_ns), else_=more.until_ns),
        }
        added = {name: held[name] + more[name] for name in _TIMES}
        statement = new.on_conflict_do_update(index_elements=_HOUR_KEY, set_=bounds | added)
        names = {column.name for column in REPLICA_HOUR.columns}
        connection.execute(
            statement, [{name: row[name] for name in row if name in names} for row in rows]
        )
    return len(rows)


def rebuild_engine_time(connection: Connection) -> None:
    """Make both anew from events and periods."""
    connection.execute(delete(ENGINE_TIME))
    names = [*_TIME_KEY, *_TIME_SUMS]
    connection.execute(insert(ENGINE_TIME).from_select(names, _time_of_events()))
    connection.execute(delete(REPLICA_HOUR))
    names = [column.name for column in REPLICA_HOUR.columns]
    connection.execute(insert(REPLICA_HOUR).from_select(names, _hours_of_periods()))


def engine_time_differences(connection: Connection) -> Iterator[str]:
    """Yield a line for each derived row that is not what events and periods say."""
    for what, table, key, source in (
        ("engine_time", ENGINE_TIME, len(_TIME_KEY), _time_of_events()),
        ("replica_hour", REPLICA_HOUR, len(_HOUR_KEY), _hours_of_periods()),
    ):
        expected = {tuple(row[:key]): _plain(row[key:]) for row in connection.execute(source)}
        for row in connection.execute(select(table)):
            wanted = expected.pop(tuple(row[:key]), None)
            if wanted != _plain(row[key:]):
                where = "/".join(str(part) for part in row[:key])
                yield f"{what} {where}: {_plain(row[key:])}, not {wanted}"
        for missing in expected:
            yield f"{what} {'/'.join(str(part) for part in missing)}: missing"


def _plain(values: Iterable[Any]) -> tuple[Any, ...]:
    # PostgreSQL's sums are of its arbitrary-precision type.
    return tuple(value if isinstance(value, str | float) else int(value) for value in values)


def _time_of_events() -> Select[Any]:
    event = USAGE_EVENT.c
    keys: list[Column[Any]] = [event.engine_hour, event.replica]
    keys += [event[name] for name in DIMENSIONS]
    wasted_ns = case((event.outcome == Outcome.COMPLETED.value, 0), else_=event.engine_ns)
    sums = (
        *(func.count(), func.sum(event.engine_ns)),
        *(func.sum(wasted_ns), func.sum(event.kv_block_us)),
    )
    measured = (event.witness == Witness.ENGINE.value) & (event.engine_ns > 0)
    return select(*keys, *sums).where(measured).group_by(*keys)


def _hours_of_periods() -> Select[Any]:
    period = REPLICA_PERIOD.c
    # A replica stays where it is.
    place = [func.max(period[name]) for name in _PLACE]
    bounds = (func.min(period.from_ns), func.max(period.until_ns))
    sums = [func.sum(period[name]) for name in _TIMES]
    keys = (period.hour, period.replica)
    return select(*keys, *place, *bounds, *sums).group_by(*keys)


def _known(connection: Connection, periods: Sequence[ReplicaPeriod]) -> set[tuple[str, int]]:
    names = REPLICA_PERIOD.c.replica, REPLICA_PERIOD.c.number
    keys = [(period.replica, period.number) for period in periods]
    known: set[tuple[str, int]] = set()
    for some in some_at_a_time(keys):
        found = connection.execute(select(*names).where(tuple_(*names).in_(some)))
        known.update((row.replica, row.number) for row in found)
    return known


def _period_row(period: ReplicaPeriod, now_s: float) -> dict[str, Any]:
    return {
        "replica": period.replica,
        "number": period.number,
        "hour": period.hour,
        "pool": period.pool,
        "node": period.node[:253],
        "instance": period.instance,
        "gpus": period.gpus,
        "from_ns": period.from_ns,
        "until_ns": period.until_ns,
        "recorded_at_s": now_s,
        PROVISIONAL_NS: period.provisional_ns,
        **{name: period.uses_ns.get(name.removesuffix("_ns"), 0) for name in USES_NS},
    }
