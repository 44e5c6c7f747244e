"""The key store: durable, versioned, and used by several processes at once."""

from __future__ import annotations

import multiprocessing
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from serve_app.core.types import PriorityClass, TenantId, UserId
from serve_app.errors import ConfigError, StoreUnavailable
from serve_app.keys import KeyState, KeyWish
from serve_app.ledger.database import absolute_url
from serve_app.ledger.store import KeyStore

NOW_S = 1000.0
WISH = KeyWish(
    name="laptop",
    tenant=TenantId("acme"),
    user=UserId("ann"),
    admin=True,
    priority_ceiling=PriorityClass.SHEDDABLE,
    models=("small", "large"),
    expires_at_s=2000.5,
)


@pytest.fixture
def file_store(tmp_path: Path) -> Iterator[KeyStore]:
    made = KeyStore(f"sqlite:///{tmp_path}/inner/keys.db", lambda: NOW_S)
    yield made
    made.close()


@pytest.fixture
def store(url: str) -> Iterator[KeyStore]:
    made = KeyStore(url, lambda: NOW_S)
    yield made
    made.close()


def test_a_key_comes_back_as_it_was_stored(store: KeyStore, url: str) -> None:
    secret, record = store.create(WISH)
    again = KeyStore(url)
    assert again.list() == [record]
    state, found = again.snapshot().find(secret, NOW_S)
    assert (state, found) == (KeyState.VALID, record)
    assert (record.user, record.models, record.expires_at_s) == ("ann", ("small", "large"), 2000.5)
    again.close()


def test_a_rotated_key_works_beside_its_successor_and_then_no_more(store: KeyStore) -> None:
    secret, record = store.create(WISH)
    rotated = store.rotate(record.key_id, 600.0)
    assert rotated is not None
    new_secret, new, old = rotated
    assert (old.key_id, old.expires_at_s) == (record.key_id, NOW_S + 600.0)
    assert (new.tenant, new.user, new.models) == (record.tenant, record.user, record.models)
    assert new.expires_at_s == 2000.5, "its lifetime anew"
    table = store.snapshot()
    for at_s, states in (
        (NOW_S + 599, (KeyState.VALID, KeyState.VALID)),
        (NOW_S + 600, (KeyState.EXPIRED, KeyState.VALID)),
    ):
        assert tuple(table.find(each, at_s)[0] for each in (secret, new_secret)) == states


def test_a_rotation_does_not_lengthen_a_life_and_ends_with_it(store: KeyStore) -> None:
    _, record = store.create(WISH)
    rotated = store.rotate(record.key_id, 1e6)
    assert rotated is not None
    assert rotated[2].expires_at_s == record.expires_at_s
    store.revoke(record.key_id)
    assert store.rotate(record.key_id, 60.0) is None
    assert store.rotate("nobody00", 60.0) is None


def test_the_secret_is_not_in_the_database(file_store: KeyStore, tmp_path: Path) -> None:
    secret, _ = file_store.create(WISH)
    file_store.close()
    files = list((tmp_path / "inner").iterdir())
    assert files
    for file in files:
        assert secret[12:].encode() not in file.read_bytes()


def test_every_change_raises_the_version_and_reading_does_not(store: KeyStore) -> None:
    assert store.version() == 0
    _, record = store.create(WISH)
    assert store.version() == 1
    store.list()
    assert store.snapshot().version == store.version() == 1
    store.revoke(record.key_id)
    assert store.version() == 2


def test_a_revoked_key_stays_listed_and_keeps_its_first_time(url: str) -> None:
    times = iter([1.0, 2.0, 3.0])
    store = KeyStore(url, lambda: next(times))
    secret, record = store.create(WISH)
    first = store.revoke(record.key_id)
    second = store.revoke(record.key_id)
    assert first == second
    assert first is not None
    assert first.revoked_at_s == 2.0
    assert store.list() == [first]
    assert store.snapshot().find(secret, NOW_S)[0] is KeyState.REVOKED
    store.close()


def test_revoking_an_unknown_key_says_so(store: KeyStore) -> None:
    assert store.revoke("nobody") is None


def test_the_same_key_cannot_be_added_twice_and_the_failure_changes_nothing(
    store: KeyStore,
) -> None:
    _, record = store.create(WISH)
    with pytest.raises(ValueError, match="exists"):
        store.add(record)
    assert store.version() == 1
    assert store.list() == [record]


@pytest.mark.usefixtures("file_store")
def test_only_this_user_can_read_the_database(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "keys.db").stat().st_mode) == 0o600


def test_commits_reach_the_disk(file_store: KeyStore) -> None:
    with file_store._database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def _create_keys(url: str, count: int) -> int:
    store = KeyStore(url)
    made = [store.create(KeyWish(name=str(index))) for index in range(count)]
    store.close()
    return len(made)


@pytest.mark.slow
def test_processes_that_start_together_create_the_tables_once_and_lose_no_key(url: str) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(3) as pool:
        assert pool.starmap(_create_keys, [(url, 10)] * 3) == [10, 10, 10]
    store = KeyStore(url)
    assert (store.version(), len(store.list()), len(store.snapshot())) == (30, 30, 30)
    store.close()


def test_a_change_by_another_process_is_seen(store: KeyStore, url: str) -> None:
    before = store.snapshot()
    other = KeyStore(url)
    other.create(WISH)
    other.close()
    assert store.version() > before.version
    assert len(store.snapshot()) == 1


def test_a_file_that_is_no_database_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "keys.db"
    file.write_bytes(b"this is not a database" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        KeyStore(f"sqlite:///{file}")


@pytest.mark.usefixtures("file_store")
def test_a_locked_database_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/inner/keys.db"
    monkeypatch.setattr("serve_app.ledger.database._BUSY_TIMEOUT_S", 0.0)
    impatient = KeyStore(url)
    holder = sqlite3.connect(tmp_path / "inner" / "keys.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match="locked"):
        impatient.create(WISH)
    holder.execute("ROLLBACK")
    holder.close()
    impatient.create(WISH)
    impatient.close()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("not a url", "not a URL"),
        ("sqlite://", "must be a file"),
        ("sqlite:///:memory:", "must be a file"),
        ("sqlite:////proc/nowhere/keys.db", "cannot be opened"),
        ("nosuchdatabase://host/x", "driver"),
    ],
)
def test_a_database_that_cannot_be_is_a_configuration_error(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        KeyStore(url)


def test_errors_do_not_show_the_database_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"this is not a database" * 100)
    broken = create_engine(f"sqlite:///{tmp_path}/x")
    monkeypatch.setattr("serve_app.ledger.database._engine", lambda _: broken)
    with pytest.raises(StoreUnavailable) as caught:
        KeyStore("postgresql://ann:swordfish@db/x")
    assert "ann" in str(caught.value)
    assert "swordfish" not in str(caught.value)
    broken.dispose()


def test_a_relative_file_is_taken_from_the_given_folder() -> None:
    folder = Path("/srv/headrace")
    assert absolute_url("sqlite:///a/b.db", folder) == "sqlite:////srv/headrace/a/b.db"
    assert absolute_url("sqlite:////a/b.db", folder) == "sqlite:////a/b.db"
    other = "postgresql://ann:swordfish@host/x"
    assert absolute_url(other, folder) == other


def test_a_store_says_where_it_is_and_whether_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = KeyStore("sqlite:///a/b.db"), KeyStore("sqlite:///a/b.db")
    assert first.place == second.place == f"sqlite:///{tmp_path}/a/b.db"
    assert (first.is_new, second.is_new) == (True, False)
    first.close()
    second.close()
