"""What requests held of the KV cache: blocks times microseconds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TABLES = ("usage_event", "engine_time")


def upgrade() -> None:
    for table in TABLES:
        # What was recorded before does not say: none. The default stays: to take it away,
        # SQLite would have to copy every event.
        column = sa.Column("kv_block_us", sa.BigInteger, nullable=False, server_default="0")
        op.add_column(table, column)


def downgrade() -> None:
    for table in TABLES:
        op.drop_column(table, "kv_block_us")
