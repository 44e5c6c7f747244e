"""The schema: made by migrations alone, up and down, and the same as the code reads."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Boolean, String, create_engine, inspect, text

from serve_app.errors import StoreUnavailable
from serve_app.keys import KeyWish
from serve_app.ledger import database as ledger_database
from serve_app.ledger.database import Database
from serve_app.ledger.migrate import revisions
from serve_app.ledger.schema import COUNTERS, METADATA, REVISION
from serve_app.ledger.store import KeyStore

pytestmark = pytest.mark.slow

# What a database looked like before there were migrations, and ledgers.
OLD = """
CREATE TABLE api_key (key_id VARCHAR(64) NOT NULL, name VARCHAR(200) NOT NULL,
  digest VARCHAR(64) NOT NULL, tenant VARCHAR(200) NOT NULL, user_id VARCHAR(200),
  admin BOOLEAN NOT NULL, priority_ceiling SMALLINT NOT NULL, models_json TEXT,
  created_at_s DOUBLE PRECISION NOT NULL, expires_at_s DOUBLE PRECISION,
  revoked_at_s DOUBLE PRECISION, PRIMARY KEY (key_id), UNIQUE (digest));
CREATE TABLE meta (name VARCHAR(64) NOT NULL, value BIGINT NOT NULL, PRIMARY KEY (name));
INSERT INTO meta VALUES ('key_table_version', 41);
INSERT INTO api_key VALUES ('old', 'laptop', 'aa', 'acme', NULL, '0', 1, NULL, 5.0, NULL, NULL)
"""


@pytest.fixture
def url(empty_url: str) -> str:
    """Nothing is migrated yet."""
    return empty_url


def tables(database: Database) -> set[str]:
    return set(inspect(database.engine).get_table_names()) - {"alembic_version"}


def shape(database: Database) -> set[str]:
    """Return every column there is, under its table's name."""
    found = inspect(database.engine)
    return {
        f"{table}.{each['name']}" for table in tables(database) for each in found.get_columns(table)
    }


def test_migrations_make_exactly_the_tables_that_the_code_reads(database: Database) -> None:
    with database.transaction() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
        names = connection.execute(text("SELECT name FROM meta")).scalars()
        assert set(names) == set(COUNTERS)


def test_the_last_migration_is_the_one_the_code_names() -> None:
    assert revisions()[-1] == REVISION


def test_every_step_down_can_be_taken_up_again(database: Database) -> None:
    made = shape(database)
    for revision in ["base", *revisions()[:-1]]:
        database.migrate(revision)
        assert shape(database) != made
        database.migrate("head")
        assert shape(database) == made
    database.migrate("base")
    assert tables(database) == set()


def test_a_database_from_before_the_migrations_keeps_its_keys(url: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    old = create_engine(url)
    with old.begin() as connection:
        for statement in OLD.split(";"):
            connection.execute(text(statement))
    old.dispose()
    store = KeyStore(url)
    assert [record.key_id for record in store.list()] == ["old"]
    assert store.version() == 41
    store.create(KeyWish(name="new"))
    store.close()


def test_engine_time_from_before_it_was_whole_is_kept(database: Database) -> None:
    database.migrate("0004")
    filled = {
        "witness": "'engine'",
        "engine_s": "1.500000007",
        "hour": "3600",
        "arrived_at_s": "3601",
        "outcome": "'cancelled'",
        "replica": "'r1'",
    }
    insert_row(database, "usage_event", filled)
    database.migrate("head")
    with database.transaction() as connection:
        event = connection.execute(text("SELECT engine_ns, engine_hour FROM usage_event")).one()
        assert tuple(event) == (1_500_000_007, 3600)
        derived = connection.execute(
            text("SELECT hour, replica, requests, engine_ns, wasted_ns FROM engine_time")
        ).one()
        assert tuple(derived) == (3600, "r1", 1, 1_500_000_007, 1_500_000_007)
        view = connection.execute(text("SELECT engine_ns FROM usage_reconciliation")).scalar_one()
        assert int(view) == 1_500_000_007
    database.migrate("0004")
    with database.transaction() as connection:
        back = connection.execute(text("SELECT engine_s FROM usage_event")).scalar_one()
        assert back == 1.500000007
        rows = connection.execute(text("SELECT engine_rows FROM usage_reconciliation"))
        assert int(rows.scalar_one()) == 1
    database.migrate("head")


def test_periods_from_before_the_mark_of_provisional_time_have_none(database: Database) -> None:
    database.migrate("0006")
    tables = ("replica_period", "replica_hour")
    for name in tables:
        insert_row(database, name)
    for revision in ("head", "0006", "head"):
        database.migrate(revision)
    for name in tables:
        with database.transaction() as connection:
            found = connection.execute(text(f"SELECT provisional_ns FROM {name}")).scalar_one()
            assert found == 0


def test_events_from_before_what_they_held_of_the_cache_was_known_say_none(
    database: Database,
) -> None:
    database.migrate("0008")
    tables = ("usage_event", "engine_time")
    for name in tables:
        assert f"{name}.kv_block_us" not in shape(database)
        insert_row(database, name)
    for revision in ("head", "0008", "head"):
        database.migrate(revision)
    for name in tables:
        with database.transaction() as connection:
            found = connection.execute(text(f"SELECT kv_block_us FROM {name}")).scalar_one()
            assert found == 0
    with database.transaction() as connection:
        # The view over the events is still there.
        rows = connection.execute(text("SELECT COUNT(*) FROM usage_reconciliation"))
        assert rows.scalar_one() == 1


def insert_row(database: Database, table: str, filled: Mapping[str, str] = {}) -> None:
    """Insert a row of nothing but what is filled in, into a table as it is just now."""
    with database.transaction() as connection:
        columns = inspect(connection).get_columns(table)
        values = {each["name"]: _nothing(each["type"]) for each in columns} | dict(filled)
        names, literals = ", ".join(values), ", ".join(values.values())
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({literals})"))


def _nothing(kind: object) -> str:
    if isinstance(kind, Boolean):
        return "FALSE"
    return "''" if isinstance(kind, String) else "0"


def test_a_database_of_a_newer_program_is_left_alone(url: str) -> None:
    database = Database(url)
    with database.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    database.close()
    with pytest.raises(StoreUnavailable, match="newer version"):
        Database(url)


def _open(url: str) -> str:
    """In a process of its own, which waits for a lock as long as a busy machine needs."""
    ledger_database._BUSY_TIMEOUT_S = 300.0
    database = Database(url)
    database.close()
    return database.place


def test_processes_that_open_a_new_database_together_migrate_it_once(url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_open, [url] * 6))) == 1
    database = Database(url)
    assert "usage_event" in tables(database)
    database.close()


def test_opening_a_database_that_is_up_to_date_does_not_load_alembic(url: str) -> None:
    Database(url).close()
    program = (
        "import sys; from serve_app.ledger.database import Database; "
        f"Database({url!r}).close(); print('alembic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
