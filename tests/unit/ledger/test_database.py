"""How a database is connected to."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from serve_app.errors import StoreUnavailable
from serve_app.ledger import database
from serve_app.ledger.database import Database


@pytest.mark.parametrize(("query", "waits_s"), [("", 5), ("?connect_timeout=2", "2")])
def test_a_server_that_has_gone_is_not_waited_for_without_end(query: str, waits_s: Any) -> None:
    asked: dict[str, Any] = {}

    def note(_dialect: object, _record: object, _arguments: object, how: dict[str, Any]) -> None:
        asked.update(how)

    event.listen(Engine, "do_connect", note)
    try:
        with pytest.raises(StoreUnavailable):
            Database(f"postgresql+psycopg://nobody@127.0.0.1:1/none{query}")
    finally:
        event.remove(Engine, "do_connect", note)
    assert asked["connect_timeout"] == waits_s
    assert asked["tcp_user_timeout"] == 20_000


class BusyCursor:
    """SQLite's answer to the second of two who begin a file's log at once, for a while."""

    def __init__(self, refusals: int, code: int = sqlite3.SQLITE_BUSY) -> None:
        self.refusals = refusals
        self.error = sqlite3.OperationalError("no")
        self.error.sqlite_errorcode = code
        self.done: list[str] = []

    def execute(self, statement: str) -> None:
        if "journal_mode" in statement and self.refusals:
            self.refusals -= 1
            raise self.error
        self.done.append(statement)

    def close(self) -> None:
        self.done.append("closed")

    def cursor(self) -> BusyCursor:
        return self


def test_two_who_begin_a_new_file_at_once_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connection = BusyCursor(3)
    database._durable_sqlite(connection, None)
    assert connection.done == ["PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", "closed"]
    with pytest.raises(sqlite3.OperationalError):
        database._durable_sqlite(BusyCursor(1, sqlite3.SQLITE_READONLY), None)
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", -1.0)
    with pytest.raises(sqlite3.OperationalError):
        database._durable_sqlite(BusyCursor(1), None)
