"""One database, opened: where it is, its schema brought up to date, its transactions.

SQLite (write-ahead log, every commit on the disk) and PostgreSQL behind the same SQLAlchemy
Core statements. The schema is made by the migrations in ``migrations/`` only, when a
database is opened, by whichever process comes first.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, update
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from serve_app.errors import ConfigError, StoreUnavailable
from serve_app.ledger.schema import META, REVISION

_BUSY_TIMEOUT_S = 10.0
_BUSY_PAUSE_S = 0.02
# A server whose machine went says nothing: without these a connection to it is waited for two
# minutes, and an answer on one that was open a quarter of an hour. What the URL says holds.
_POSTGRESQL: Final = {
    "connect_timeout": 5,  # s
    "keepalives_idle": 10,  # s without a word
    "keepalives_interval": 5,  # s
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,  # ms for what was sent to be acknowledged
}
_SQLITE: Final = "sqlite"
# Any number that others who share the server are unlikely to lock.
_MIGRATION_LOCK: Final = 0x68656164


class Database:
    """A database at one URL. Synchronous and thread-safe; every method blocks."""

    def __init__(self, url: str) -> None:
        """Open the database at ``url`` and bring its schema up to date.

        ``place`` then names it, without a password; ``is_new`` tells whether its file was
        made just now: a relative path is one of the working directory, so a caller who
        expected something there may be in the wrong one.

        Raises:
            ConfigError: the URL is malformed, its driver is not installed, or the folder
                of an SQLite file cannot be made.
            StoreUnavailable: it cannot be reached, or it is newer than this program.
        """
        parsed = _parse(absolute_url(url, Path.cwd()))
        self.place = parsed.render_as_string(hide_password=True)
        self.is_sqlite = parsed.get_backend_name() == _SQLITE
        self.is_new = self.is_sqlite and _prepare_file(parsed)
        self.engine = _engine(parsed)
        if not self._is_current():
            self.migrate("head")

    @contextmanager
    def change(self, counter: str) -> Iterator[Connection]:
        """Open a transaction that raises ``counter`` first, one of schema.COUNTERS.

        That takes the row's lock (PostgreSQL) or the write lock (SQLite) before anything
        is read, so that two writers queue instead of deadlocking, and what one has read
        is still true when it writes.
        """
        with self.transaction() as connection:
            connection.execute(
                update(META).where(META.c.name == counter).values(value=META.c.value + 1)
            )
            yield connection

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction that is committed when the block ends, and else rolled back.

        Raises:
            StoreUnavailable: the database failed. IntegrityError stays as it is.
        """
        try:
            with self.engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            raise StoreUnavailable(f"{self.place}: {error.orig}") from error

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Open a transaction in which every statement reads the same state."""
        with self.transaction() as connection:
            if self.is_sqlite:
                # The driver opens a transaction for writes only.
                connection.exec_driver_sql("BEGIN")
            else:
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            yield connection

    def migrate(self, revision: str) -> None:
        """Bring the schema up or down to a revision, in one transaction.

        ``revision`` is Alembic's: ``head``, ``base`` (nothing is left) or an identifier.

        Raises:
            StoreUnavailable: the database failed or holds a revision not known here.
        """
        from alembic.util import CommandError

        from serve_app.ledger.migrate import migrate

        try:
            with self.transaction() as connection:
                if self.is_sqlite:
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                else:
                    connection.exec_driver_sql(
                        f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})"
                    ).close()
                migrate(connection, revision)
        except CommandError as error:
            raise StoreUnavailable(
                f"{self.place}: its schema cannot be brought to {revision}: {error}; was it "
                "written by a newer version of headrace?"
            ) from error

    def close(self) -> None:
        """Close every connection. Idempotent."""
        self.engine.dispose()

    def _is_current(self) -> bool:
        """Tell whether the schema is the present one: spares commands Alembic's import."""
        with self.transaction() as connection:
            if not self.engine.dialect.has_table(connection, "alembic_version"):
                return False
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
            return found is not None and found[0] == REVISION


def absolute_url(url: str, folder: Path) -> str:
    """Return a database URL whose SQLite file does not depend on the working directory.

    A relative path is taken from ``folder``; other databases are returned as they are.

    Raises:
        ConfigError: the URL is malformed.
    """
    parsed = _parse(url)
    path = parsed.database
    if parsed.get_backend_name() != _SQLITE or not path or path == ":memory:":
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
    is_sqlite = url.get_backend_name() == _SQLITE
    arguments: dict[str, Any] = {"timeout": _BUSY_TIMEOUT_S}
    if not is_sqlite:
        arguments = {name: value for name, value in _POSTGRESQL.items() if name not in url.query}
    try:
        engine = create_engine(url, connect_args=arguments, pool_pre_ping=not is_sqlite)
    except (ArgumentError, ImportError) as error:
        raise ConfigError(f"the database driver of {url.drivername!r}: {error}") from error
    if is_sqlite:
        event.listen(engine, "connect", _durable_sqlite)
    return engine


def _durable_sqlite(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    give_up_at_s = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # SQLite does not wait where two begin to write the log of a new file at once.
            is_busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() > give_up_at_s:
                raise
            time.sleep(_BUSY_PAUSE_S)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()
