"""The runbook of backup and restore, as it stands: its blocks are run, on real databases."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from sqlalchemy import select

from serve_app.cli import main
from serve_app.ledger.database import Database
from serve_app.ledger.grants import GrantStore
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.schema import METADATA
from serve_app.ledger.usage import UsageLedger
from tests.postgres import PATIENTLY, fresh_database, running_postgres
from tests.runbook import PAGES, blocks, libpq, run_block
from tests.usage_records import charge, record, traffic

pytestmark = pytest.mark.slow
BACKUP = blocks("backup.md")


def write_config(folder: Path, database: str) -> None:
    """Write a configuration with this database, as the chart renders one."""
    document = yaml.safe_load((PAGES.parents[1] / "configs" / "sim.yaml").read_text())
    document["applications"][0]["args"]["database"] = database
    (folder / "ledger.yaml").write_text(yaml.safe_dump(document))


def fill(folder: Path, url: str) -> None:
    """Make keys, a budget, prices and some hours of usage."""
    write_config(folder, url)
    prices = folder / "prices.yaml"
    prices.write_text("currency: USD\ncards:\n  all: {input: 1, output: 10}\n")
    where = ["--config", str(folder / "ledger.yaml")]
    for words in (
        ["prices", "import", str(prices)],
        ["keys", "create", "--name", "laptop", "--tenant", "acme"],
        ["budgets", "set", "tenant", "acme", "500", "--window", "month"],
    ):
        assert main([*words, *where]) == 0
    database = Database(url)
    store = PriceStore(database)
    UsageLedger(database, store).commit(list(traffic(60, price_version=store.version())))
    GrantStore(database).begin()
    database.close()


def contents(url: str) -> dict[str, list[tuple[object, ...]]]:
    """Return every row of every table."""
    database = Database(url)
    with database.snapshot() as connection:
        found = {
            table.name: sorted(map(tuple, connection.execute(select(table))), key=repr)
            for table in METADATA.sorted_tables
        }
    database.close()
    return found


def commit_one_more(url: str) -> None:
    database = Database(url)
    store = PriceStore(database)
    UsageLedger(database, store).commit([record(charge(number=9_999))])
    database.close()


def test_a_ledger_in_postgresql_comes_back_whole(tmp_path: Path) -> None:
    with running_postgres() as cluster, fresh_database(cluster, "headrace") as url:
        environment = libpq(url)
        fill(tmp_path, url)
        write_config(tmp_path, "postgresql+psycopg://")
        before = contents(url)
        run_block(BACKUP["postgresql-backup"], tmp_path, environment)
        commit_one_more(url)
        assert contents(url) != before
        run_block(BACKUP["postgresql-restore"], tmp_path, environment)
        checked = run_block(BACKUP["postgresql-check"], tmp_path, environment)
        assert "acme" in checked
        assert "laptop" in checked
        assert contents(cluster + "headrace_restored" + PATIENTLY) == before
        assert_it_serves(cluster + "headrace_restored" + PATIENTLY, after_epoch=1)


def test_a_dump_that_was_cut_off_restores_nothing(tmp_path: Path) -> None:
    with running_postgres() as cluster, fresh_database(cluster, "headrace") as url:
        environment = libpq(url)
        fill(tmp_path, url)
        write_config(tmp_path, "postgresql+psycopg://")
        run_block(BACKUP["postgresql-backup"], tmp_path, environment)
        dump = tmp_path / "headrace.dump"
        dump.write_bytes(dump.read_bytes()[:-100])
        with pytest.raises(AssertionError, match="pg_restore"):
            run_block(BACKUP["postgresql-restore"], tmp_path, environment)
        tables = "psql --tuples-only --command '\\dt' headrace_restored"
        assert "api_key" not in run_block(tables, tmp_path, environment)


def test_a_ledger_in_sqlite_comes_back_whole_while_it_is_written_to(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/.headrace/headrace.db"
    fill(tmp_path, url)
    write_config(tmp_path, "sqlite:///.headrace/headrace.db")
    before = contents(url)
    # A stack that runs, and then dies: what it wrote last is in the log beside the file.
    with Database(url).engine.connect() as reader:
        reader.execute(select(METADATA.tables["meta"])).all()
        run_block(BACKUP["sqlite-backup"], tmp_path, {})
        commit_one_more(url)
        assert (tmp_path / ".headrace" / "headrace.db-wal").stat().st_size
        run_block(BACKUP["sqlite-restore"], tmp_path, {})
    assert contents(url) == before
    assert_it_serves(url, after_epoch=1)


def assert_it_serves(url: str, after_epoch: int) -> None:
    """A new Control takes over, and writes."""
    database = Database(url)
    assert GrantStore(database).begin().epoch == after_epoch + 1
    commit_again = UsageLedger(database, PriceStore(database))
    commit_again.commit([record(charge(number=10_000))])
    database.close()


def test_the_block_that_is_run_is_the_one_that_is_read() -> None:
    assert set(BACKUP) == {
        "postgresql-backup",
        "postgresql-restore",
        "postgresql-check",
        "sqlite-backup",
        "sqlite-restore",
    }
