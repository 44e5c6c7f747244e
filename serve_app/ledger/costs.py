"""Replica-hours from the database, each split over its requests and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import groupby
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Row, func, or_, select

from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS, NS_PER_S
from serve_app.core.reconciliation import NodeBill, bills_by_node
from serve_app.core.true_cost import (
    HourCost,
    InstancePrice,
    NodePrices,
    Overhead,
    ReplicaHour,
    split_hour,
)
from serve_app.ledger.schema import ENGINE_TIME, NODE_BILL, REPLICA_HOUR
from serve_app.ledger.statements import upsert, within
from serve_app.usage_report import UsageQuery

_SUMMED: Final = ("requests", "engine_ns", "wasted_ns", "kv_block_us")


@dataclass(slots=True)
class CostTally:
    """What some requests, or some overhead, took and cost.

    ``wasted_nanousd`` is the part of requests that did not complete, ``unpriced_ns`` the
    part of ``time_ns`` whose price nobody knows and that is in no cost, ``provisional_ns``
    the part that default coefficients split over requests. ``kv_block_us`` is what requests
    held of the KV cache, in no cost either.
    """

    requests: int = 0
    time_ns: int = 0
    cost_nanousd: int = 0
    wasted_nanousd: int = 0
    unpriced_ns: int = 0
    provisional_ns: int = 0
    kv_block_us: int = 0

    def add(self, other: CostTally) -> None:
        """Take in another."""
        self.requests += other.requests
        self.time_ns += other.time_ns
        self.cost_nanousd += other.cost_nanousd
        self.wasted_nanousd += other.wasted_nanousd
        self.unpriced_ns += other.unpriced_ns
        self.provisional_ns += other.provisional_ns
        self.kv_block_us += other.kv_block_us


@dataclass(slots=True)
class Costs:
    """Costs of a stretch of time: by the key asked for, of the rest, and in all.

    ``idle`` is the nano-dollars of the idle part of the rest, by pool and hour.
    """

    rows: dict[tuple[Any, ...], CostTally]
    overheads: dict[Overhead, CostTally]
    fleet: CostTally
    idle: dict[tuple[str, int], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counts:
    """What some requests of a replica-hour had in it, beside their time."""

    requests: int
    wasted_ns: int
    kv_block_us: int


@dataclass(frozen=True, slots=True)
class SplitHour:
    """A replica-hour and what the requests of each key had in it."""

    cost: HourCost
    counts: Mapping[tuple[Any, ...], Counts]


def read_costs(
    connection: Connection,
    query: UsageQuery,
    columns: Sequence[str],
    instances: Mapping[str, InstancePrice],
) -> Costs:
    """Return what the hours of ``query`` cost, by ``columns`` of ENGINE_TIME.

    Every amount is of whole nano-dollars; rows and overheads add up to the fleet exactly.
    """
    costs = Costs({}, {each: CostTally() for each in Overhead}, CostTally())
    for hour in split_hours(connection, query, columns, instances):
        unpriced = hour.cost.cost_nanousd is None
        fleet = CostTally(time_ns=hour.cost.lasted_ns, cost_nanousd=hour.cost.cost_nanousd or 0)
        fleet.unpriced_ns = fleet.time_ns if unpriced else 0
        fleet.provisional_ns = hour.cost.hour.provisional_ns
        costs.fleet.add(fleet)
        for part in hour.cost.parts:
            tally = CostTally(time_ns=part.time_ns, cost_nanousd=part.cost_nanousd or 0)
            tally.unpriced_ns = tally.time_ns if unpriced else 0
            tally.provisional_ns = part.provisional_ns
            if isinstance(part.key, Overhead):
                costs.overheads[part.key].add(tally)
                if part.key is Overhead.IDLE:
                    place = hour.cost.hour.pool, hour.cost.hour.hour
                    costs.idle[place] = costs.idle.get(place, 0) + tally.cost_nanousd
                continue
            counts = hour.counts[part.key]
            tally.requests, tally.kv_block_us = counts.requests, counts.kv_block_us
            tally.wasted_nanousd = tally.cost_nanousd * counts.wasted_ns // max(1, part.time_ns)
            costs.rows.setdefault(part.key, CostTally()).add(tally)
    return costs


def split_hours(
    connection: Connection,
    query: UsageQuery,
    columns: Sequence[str],
    instances: Mapping[str, InstancePrice],
) -> Iterator[SplitHour]:
    """Yield every replica-hour of ``query`` split by ``columns``, in the order of time.

    Those without a request come last, in the order of time as well.
    """
    prices = NodePrices(instances, read_bills(connection, query))
    known = {(hour.hour, hour.replica): hour for hour in read_hours(connection, query)}
    for key, group in groupby(_engine_time(connection, query, columns), lambda row: row[:2]):
        rows = list(group)
        hour = known.pop((key[0], key[1]), None) or _unreported(connection, key[0], key[1])
        counts: dict[tuple[Any, ...], Counts] = {}
        times: list[tuple[tuple[Any, ...], int]] = []
        for row in rows:
            asked = tuple(row[2 : -len(_SUMMED)])
            sums = (row.requests, row.wasted_ns, row.kv_block_us)
            counts[asked] = Counts(*map(int, sums))
            times.append((asked, int(row.engine_ns)))
        yield SplitHour(split_hour(hour, times, prices), counts)
    for hour in known.values():
        yield SplitHour(split_hour(hour, (), prices), {})


def read_hours(connection: Connection, query: UsageQuery) -> list[ReplicaHour]:
    """Return the replica-hours of ``query``, in the order of time."""
    statement = within(select(REPLICA_HOUR), REPLICA_HOUR.c.hour, query)
    statement = statement.order_by(REPLICA_HOUR.c.hour, REPLICA_HOUR.c.replica)
    return [_hour(row) for row in connection.execute(statement)]


def read_bills(connection: Connection, query: UsageQuery) -> dict[tuple[int, str], NodeBill]:
    """Return what nodes were billed, by hour and node."""
    rows = connection.execute(within(select(NODE_BILL), NODE_BILL.c.hour, query))
    return {
        (row.hour, row.node): NodeBill(
            row.node,
            row.total_nanousd,
            None if row.gpu_ns is None else Fraction(row.gpu_ns, HOUR_NS),
        )
        for row in rows
    }


def write_bills(connection: Connection, hour: int, bills: Sequence[NodeBill], now_s: float) -> None:
    """Keep the bills of an hour as they were read now, in place of those read before.

    What a later reading does not say stays as it is: an amount, GPU-hours, or a node.
    """
    rows = [
        {
            "hour": hour,
            "node": bill.node[:253],
            "total_nanousd": bill.total_nanousd,
            "gpu_ns": None if bill.gpu_hours is None else int(bill.gpu_hours * HOUR_NS),
            "read_at_s": now_s,
        }
        for bill in bills_by_node(bills).values()
    ]
    if not rows:
        return
    new, before = upsert(connection, NODE_BILL), NODE_BILL.c
    read = new.excluded
    statement = new.on_conflict_do_update(
        index_elements=("hour", "node"),
        set_={
            "total_nanousd": read.total_nanousd,
            "gpu_ns": func.coalesce(read.gpu_ns, before.gpu_ns),
            "read_at_s": read.read_at_s,
        },
        where=or_(read.total_nanousd.is_not(None), before.total_nanousd.is_(None)),
    )
    connection.execute(statement, rows)


def _engine_time(
    connection: Connection, query: UsageQuery, columns: Sequence[str]
) -> Iterator[Row[Any]]:
    time = ENGINE_TIME.c
    keys: list[ColumnElement[Any]] = [time.hour, time.replica]
    # The hour may be asked for as well: under a name of its own.
    keys += [time[name].label(f"by_{name}") for name in columns]
    sums = [func.sum(time[name]).label(name) for name in _SUMMED]
    statement = within(select(*keys, *sums), time.hour, query)
    statement = statement.group_by(*keys).order_by(time.hour, time.replica)
    yield from connection.execute(statement)


def _hour(row: Row[Any]) -> ReplicaHour:
    uses = {use: int(getattr(row, f"{use.value}_ns")) for use in Use}
    return ReplicaHour(
        row.hour,
        row.replica,
        row.pool,
        row.node,
        row.instance,
        row.gpus,
        int(row.from_ns),
        int(row.until_ns),
        uses,
        int(row.provisional_ns),
    )


def _unreported(connection: Connection, hour: int, replica: str) -> ReplicaHour:
    """Return the account of an hour that has none yet: its requests prove time.

    The replica is what it was in the last hour that has one.
    """
    table = REPLICA_HOUR.c
    before = select(REPLICA_HOUR).where(table.replica == replica, table.hour < hour)
    row = connection.execute(before.order_by(table.hour.desc()).limit(1)).first()
    known = ReplicaHour(hour, replica, "", "", "", 0.0, 0, 0, {}) if row is None else _hour(row)
    begun_ns = hour * NS_PER_S
    return replace(
        known, hour=hour, from_ns=begun_ns, until_ns=begun_ns, uses_ns={}, provisional_ns=0
    )
