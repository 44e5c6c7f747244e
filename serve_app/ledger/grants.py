"""What a new Control must know before it grants limits: its epoch, and who may hold some.

The epoch is a fence: it grows with each Control, and every write of an older one fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update

from serve_app.errors import StoreUnavailable
from serve_app.ledger.database import Database
from serve_app.ledger.schema import GRANT_EPOCH, GRANT_ROUTER, META

# As long as what a router used may still lie in a bucket of one minute.
_GONE_LATELY_S = 60.0
_STAMP_S = 10.0
_ALIVE = "grant_alive_s"


class Superseded(StoreUnavailable):
    """Another Control has begun since; this one may grant nothing any more."""


@dataclass(frozen=True, slots=True)
class Succession:
    """What a Control takes over: its epoch and the routers that may hold parts.

    ``gone_lately`` says that a router was lost within the last minute, ``alive_lately`` that
    the Control before was there within it.
    """

    epoch: int
    routers: tuple[str, ...]
    gone_lately: bool
    alive_lately: bool = False


class GrantStore:
    """The record in a SQL database. Synchronous: call it from a thread, not from a loop.

    Every method raises StoreUnavailable if the database fails.
    """

    def __init__(self, database: Database, wall_clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._wall_clock = wall_clock

    def begin(self) -> Succession:
        """Become the Control that grants; all before it are superseded."""
        now_s = self._wall_clock()
        lately_s = now_s - _GONE_LATELY_S
        gone = GRANT_ROUTER.c.gone_at_s
        with self._database.transaction() as connection:
            epoch_row = META.c.name == GRANT_EPOCH
            connection.execute(update(META).where(epoch_row).values(value=META.c.value + 1))
            epoch = int(connection.execute(select(META.c.value).where(epoch_row)).scalar_one())
            connection.execute(delete(GRANT_ROUTER).where(gone < lately_s))
            rows = connection.execute(select(GRANT_ROUTER.c.router, gone)).all()
            alive_s = _alive_s(connection)
            _stamp(connection, now_s)
        routers = tuple(row.router for row in rows if row.gone_at_s is None)
        gone_lately = any(row.gone_at_s is not None for row in rows)
        return Succession(epoch, routers, gone_lately, alive_s >= lately_s)

    def add(self, router: str, epoch: int) -> None:
        """Record that a router may hold parts from now on.

        Raises:
            Superseded: another Control has begun.
        """
        with fenced(self._database, epoch) as connection:
            connection.execute(delete(GRANT_ROUTER).where(GRANT_ROUTER.c.router == router))
            connection.execute(insert(GRANT_ROUTER).values(router=router, gone_at_s=None))

    def remove(self, router: str, epoch: int, *, lost: bool) -> None:
        """Record that a router holds nothing any more; ``lost`` if it gave nothing back.

        Raises:
            Superseded: another Control has begun.
        """
        now_s = self._wall_clock()
        with fenced(self._database, epoch) as connection:
            of_router = GRANT_ROUTER.c.router == router
            if lost:
                connection.execute(update(GRANT_ROUTER).where(of_router).values(gone_at_s=now_s))
            else:
                connection.execute(delete(GRANT_ROUTER).where(of_router))
            connection.execute(
                delete(GRANT_ROUTER).where(GRANT_ROUTER.c.gone_at_s < now_s - _GONE_LATELY_S)
            )

    def is_latest(self, epoch: int) -> bool:
        """Tell whether this is still the Control that grants; note now and then that it is."""
        now_s = self._wall_clock()
        with self._database.transaction() as connection:
            query = select(META.c.value).where(META.c.name == GRANT_EPOCH)
            if connection.execute(query).scalar_one() != epoch:
                return False
            if not 0 <= now_s - _alive_s(connection) < _STAMP_S:
                _stamp(connection, now_s)
            return True


@contextmanager
def fenced(database: Database, epoch: int) -> Iterator[Connection]:
    """Open a transaction that holds the epoch's row, if that is still ``epoch``.

    Raises:
        Superseded: another Control has begun.
    """
    with database.transaction() as connection:
        held = connection.execute(
            update(META)
            .where(META.c.name == GRANT_EPOCH, META.c.value == epoch)
            .values(value=META.c.value)
        )
        if held.rowcount != 1:
            raise Superseded("another Control grants limits")
        yield connection


def _alive_s(connection: Connection) -> int:
    """Return when a Control was last there, wall seconds; 0 if there never was one."""
    query = select(META.c.value).where(META.c.name == _ALIVE)
    return connection.execute(query).scalar_one_or_none() or 0


def _stamp(connection: Connection, now_s: float) -> None:
    at_s = int(now_s)
    stamped = connection.execute(update(META).where(META.c.name == _ALIVE).values(value=at_s))
    if not stamped.rowcount:
        connection.execute(insert(META).values(name=_ALIVE, value=at_s))
