"""Where keys are kept: a small SQL store that several processes may use at once.

The version of the key table grows with every change, in the change's own transaction.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from serve_app.changes import PROGRAM, Actor
from serve_app.core.types import KeyId, PriorityClass, TenantId, UserId
from serve_app.keys import KeyRecord, KeyState, KeyTable, KeyWish, new_key, successor
from serve_app.ledger.database import Database
from serve_app.ledger.schema import API_KEY, KEY_TABLE_VERSION, META
from serve_app.ledger.trail import note_change


class KeyStore:
    """API keys in a SQL database. Synchronous: call it from a thread, not from a loop.

    Every method raises StoreUnavailable if the database fails.
    """

    def __init__(
        self, database: Database | str, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """Use a database, or open one by its URL; see Database for what that raises."""
        self._wall_clock = wall_clock
        self._database = Database(database) if isinstance(database, str) else database
        self.place = self._database.place
        self.is_new = self._database.is_new

    def create(self, wish: KeyWish, by: Actor = PROGRAM) -> tuple[str, KeyRecord]:
        """Make a key and keep its record; return its secret, which is kept nowhere."""
        secret, record = new_key(wish, self._wall_clock())
        self.add(record, by)
        return secret, record

    def add(self, record: KeyRecord, by: Actor = PROGRAM) -> None:
        """Keep a record that was made elsewhere.

        Raises:
            ValueError: a key with this id or this digest exists.
        """
        try:
            with self._change() as connection:
                connection.execute(insert(API_KEY).values(_row(record)))
                _note(connection, by, "key.create", record.created_at_s, after=record)
        except IntegrityError as error:
            raise ValueError(f"a key with the id {record.key_id!r} exists") from error

    def rotate(
        self, key_id: str, overlap_s: float, by: Actor = PROGRAM
    ) -> tuple[str, KeyRecord, KeyRecord] | None:
        """Make a key in another's place, which ends ``overlap_s`` from now if not earlier.

        Returns the new secret, the new key's record and the old one's; None if there is no
        such key or it is not valid any more.
        """
        now_s = self._wall_clock()
        of_key = API_KEY.c.key_id == key_id
        with self._change() as connection:
            row = connection.execute(select(API_KEY).where(of_key)).first()
            if row is None or _record(row).state(now_s) is not KeyState.VALID:
                return None
            before = _record(row)
            secret, record = new_key(successor(before, now_s), now_s)
            ends_s = min(now_s + overlap_s, before.expires_at_s or inf)
            after = replace(before, expires_at_s=ends_s)
            connection.execute(insert(API_KEY).values(_row(record)))
            connection.execute(update(API_KEY).where(of_key).values(expires_at_s=ends_s))
            _note(connection, by, "key.create", now_s, after=record)
            _note(connection, by, "key.rotate", now_s, before=before, after=after)
            return secret, record, after

    def revoke(self, key_id: str, by: Actor = PROGRAM) -> KeyRecord | None:
        """Revoke a key for good and return its record, or None if there is none.

        Revoking twice keeps the first time.
        """
        of_key = API_KEY.c.key_id == key_id
        with self._change() as connection:
            row = connection.execute(select(API_KEY).where(of_key)).first()
            if row is None:
                return None
            before = _record(row)
            if before.revoked_at_s is not None:
                return before
            now_s = self._wall_clock()
            after = replace(before, revoked_at_s=now_s)
            connection.execute(update(API_KEY).where(of_key).values(revoked_at_s=now_s))
            _note(connection, by, "key.revoke", now_s, before=before, after=after)
            return after

    def list(self) -> list[KeyRecord]:
        """Return every key, revoked ones too, oldest first."""
        with self._database.transaction() as connection:
            return _records(connection)

    def version(self) -> int:
        """Return the version of the key table: one indexed row, cheap enough to poll."""
        with self._database.transaction() as connection:
            return _version(connection)

    def snapshot(self) -> KeyTable:
        """Return all keys and the version they have at least.

        The version is read first: a change that slips in between is then newer than the
        table says, and the next comparison of versions fetches it again.
        """
        with self._database.transaction() as connection:
            version = _version(connection)
            return KeyTable(_records(connection), version)

    def close(self) -> None:
        """Close every connection. Idempotent."""
        self._database.close()

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        with self._database.change(KEY_TABLE_VERSION) as connection:
            yield connection


def _note(
    connection: Connection,
    by: Actor,
    action: str,
    at_s: float,
    *,
    before: KeyRecord | None = None,
    after: KeyRecord,
) -> None:
    told = None if before is None else _told(before)
    subject = f"key {after.key_id}"
    note_change(connection, by, action, subject, at_s=at_s, before=told, after=_told(after))


def _version(connection: Connection) -> int:
    query = select(META.c.value).where(META.c.name == KEY_TABLE_VERSION)
    return int(connection.execute(query).scalar_one())


def _records(connection: Connection) -> list[KeyRecord]:
    query = select(API_KEY).order_by(API_KEY.c.created_at_s, API_KEY.c.key_id)
    return [_record(row) for row in connection.execute(query)]


def _told(record: KeyRecord) -> dict[str, object]:
    """Return a key as the audit trail tells it: no digest."""
    return {
        "name": record.name,
        "tenant": record.tenant,
        "user": record.user,
        "admin": record.admin,
        "priority_ceiling": record.priority_ceiling.name.lower(),
        "models": None if record.models is None else list(record.models),
        "expires_at_s": record.expires_at_s,
        "revoked_at_s": record.revoked_at_s,
    }


def _row(record: KeyRecord) -> dict[str, object]:
    return {
        "key_id": record.key_id,
        "name": record.name,
        "digest": record.digest.hex(),
        "tenant": record.tenant,
        "user_id": record.user,
        "admin": record.admin,
        "priority_ceiling": int(record.priority_ceiling),
        "models_json": None if record.models is None else json.dumps(record.models),
        "created_at_s": record.created_at_s,
        "expires_at_s": record.expires_at_s,
        "revoked_at_s": record.revoked_at_s,
        "account": record.account,
    }


def _record(row: Row[Any]) -> KeyRecord:
    models = row.models_json
    return KeyRecord(
        key_id=KeyId(row.key_id),
        name=row.name,
        digest=bytes.fromhex(row.digest),
        tenant=TenantId(row.tenant),
        created_at_s=row.created_at_s,
        user=None if row.user_id is None else UserId(row.user_id),
        admin=bool(row.admin),
        priority_ceiling=PriorityClass(row.priority_ceiling),
        models=None if models is None else tuple(json.loads(models)),
        expires_at_s=row.expires_at_s,
        revoked_at_s=row.revoked_at_s,
        account=None if row.account is None else KeyId(row.account),
    )
