"""Budgets no longer keep the start of the latest period: which one pays follows from requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("budget") as batch:
        batch.drop_column("begun_s")


def downgrade() -> None:
    # Zero begins anew with the present period.
    column = sa.Column("begun_s", sa.BigInteger, nullable=False, server_default="0")
    with op.batch_alter_table("budget") as batch:
        batch.add_column(column)
    with op.batch_alter_table("budget") as batch:
        batch.alter_column("begun_s", existing_type=sa.BigInteger, server_default=None)
