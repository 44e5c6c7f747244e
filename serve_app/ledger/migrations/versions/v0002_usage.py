"""The ledger: usage events, their rollups and reconciliation, and price books."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

META = sa.table("meta", sa.column("name", sa.String), sa.column("value", sa.BigInteger))
COUNTERS = ("ledger_version", "price_book_version")

RECONCILIATION = """\
CREATE VIEW usage_reconciliation AS
SELECT request_id,
       MIN(hour) AS hour,
       MIN(tenant) AS tenant,
       MIN(model) AS model,
       MAX(CASE WHEN witness = 'router' THEN outcome END) AS outcome,
       SUM(CASE WHEN witness = 'router' THEN 1 ELSE 0 END) AS router_rows,
       SUM(CASE WHEN witness = 'engine' THEN 1 ELSE 0 END) AS engine_rows,
       SUM(delivered_tokens) AS delivered_tokens,
       SUM(generated_tokens) AS generated_tokens,
       SUM(wasted_tokens) AS wasted_tokens,
       SUM(wasted_nanousd) AS wasted_nanousd,
       SUM(amount_nanousd) AS amount_nanousd
FROM usage_event
GROUP BY request_id"""


def upgrade() -> None:
    op.create_table("usage_event", *_event_columns(), if_not_exists=False)
    op.create_index("usage_event_by_hour", "usage_event", ["hour", "tenant"])
    op.create_table("usage_rollup", *_rollup_columns())
    op.create_table(
        "price_book",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("created_at_s", sa.Double, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
    )
    op.create_table(
        "rate_card",
        sa.Column(
            "version",
            sa.BigInteger,
            sa.ForeignKey("price_book.version"),
            primary_key=True,
            autoincrement=False,
        ),
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("tenant", sa.String(200)),
        sa.Column("model", sa.String(256)),
        sa.Column("priority_class", sa.SmallInteger),
        sa.Column("batch", sa.Boolean),
        sa.Column("from_s", sa.BigInteger),
        sa.Column("until_s", sa.BigInteger),
        *_numbers("input_nanousd", "cached_input_nanousd", "output_nanousd", "request_nanousd"),
    )
    op.bulk_insert(META, [{"name": name, "value": 0} for name in COUNTERS])
    op.execute(RECONCILIATION)


def downgrade() -> None:
    op.execute("DROP VIEW usage_reconciliation")
    op.drop_table("rate_card")
    op.drop_table("price_book")
    op.drop_table("usage_rollup")
    op.drop_index("usage_event_by_hour", "usage_event")
    op.drop_table("usage_event")
    op.execute(sa.delete(META).where(META.c.name.in_(COUNTERS)))


def _numbers(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


def _sums() -> list[sa.Column[int]]:
    return _numbers(
        "requests",
        "billed_requests",
        "billed_prompt_tokens",
        "billed_cached_tokens",
        "billed_output_tokens",
        "delivered_tokens",
        "generated_tokens",
        "wasted_tokens",
        "wasted_nanousd",
        "amount_nanousd",
    )


def _event_columns() -> list[sa.Column[object]]:
    columns: list[sa.Column[object]] = [
        sa.Column("request_id", sa.String(64), primary_key=True),
        sa.Column("attempt", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("witness", sa.String(8), primary_key=True),
        sa.Column("hour", sa.BigInteger, nullable=False),
        sa.Column("tenant", sa.String(200), nullable=False),
        sa.Column("user_id", sa.String(200), nullable=False),
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("model", sa.String(256), nullable=False),
        sa.Column("priority_class", sa.SmallInteger, nullable=False),
        sa.Column("tag", sa.String(128), nullable=False),
        sa.Column("pool", sa.String(128), nullable=False),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("client_label", sa.String(128)),
        sa.Column("batch", sa.Boolean, nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("finish_reason", sa.String(32), nullable=False),
        sa.Column("degraded", sa.String(64), nullable=False),
        sa.Column("replica", sa.String(128), nullable=False),
        sa.Column("billable", sa.Boolean, nullable=False),
        sa.Column("exact", sa.Boolean, nullable=False),
        sa.Column("arrived_at_s", sa.Double, nullable=False),
        sa.Column("ended_at_s", sa.Double, nullable=False),
        sa.Column("recorded_at_s", sa.Double, nullable=False),
        sa.Column("queued_s", sa.Double),
        sa.Column("first_token_s", sa.Double),
        sa.Column("token_interval_s", sa.Double),
        sa.Column("duration_s", sa.Double),
        sa.Column("engine_s", sa.Double, nullable=False),
        sa.Column("note", sa.Text),
        sa.Column("price_version", sa.BigInteger, nullable=False),
        sa.Column("card", sa.String(128)),
    ]
    numbers = _numbers(
        "prompt_tokens",
        "cached_prompt_tokens",
        "output_tokens",
        "input_rate_nanousd",
        "cached_rate_nanousd",
        "output_rate_nanousd",
        "request_rate_nanousd",
    )
    return [*columns, *numbers, *_sums()]  # type: ignore[list-item]  # columns of one table


def _rollup_columns() -> list[sa.Column[object]]:
    columns: list[sa.Column[object]] = [
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("user_id", sa.String(200), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("priority_class", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("tag", sa.String(128), primary_key=True),
    ]
    return [*columns, *_sums()]  # type: ignore[list-item]  # columns of one table
