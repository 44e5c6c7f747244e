"""The first of the keys that a key took the place of: its budget is theirs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_key", sa.Column("account", sa.String(64), nullable=True))
    op.create_index("api_key_by_account", "api_key", ["account"])


def downgrade() -> None:
    op.drop_index("api_key_by_account", "api_key")
    with op.batch_alter_table("api_key") as batch:
        batch.drop_column("account")
