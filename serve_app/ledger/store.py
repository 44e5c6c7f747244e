"""Where keys are kept: a small SQL store that several processes may use at once.

The version of the key table grows with every change, in the change's own transaction.
Every write raises the version first: that takes the row lock (PostgreSQL) or the write
lock (SQLite) before anything is read, so that two writers queue instead of deadlocking.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Row, create_engine, event, insert, select, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.schema import CreateTable

from serve_app.core.types import KeyId, PriorityClass, TenantId, UserId
from serve_app.errors import ConfigError, StoreUnavailable
from serve_app.keys import KeyRecord, KeyTable, KeyWish, new_key
from serve_app.ledger.schema import API_KEY, KEY_TABLE_VERSION, META, METADATA

_BUSY_TIMEOUT_S = 10.0
_CREATE_ATTEMPTS = 3


class KeyStore:
    """API keys in a SQL database. Synchronous: call it from a thread, not from a loop.

    Every method raises StoreUnavailable if the database fails.
    """

    def __init__(self, url: str, wall_clock: Callable[[], float] = time.time) -> None:
        """Open the database at ``url`` and create what is missing.

        ``place`` then names it, without a password; ``is_new`` tells whether its file was
        made just now: a relative path is one of the working directory, so a caller who
        expected keys there may be in the wrong one.

        Raises:
            ConfigError: the URL is malformed, its driver is not installed, or the folder
                of an SQLite file cannot be made.
        """
        self._wall_clock = wall_clock
        parsed = _parse(absolute_url(url, Path.cwd()))
        self.place = parsed.render_as_string(hide_password=True)
        self.is_new = parsed.get_backend_name() == "sqlite" and _prepare_file(parsed)
        self._engine = _engine(parsed)
        self._create_tables()

    def create(self, wish: KeyWish) -> tuple[str, KeyRecord]:
        """Make a key and keep its record; return its secret, which is kept nowhere."""
        secret, record = new_key(wish, self._wall_clock())
        self.add(record)
        return secret, record

    def add(self, record: KeyRecord) -> None:
        """Keep a record that was made elsewhere.

        Raises:
            ValueError: a key with this id or this digest exists.
        """
        try:
            with self._change() as connection:
                connection.execute(insert(API_KEY).values(_row(record)))
        except IntegrityError as error:
            raise ValueError(f"a key with the id {record.key_id!r} exists") from error

    def revoke(self, key_id: str) -> KeyRecord | None:
        """Revoke a key for good and return its record, or None if there is none.

        Revoking twice keeps the first time.
        """
        of_key = API_KEY.c.key_id == key_id
        with self._change() as connection:
            connection.execute(
                update(API_KEY)
                .where(of_key, API_KEY.c.revoked_at_s.is_(None))
                .values(revoked_at_s=self._wall_clock())
            )
            row = connection.execute(select(API_KEY).where(of_key)).first()
            return None if row is None else _record(row)

    def list(self) -> list[KeyRecord]:
        """Return every key, revoked ones too, oldest first."""
        with self._transaction() as connection:
            return _records(connection)

    def version(self) -> int:
        """Return the version of the key table: one indexed row, cheap enough to poll."""
        with self._transaction() as connection:
            return _version(connection)

    def snapshot(self) -> KeyTable:
        """Return all keys and the version they have at least.

        The version is read first: a change that slips in between is then newer than the
        table says, and the next comparison of versions fetches it again.
        """
        with self._transaction() as connection:
            version = _version(connection)
            return KeyTable(_records(connection), version)

    def close(self) -> None:
        """Close every connection. Idempotent."""
        self._engine.dispose()

    def _create_tables(self) -> None:
        """Create what is missing, though another process may be doing the same."""
        for attempt in range(1, _CREATE_ATTEMPTS + 1):
            try:
                with self._transaction() as connection:
                    for table in METADATA.sorted_tables:
                        connection.execute(CreateTable(table, if_not_exists=True))
                    known = select(META.c.value).where(META.c.name == KEY_TABLE_VERSION)
                    if connection.execute(known).first() is None:
                        first = {"name": KEY_TABLE_VERSION, "value": 0}
                        connection.execute(insert(META).values(first))
                return
            except IntegrityError as error:
                if attempt == _CREATE_ATTEMPTS:
                    raise StoreUnavailable(f"{self.place}: {error.orig}") from error

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        with self._transaction() as connection:
            connection.execute(
                update(META).where(META.c.name == KEY_TABLE_VERSION).values(value=META.c.value + 1)
            )
            yield connection

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise StoreUnavailable(f"{self.place}: {error.orig}") from error


def absolute_url(url: str, folder: Path) -> str:
    """Return a database URL whose SQLite file does not depend on the working directory.

    A relative path is taken from ``folder``; other databases are returned as they are.

    Raises:
        ConfigError: the URL is malformed.
    """
    parsed = _parse(url)
    path = parsed.database
    if parsed.get_backend_name() != "sqlite" or not path or path == ":memory:":
        return url
    absolute = str((folder / Path(path).expanduser()).absolute())
    return parsed.set(database=absolute).render_as_string(hide_password=False)


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except ArgumentError:
        raise ConfigError(
            "the database is not a URL; write sqlite:///relative/path.db, "
            "sqlite:////absolute/path.db or postgresql+psycopg://user:password@host/name"
        ) from None


def _prepare_file(url: URL) -> bool:
    """Make the folder and the file, readable by this user only; tell whether it was missing."""
    if not url.database or url.database == ":memory:":
        raise ConfigError("the database must be a file: several processes share it")
    path = Path(url.database)
    is_new = not path.exists()
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise ConfigError(f"the database {path} cannot be opened: {error.strerror}") from error
    return is_new


def _engine(url: URL) -> Engine:
    is_sqlite = url.get_backend_name() == "sqlite"
    arguments: dict[str, Any] = {"timeout": _BUSY_TIMEOUT_S} if is_sqlite else {}
    try:
        engine = create_engine(url, connect_args=arguments, pool_pre_ping=not is_sqlite)
    except (ArgumentError, ImportError) as error:
        raise ConfigError(f"the database driver of {url.drivername!r}: {error}") from error
    if is_sqlite:
        event.listen(engine, "connect", _durable_sqlite)
    return engine


def _durable_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _version(connection: Connection) -> int:
    query = select(META.c.value).where(META.c.name == KEY_TABLE_VERSION)
    return int(connection.execute(query).scalar_one())


def _records(connection: Connection) -> list[KeyRecord]:
    query = select(API_KEY).order_by(API_KEY.c.created_at_s, API_KEY.c.key_id)
    return [_record(row) for row in connection.execute(query)]


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
    )
