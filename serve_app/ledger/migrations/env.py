"""Alembic's environment: the migrations run on the connection they are handed."""

from __future__ import annotations

from alembic import context

from serve_app.ledger.migrate import CONNECTION

context.configure(
    connection=context.config.attributes[CONNECTION],
    transactional_ddl=True,
    # SQLite changes a column by copying its table; Alembic does it where it must.
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
