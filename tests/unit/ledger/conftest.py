"""Every test of the books runs on both databases, on a copy of one that was migrated once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve_app.ledger.database import Database
from tests.postgres import fresh_database, running_postgres

_TEMPLATE = "migrated"


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real server, shared; see fresh_database."""
    with _server(durable=False) as url:
        yield url


@pytest.fixture(scope="session")
def durable_postgres() -> Iterator[str]:
    """The same, with every commit on the disk: as it is run, and slower."""
    with _server(durable=True) as url:
        yield url


@contextmanager
def _server(*, durable: bool) -> Iterator[str]:
    with running_postgres(durable=durable) as url, fresh_database(url, _TEMPLATE) as template:
        Database(template).close()
        yield url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated file, closed."""
    path = tmp_path_factory.mktemp("template") / "headrace.db"
    Database(f"sqlite:///{path}").close()
    return path


_SERVERS = {"postgresql": "postgres", "postgresql with fsync": "durable_postgres"}


@pytest.fixture(
    params=[
        "sqlite",
        pytest.param("postgresql", marks=pytest.mark.slow),
        pytest.param("postgresql with fsync", marks=pytest.mark.proof),
    ]
)
def kind(request: pytest.FixtureRequest) -> str:
    """Which database a test runs on."""
    return str(request.param)


@pytest.fixture
def empty_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database in which there is nothing."""
    if kind == "sqlite":
        yield f"sqlite:///{tmp_path}/inner/headrace.db"
    else:
        with fresh_database(request.getfixturevalue(_SERVERS[kind])) as made:
            yield made


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database with its tables, of either kind."""
    if kind == "sqlite":
        folder = tmp_path / "inner"
        folder.mkdir(mode=0o700)
        shutil.copy(request.getfixturevalue("sqlite_template"), folder / "headrace.db")
        yield f"sqlite:///{folder}/headrace.db"
    else:
        server = request.getfixturevalue(_SERVERS[kind])
        with fresh_database(server, template=_TEMPLATE) as made:
            yield made


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """The same, opened."""
    opened = Database(url)
    yield opened
    opened.close()
