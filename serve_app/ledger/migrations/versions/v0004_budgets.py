"""Budgets, what routers were granted of them, and what each scope spent by the hour."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

META = sa.table("meta", sa.column("name", sa.String), sa.column("value", sa.BigInteger))
BUDGET_VERSION = "budget_version"

BACKFILL = """\
INSERT INTO spending (scope, id, hour, amount_nanousd)
SELECT '{scope}', {id}, hour, SUM(amount_nanousd) FROM usage_rollup
WHERE {column} <> '' GROUP BY {id}, hour"""


def upgrade() -> None:
    op.create_table(
        "budget",
        sa.Column("scope", sa.String(16), primary_key=True),
        sa.Column("id", sa.String(401), primary_key=True),
        sa.Column("amount_nanousd", sa.BigInteger, nullable=False),
        sa.Column("resets", sa.String(16), nullable=False),
        sa.Column("rolling_s", sa.BigInteger, nullable=False),
        sa.Column("alerts_json", sa.Text, nullable=False),
        sa.Column("hard", sa.Boolean, nullable=False),
        sa.Column("begun_s", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "budget_grant",
        sa.Column("scope", sa.String(16), primary_key=True),
        sa.Column("id", sa.String(401), primary_key=True),
        sa.Column("start_s", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("router", sa.String(200), primary_key=True),
        sa.Column("granted", sa.BigInteger, nullable=False),
        sa.Column("released", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "spending",
        sa.Column("scope", sa.String(16), primary_key=True),
        sa.Column("id", sa.String(401), primary_key=True),
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("amount_nanousd", sa.BigInteger, nullable=False),
    )
    for scope, column, name in (
        ("tenant", "tenant", "tenant"),
        ("user", "user_id", "tenant || '/' || user_id"),
        ("key", "key_id", "key_id"),
        ("tag", "tag", "tag"),
    ):
        op.execute(BACKFILL.format(scope=scope, column=column, id=name))
    op.bulk_insert(META, [{"name": BUDGET_VERSION, "value": 0}])


def downgrade() -> None:
    op.drop_table("spending")
    op.drop_table("budget_grant")
    op.drop_table("budget")
    op.execute(sa.delete(META).where(META.c.name == BUDGET_VERSION))
