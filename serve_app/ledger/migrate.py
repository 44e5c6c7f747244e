"""Runs the migrations of ``migrations/`` on a connection: Alembic without its ini file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

MIGRATIONS: Final = Path(__file__).parent / "migrations"
CONNECTION: Final = "connection"


def migrate(connection: Connection, revision: str) -> None:
    """Bring the schema up or down to ``revision`` within the connection's transaction.

    Raises:
        alembic.util.CommandError: the database or the caller names an unknown revision.
    """
    config = _config()
    config.attributes[CONNECTION] = connection
    if _is_below(connection, revision):
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


def revisions() -> list[str]:
    """Return every revision, first to last."""
    scripts = ScriptDirectory.from_config(_config())
    return [script.revision for script in reversed(list(scripts.walk_revisions()))]


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _is_below(connection: Connection, revision: str) -> bool:
    """Tell whether ``revision`` is older than what the database holds."""
    if not connection.dialect.has_table(connection, "alembic_version"):
        return False
    if revision in ("head", "base"):
        return revision == "base"
    row = connection.exec_driver_sql("SELECT version_num FROM alembic_version").first()
    known = revisions()
    return row is not None and revision in known and known.index(revision) < known.index(row[0])
