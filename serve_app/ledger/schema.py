"""Tables of the database as code reads them. ``migrations/`` makes them.

Plain SQL types only: SQLite and PostgreSQL read the same schema. Times are wall seconds
since the epoch, amounts whole nano-dollars.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    column,
    table,
)

from serve_app.core.attribution import Use

METADATA: Final = MetaData()

# The last migration: a database at this revision has the tables below.
REVISION: Final = "0010"

API_KEY: Final = Table(
    "api_key",
    METADATA,
    Column("key_id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("tenant", String(200), nullable=False),
    Column("user_id", String(200)),
    Column("admin", Boolean, nullable=False),
    Column("priority_ceiling", SmallInteger, nullable=False),
    Column("models_json", Text),
    Column("created_at_s", Double, nullable=False),
    Column("expires_at_s", Double),
    Column("revoked_at_s", Double),
    # The first of the keys that it took the place of: whose budget it spends.
    Column("account", String(64)),
    Index("api_key_by_account", "account"),
)

# Counters that say "something changed": one row per thing that others keep a copy of.
META: Final = Table(
    "meta",
    METADATA,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

KEY_TABLE_VERSION: Final = "key_table_version"
LEDGER_VERSION: Final = "ledger_version"
PRICE_BOOK_VERSION: Final = "price_book_version"
# Grows with each Control: only the latest may grant parts of limits.
GRANT_EPOCH: Final = "grant_epoch"
BUDGET_VERSION: Final = "budget_version"
ADMIN_CHANGE_NUMBER: Final = "admin_change_number"
COUNTERS: Final = (
    KEY_TABLE_VERSION,
    LEDGER_VERSION,
    PRICE_BOOK_VERSION,
    GRANT_EPOCH,
    BUDGET_VERSION,
    ADMIN_CHANGE_NUMBER,
)

# Routers that may hold parts of limits; ``gone_at_s`` is when one was found to be gone.
GRANT_ROUTER: Final = Table(
    "grant_router",
    METADATA,
    Column("router", String(200), primary_key=True),
    Column("gone_at_s", Double),
)

# What rollups are kept by, hours apart. ``user_id`` and ``tag`` are empty without one.
DIMENSIONS: Final = ("tenant", "user_id", "key_id", "model", "priority_class", "tag")

# What an event adds to the sums of its dimensions. The rows of a request add up to its
# tally (ledger/tally.py), so that an event may add something negative.
SUMS: Final = (
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


def _numbers(*names: str) -> list[Column[Any]]:
    return [Column(name, BigInteger, nullable=False) for name in names]


def _dimensions() -> list[Column[Any]]:
    """Return DIMENSIONS as parts of a primary key."""
    return [
        Column("tenant", String(200), primary_key=True),
        Column("user_id", String(200), primary_key=True),
        Column("key_id", String(64), primary_key=True),
        Column("model", String(256), primary_key=True),
        Column("priority_class", SmallInteger, primary_key=True, autoincrement=False),
        Column("tag", String(128), primary_key=True),
    ]


# Append-only: no statement of this program changes or deletes a row. One row per request,
# attempt and witness; what a witness saw, the rates, and what the row adds to the sums.
USAGE_EVENT: Final = Table(
    "usage_event",
    METADATA,
    Column("request_id", String(64), primary_key=True),
    Column("attempt", SmallInteger, primary_key=True, autoincrement=False),
    Column("witness", String(8), primary_key=True),
    Column("hour", BigInteger, nullable=False),
    Column("tenant", String(200), nullable=False),
    Column("user_id", String(200), nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("model", String(256), nullable=False),
    Column("priority_class", SmallInteger, nullable=False),
    Column("tag", String(128), nullable=False),
    Column("pool", String(128), nullable=False),
    Column("endpoint", String(32), nullable=False),
    Column("client_label", String(128)),
    Column("batch", Boolean, nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("reason", String(64), nullable=False),
    Column("finish_reason", String(32), nullable=False),
    Column("degraded", String(64), nullable=False),
    Column("replica", String(128), nullable=False),
    Column("billable", Boolean, nullable=False),
    Column("exact", Boolean, nullable=False),
    Column("arrived_at_s", Double, nullable=False),
    Column("ended_at_s", Double, nullable=False),
    Column("recorded_at_s", Double, nullable=False),
    Column("queued_s", Double),
    Column("first_token_s", Double),
    Column("token_interval_s", Double),
    Column("duration_s", Double),
    Column("note", Text),
    Column("price_version", BigInteger, nullable=False),
    Column("card", String(128)),
    *_numbers(
        "prompt_tokens",
        "cached_prompt_tokens",
        "output_tokens",
        "engine_ns",
        "engine_hour",
        "kv_block_us",
        "input_rate_nanousd",
        "cached_rate_nanousd",
        "output_rate_nanousd",
        "request_rate_nanousd",
    ),
    *_numbers(*SUMS),
    Index("usage_event_by_hour", "hour", "tenant"),
)

# Derived from usage_event: rebuilt at will, checked against it.
USAGE_ROLLUP: Final = Table(
    "usage_rollup",
    METADATA,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    *_dimensions(),
    *_numbers(*SUMS),
)

PRICE_BOOK: Final = Table(
    "price_book",
    METADATA,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("created_at_s", Double, nullable=False),
    Column("note", Text, nullable=False),
)

RATE_CARD: Final = Table(
    "rate_card",
    METADATA,
    Column(
        "version",
        BigInteger,
        ForeignKey("price_book.version"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("name", String(128), primary_key=True),
    Column("tenant", String(200)),
    Column("model", String(256)),
    Column("priority_class", SmallInteger),
    Column("batch", Boolean),
    Column("from_s", BigInteger),
    Column("until_s", BigInteger),
    *_numbers("input_nanousd", "cached_input_nanousd", "output_nanousd", "request_nanousd"),
)

BUDGET: Final = Table(
    "budget",
    METADATA,
    Column("scope", String(16), primary_key=True),
    Column("id", String(401), primary_key=True),
    Column("amount_nanousd", BigInteger, nullable=False),
    Column("resets", String(16), nullable=False),
    Column("rolling_s", BigInteger, nullable=False),
    Column("alerts_json", Text, nullable=False),
    Column("hard", Boolean, nullable=False),
)

# What a router was granted of a budget's period and has let go of, in all.
BUDGET_GRANT: Final = Table(
    "budget_grant",
    METADATA,
    Column("scope", String(16), primary_key=True),
    Column("id", String(401), primary_key=True),
    Column("start_s", BigInteger, primary_key=True, autoincrement=False),
    Column("router", String(200), primary_key=True),
    *_numbers("granted", "released"),
)

# Derived from usage_rollup (ledger/spending.py): what budgets are held against.
SPENDING: Final = Table(
    "spending",
    METADATA,
    Column("scope", String(16), primary_key=True),
    Column("id", String(401), primary_key=True),
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    *_numbers("amount_nanousd"),
)

# Who changed what: append-only. ``number`` counts on without a gap. What a secret was is in no row.
ADMIN_CHANGE: Final = Table(
    "admin_change",
    METADATA,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at_s", Double, nullable=False),
    Column("actor", String(200), nullable=False),
    Column("via", String(16), nullable=False),
    Column("action", String(32), nullable=False),
    Column("subject", String(512), nullable=False),
    Column("before_json", Text),
    Column("after_json", Text),
    Column("note", Text, nullable=False),
)


def _place() -> list[Column[Any]]:
    return [
        Column("pool", String(128), nullable=False),
        Column("node", String(253), nullable=False),
        Column("instance", String(128), nullable=False),
        Column("gpus", Double, nullable=False),
    ]


# How a replica's time divides: one column for each attribution.Use.
USES_NS: Final = tuple(f"{use.value}_ns" for use in Use)
# And how much of it default coefficients split over requests.
PROVISIONAL_NS: Final = "provisional_ns"

# Append-only: a replica's life in pieces, each within an hour's account, numbered from 1.
REPLICA_PERIOD: Final = Table(
    "replica_period",
    METADATA,
    Column("replica", String(128), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("hour", BigInteger, nullable=False),
    *_place(),
    *_numbers("from_ns", "until_ns", *USES_NS, PROVISIONAL_NS),
    Column("recorded_at_s", Double, nullable=False),
    Index("replica_period_by_hour", "hour"),
)

# Derived from replica_period: its pieces of an hour in one.
REPLICA_HOUR: Final = Table(
    "replica_hour",
    METADATA,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("replica", String(128), primary_key=True),
    *_place(),
    *_numbers("from_ns", "until_ns", *USES_NS, PROVISIONAL_NS),
)

# Derived from the engines' rows of usage_event: whose time a replica's was. ``hour`` is the
# account the replica booked it on; ``wasted_ns`` is that of requests that did not complete.
# ``kv_block_us`` is what they held of the KV cache: a second figure, never added to time.
ENGINE_TIME: Final = Table(
    "engine_time",
    METADATA,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("replica", String(128), primary_key=True),
    *_dimensions(),
    *_numbers("requests", "engine_ns", "wasted_ns", "kv_block_us"),
)

# What a node was billed for an hour, as last read; nothing where the bill did not say.
NODE_BILL: Final = Table(
    "node_bill",
    METADATA,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),
    Column("node", String(253), primary_key=True),
    Column("total_nanousd", BigInteger),
    Column("gpu_ns", BigInteger),
    Column("read_at_s", Double, nullable=False),
)

# One row per request, both witnesses side by side.
USAGE_RECONCILIATION: Final = table(
    "usage_reconciliation",
    *(
        column(name)
        for name in (
            *("request_id", "hour", "tenant", "model", "outcome", "router_rows", "engine_rows"),
            *("delivered_tokens", "generated_tokens", "wasted_tokens", "wasted_nanousd"),
            *("amount_nanousd", "router_engine_ns", "engine_ns"),
        )
    ),
)
