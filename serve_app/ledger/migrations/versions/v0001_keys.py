"""The key store, as databases had it before there were migrations: what exists is kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

META = sa.table("meta", sa.column("name", sa.String), sa.column("value", sa.BigInteger))


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False, unique=True),
        sa.Column("tenant", sa.String(200), nullable=False),
        sa.Column("user_id", sa.String(200)),
        sa.Column("admin", sa.Boolean, nullable=False),
        sa.Column("priority_ceiling", sa.SmallInteger, nullable=False),
        sa.Column("models_json", sa.Text),
        sa.Column("created_at_s", sa.Double, nullable=False),
        sa.Column("expires_at_s", sa.Double),
        sa.Column("revoked_at_s", sa.Double),
        if_not_exists=True,
    )
    op.create_table(
        "meta",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
        if_not_exists=True,
    )
    connection = op.get_bind()
    known = sa.select(META.c.value).where(META.c.name == "key_table_version")
    if connection.execute(known).first() is None:
        op.bulk_insert(META, [{"name": "key_table_version", "value": 0}])


def downgrade() -> None:
    op.drop_table("meta")
    op.drop_table("api_key")
