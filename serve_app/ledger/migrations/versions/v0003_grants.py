"""Which Control grants limits, and which routers may hold parts of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

META = sa.table("meta", sa.column("name", sa.String), sa.column("value", sa.BigInteger))
GRANT_EPOCH = "grant_epoch"


def upgrade() -> None:
    op.create_table(
        "grant_router",
        sa.Column("router", sa.String(200), primary_key=True),
        sa.Column("gone_at_s", sa.Double),
    )
    op.bulk_insert(META, [{"name": GRANT_EPOCH, "value": 0}])


def downgrade() -> None:
    op.drop_table("grant_router")
    op.execute(sa.delete(META).where(META.c.name == GRANT_EPOCH))
