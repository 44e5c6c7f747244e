"""What administrators changed, numbered without a gap."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

META = sa.table("meta", sa.column("name", sa.String), sa.column("value", sa.BigInteger))
ADMIN_CHANGE_NUMBER = "admin_change_number"


def upgrade() -> None:
    op.create_table(
        "admin_change",
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("at_s", sa.Double, nullable=False),
        sa.Column("actor", sa.String(200), nullable=False),
        sa.Column("via", sa.String(16), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("subject", sa.String(512), nullable=False),
        sa.Column("before_json", sa.Text),
        sa.Column("after_json", sa.Text),
        sa.Column("note", sa.Text, nullable=False),
    )
    op.bulk_insert(META, [{"name": ADMIN_CHANGE_NUMBER, "value": 0}])


def downgrade() -> None:
    op.drop_table("admin_change")
    op.execute(sa.delete(META).where(META.c.name == ADMIN_CHANGE_NUMBER))
