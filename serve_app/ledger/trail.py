"""The audit trail in the database: append-only, each row in its change's own transaction."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from sqlalchemy import Connection, Row, insert, or_, select, update

from serve_app.changes import Actor, Change, ChangeQuery, Fields, Via
from serve_app.ledger.database import Database
from serve_app.ledger.schema import ADMIN_CHANGE, ADMIN_CHANGE_NUMBER, META

LIMITS: Final = "limits"

_ACTOR_CHARACTERS: Final = 200
_SUBJECT_CHARACTERS: Final = 512
_NOTE_CHARACTERS: Final = 4000


def note_change(
    connection: Connection,
    by: Actor,
    action: str,
    subject: str,
    *,
    at_s: float,
    before: Fields | None,
    after: Fields | None,
    note: str = "",
) -> None:
    """Add a row to the trail, unless nothing changed. Values are JSON's, and no secrets.

    The last statement of a transaction that has raised its own counter: rows of counters are
    then always locked in one order.
    """
    if before == after:
        return
    counter = META.c.name == ADMIN_CHANGE_NUMBER
    connection.execute(update(META).where(counter).values(value=META.c.value + 1))
    number = connection.execute(select(META.c.value).where(counter)).scalar_one()
    connection.execute(
        insert(ADMIN_CHANGE).values(
            number=number,
            at_s=at_s,
            actor=by.name[:_ACTOR_CHARACTERS],
            via=by.via.value,
            action=action,
            subject=subject[:_SUBJECT_CHARACTERS],
            before_json=_json(before),
            after_json=_json(after),
            note=note.replace("\0", "")[:_NOTE_CHARACTERS],
        )
    )


class Trail:
    """Reads it, and keeps what limits the configuration sets. Synchronous: call it from a thread.

    Every method raises StoreUnavailable if the database fails.
    """

    def __init__(self, database: Database, wall_clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._wall_clock = wall_clock

    def changes(self, query: ChangeQuery) -> list[Change]:
        """Return the changes asked for, the latest first."""
        rows = select(ADMIN_CHANGE).order_by(ADMIN_CHANGE.c.number.desc()).limit(query.limit)
        if query.before is not None:
            rows = rows.where(ADMIN_CHANGE.c.number < query.before)
        if query.actor is not None:
            rows = rows.where(ADMIN_CHANGE.c.actor == query.actor)
        if query.subject is not None:
            subject = ADMIN_CHANGE.c.subject
            within = subject.startswith(f"{query.subject} ", autoescape=True)
            rows = rows.where(or_(subject == query.subject, within))
        with self._database.transaction() as connection:
            return [_change(row) for row in connection.execute(rows)]

    def note_limits(self, limits: Mapping[str, Any], by: Actor) -> bool:
        """Note what limits are in force, by path; tell whether that was a change.

        A row holds the paths that changed; all of them together are the limits in force.
        """
        with self._database.transaction() as connection:
            # Before anything is read: routers tell the same at the same time.
            counter = META.c.name == ADMIN_CHANGE_NUMBER
            connection.execute(update(META).where(counter).values(value=META.c.value))
            known: dict[str, Any] = {}
            query = select(ADMIN_CHANGE).where(ADMIN_CHANGE.c.subject == LIMITS)
            for row in connection.execute(query.order_by(ADMIN_CHANGE.c.number)):
                change = _change(row)
                for name in change.before or ():
                    known.pop(name, None)
                known.update(change.after or {})
            # As they come back from the database.
            told = json.loads(_json(limits) or "{}")
            before = {n: value for n, value in known.items() if told.get(n, ...) != value}
            after = {n: value for n, value in told.items() if known.get(n, ...) != value}
            note_change(
                connection,
                by,
                "limits.set",
                LIMITS,
                at_s=self._wall_clock(),
                before=before,
                after=after,
            )
            return before != after


def _json(fields: Fields | None) -> str | None:
    return None if fields is None else json.dumps(dict(fields), ensure_ascii=False)


def _change(row: Row[Any]) -> Change:
    return Change(
        row.number,
        row.at_s,
        Actor(row.actor, Via(row.via)),
        row.action,
        row.subject,
        None if row.before_json is None else json.loads(row.before_json),
        None if row.after_json is None else json.loads(row.after_json),
        row.note,
    )
