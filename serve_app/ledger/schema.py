"""Tables of the store. Plain SQL types only: SQLite and PostgreSQL read the same schema.

Times are wall seconds since the epoch.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
)

METADATA: Final = MetaData()

API_KEY: Final = Table(
    "api_key",
    METADATA,
    Column("key_id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("tenant", String(200), nullable=False),
    Column("user_id", String(200)),
    Column("admin", Boolean, nullable=False),
    Column("priority_ceiling", SmallInteger, nullable=False),
    Column("models_json", Text),
    Column("created_at_s", Double, nullable=False),
    Column("expires_at_s", Double),
    Column("revoked_at_s", Double),
)

# Counters that say "something changed": one row per thing that others keep a copy of.
META: Final = Table(
    "meta",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

KEY_TABLE_VERSION: Final = "key_table_version"
