"""How much of a replica's time default coefficients split over requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLES = ("replica_period", "replica_hour")


def upgrade() -> None:
    for table in TABLES:
        # What was recorded before does not say: none.
        column = sa.Column("provisional_ns", sa.BigInteger, nullable=False, server_default="0")
        with op.batch_alter_table(table) as batch:
            batch.add_column(column)
        with op.batch_alter_table(table) as batch:
            batch.alter_column("provisional_ns", existing_type=sa.BigInteger, server_default=None)


def downgrade() -> None:
    for table in TABLES:
        with op.batch_alter_table(table) as batch:
            batch.drop_column("provisional_ns")
