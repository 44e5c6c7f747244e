"""Every test of the books runs on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from serve_app.ledger.database import Database
from tests.postgres import fresh_database, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """A real server, shared; see fresh_database."""
    with running_postgres() as url:
        yield url


@pytest.fixture(scope="session")
def durable_postgres() -> Iterator[str]:
    """The same, with every commit on the disk: as it is run, and slower."""
    with running_postgres(durable=True) as url:
        yield url


_SERVERS = {"postgresql": "postgres", "postgresql with fsync": "durable_postgres"}


@pytest.fixture(
    params=[
        "sqlite",
        "postgresql",
        pytest.param("postgresql with fsync", marks=pytest.mark.proof),
    ]
)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of either kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/inner/headrace.db"
    else:
        with fresh_database(request.getfixturevalue(_SERVERS[request.param])) as made:
            yield made


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    """The same, opened."""
    opened = Database(url)
    yield opened
    opened.close()
