"""Engine time in whole nanoseconds, replicas' time by use, and what nodes were billed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

USES = (
    *("start_up", "useful", "cancelled", "preempted", "failed", "idle", "drain"),
    *("unattributed", "open"),
)

VIEW = """\
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
       SUM(amount_nanousd) AS amount_nanousd{more}
FROM usage_event
GROUP BY request_id"""
ENGINE_TIME = """,
       SUM(CASE WHEN witness = 'router' THEN engine_ns ELSE 0 END) AS router_engine_ns,
       SUM(CASE WHEN witness = 'engine' THEN engine_ns ELSE 0 END) AS engine_ns"""


def upgrade() -> None:
    op.execute("DROP VIEW usage_reconciliation")
    # Null at first: the rows there are get theirs before it is forbidden.
    for name in ("engine_ns", "engine_hour"):
        op.add_column("usage_event", sa.Column(name, sa.BigInteger, nullable=True))
    op.execute(
        "UPDATE usage_event SET engine_hour = hour, "
        "engine_ns = CAST(ROUND(engine_s * 1000000000) AS BIGINT)"
    )
    with op.batch_alter_table("usage_event") as batch:
        for name in ("engine_ns", "engine_hour"):
            batch.alter_column(name, existing_type=sa.BigInteger, nullable=False)
        batch.drop_column("engine_s")
    op.execute(VIEW.format(more=ENGINE_TIME))
    op.create_table(
        "replica_period",
        sa.Column("replica", sa.String(128), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("hour", sa.BigInteger, nullable=False),
        *_place(),
        *_times(),
        sa.Column("recorded_at_s", sa.Double, nullable=False),
    )
    op.create_index("replica_period_by_hour", "replica_period", ["hour"])
    op.create_table(
        "replica_hour",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("replica", sa.String(128), primary_key=True),
        *_place(),
        *_times(),
    )
    op.create_table("engine_time", *_engine_time())
    op.create_table(
        "node_bill",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("node", sa.String(253), primary_key=True),
        sa.Column("total_nanousd", sa.BigInteger),
        sa.Column("gpu_ns", sa.BigInteger),
        sa.Column("read_at_s", sa.Double, nullable=False),
    )
    op.execute(
        "INSERT INTO engine_time SELECT engine_hour, replica, tenant, user_id, key_id, model, "
        "priority_class, tag, COUNT(*), SUM(engine_ns), "
        "SUM(CASE WHEN outcome = 'completed' THEN 0 ELSE engine_ns END) "
        "FROM usage_event WHERE witness = 'engine' AND engine_ns > 0 "
        "GROUP BY engine_hour, replica, tenant, user_id, key_id, model, priority_class, tag"
    )


def downgrade() -> None:
    for name in ("node_bill", "engine_time", "replica_hour"):
        op.drop_table(name)
    op.drop_index("replica_period_by_hour", "replica_period")
    op.drop_table("replica_period")
    op.execute("DROP VIEW usage_reconciliation")
    op.add_column("usage_event", sa.Column("engine_s", sa.Double, nullable=True))
    op.execute("UPDATE usage_event SET engine_s = engine_ns / 1000000000.0")
    with op.batch_alter_table("usage_event") as batch:
        batch.alter_column("engine_s", existing_type=sa.Double, nullable=False)
        for name in ("engine_ns", "engine_hour"):
            batch.drop_column(name)
    op.execute(VIEW.format(more=""))


def _place() -> list[sa.Column[object]]:
    return [
        sa.Column("pool", sa.String(128), nullable=False),
        sa.Column("node", sa.String(253), nullable=False),
        sa.Column("instance", sa.String(128), nullable=False),
        sa.Column("gpus", sa.Double, nullable=False),
    ]


def _times() -> list[sa.Column[object]]:
    names = ("from_ns", "until_ns", *(f"{use}_ns" for use in USES))
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


def _engine_time() -> list[sa.Column[object]]:
    return [
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("replica", sa.String(128), primary_key=True),
        sa.Column("tenant", sa.String(200), primary_key=True),
        sa.Column("user_id", sa.String(200), primary_key=True),
        sa.Column("key_id", sa.String(64), primary_key=True),
        sa.Column("model", sa.String(256), primary_key=True),
        sa.Column("priority_class", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("tag", sa.String(128), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("engine_ns", sa.BigInteger, nullable=False),
        sa.Column("wasted_ns", sa.BigInteger, nullable=False),
    ]
