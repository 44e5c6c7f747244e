"""The ledger of usage: events in, each once, with their rollups in the same transaction.

Every event is priced when it is committed, by the price version its ticket was made with,
and holds its rates. Nothing that is committed changes: a late account of a known request
adds a row with the difference, a correction a row that takes back what was billed.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    Row,
    String,
    Text,
    cast,
    delete,
    func,
    insert,
    literal,
    select,
)

from serve_app.changes import PROGRAM, Actor, Reversal
from serve_app.core.calendar import HOUR_S
from serve_app.core.pricing import PriceBook, Priced, Rates, dollars
from serve_app.core.types import Usage
from serve_app.ledger.database import Database
from serve_app.ledger.engine_time import add_engine_time, add_periods, rebuild_engine_time
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.schema import (
    DIMENSIONS,
    LEDGER_VERSION,
    SUMS,
    USAGE_EVENT,
    USAGE_ROLLUP,
)
from serve_app.ledger.spending import add_spending, rebuild_spending
from serve_app.ledger.statements import some_at_a_time, upsert
from serve_app.ledger.tally import NOTHING, Account, Tally, tally
from serve_app.ledger.trail import note_change
from serve_app.usage import LedgerRecord, ReplicaPeriod, UsageRecord, Witness, arrived_at_s

logger = logging.getLogger("headrace.ledger")

_OF_THE_WITNESS: Final = (
    *("prompt_tokens", "cached_prompt_tokens", "output_tokens"),
    *("engine_ns", "kv_block_us"),
)
_ROLLUP_KEY: Final = ("hour", *DIMENSIONS)
_LENGTHS: Final = {
    column.name: column.type.length or 0
    for column in USAGE_EVENT.columns
    if isinstance(column.type, String)
}
_KNOWN: Final = select(
    *(
        USAGE_EVENT.c[name]
        for name in (
            *("request_id", "attempt", "witness", "outcome", "billable"),
            *("prompt_tokens", "cached_prompt_tokens", "output_tokens"),
            *("price_version", "card", "input_rate_nanousd", "cached_rate_nanousd"),
            *("output_rate_nanousd", "request_rate_nanousd", *SUMS),
        )
    )
)


@dataclass(frozen=True, slots=True)
class Committed:
    """How many records were new, and how many the ledger had already."""

    new: int
    known: int


@dataclass(slots=True)
class _Request:
    """A request as the ledger has it: how it is priced, its accounts, what its rows add to."""

    price_version: int
    card: str | None
    rates: Rates
    accounts: dict[tuple[str, int], Account] = field(default_factory=dict)
    total: Tally = NOTHING
    corrections: int = 0
    corrected: Tally = NOTHING


class UsageLedger:
    """Usage events in a database. Synchronous: call it from a thread, not from a loop.

    Writers queue behind one row's lock, so that what one has read of a request is still
    true when it adds to it. Every method raises StoreUnavailable if the database fails.
    """

    def __init__(
        self,
        database: Database,
        prices: PriceStore,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._prices = prices
        self._wall_clock = wall_clock

    def commit(self, given: Sequence[LedgerRecord]) -> Committed:
        """Add the records that are not there yet; when this returns, they are on the disk."""
        records = [each for each in given if isinstance(each, UsageRecord)]
        periods = [each for each in given if isinstance(each, ReplicaPeriod)]
        books = self._books(records)
        rows: list[dict[str, Any]] = []
        sums: dict[tuple[Any, ...], Tally] = defaultdict(lambda: NOTHING)
        now_s = self._wall_clock()
        with self._database.change(LEDGER_VERSION) as connection:
            known = _load(connection, {record.charge.request_id for record in records})
            for record in records:
                request = known.get(record.charge.request_id)
                if request is None:
                    request = known[record.charge.request_id] = _price(record, books)
                added = _add(request, record)
                if added is not None:
                    row = _row(record, request, now_s)
                    rows.append(row | added.columns())
                    key = tuple(row[name] for name in _ROLLUP_KEY)
                    sums[key] += added
            if rows:
                connection.execute(insert(USAGE_EVENT), rows)
                _add_up(connection, sums)
                add_engine_time(connection, rows)
            new = len(rows) + (add_periods(connection, periods, now_s) if periods else 0)
        return Committed(new, len(given) - new)

    def reverse(self, request_id: str, note: str, by: Actor = PROGRAM) -> Reversal | None:
        """Take back what a request was billed, by a row of its own that says why.

        Doing it twice takes back once: of a request whose bill grew since then, the rest.
        None if the request is unknown.
        """
        with self._database.change(LEDGER_VERSION) as connection:
            request = _load(connection, {request_id}).get(request_id)
            if request is None:
                return None
            left = request.total + request.corrected
            back = left.taken_back()
            if back == NOTHING:
                return Reversal(request_id, 0, new=False)
            first = connection.execute(
                select(USAGE_EVENT).where(USAGE_EVENT.c.request_id == request_id).limit(1)
            ).one()
            row = {
                **first._mapping,
                **dict.fromkeys(_OF_THE_WITNESS, 0),
                **back.columns(),
                "witness": Witness.OPERATOR.value,
                "attempt": request.corrections + 1,
                "recorded_at_s": self._wall_clock(),
                "note": note,
            }
            connection.execute(insert(USAGE_EVENT), row)
            _add_up(connection, {tuple(row[name] for name in _ROLLUP_KEY): back})
            note_change(
                connection,
                by,
                "usage.reverse",
                f"request {request_id}",
                at_s=self._wall_clock(),
                before=_billed(left),
                after=_billed(left + back),
                note=note,
            )
        return Reversal(request_id, -back.amount_nanousd, new=True)

    def rebuild(self) -> int:
        """Make the rollups anew from the events; return how many there are."""
        names = [*_ROLLUP_KEY, *SUMS]
        keys = [USAGE_EVENT.c[name] for name in _ROLLUP_KEY]
        with self._database.change(LEDGER_VERSION) as connection:
            connection.execute(delete(USAGE_ROLLUP))
            query = select(*keys, *(func.sum(USAGE_EVENT.c[name]) for name in SUMS))
            connection.execute(insert(USAGE_ROLLUP).from_select(names, query.group_by(*keys)))
            rebuild_spending(connection)
            rebuild_engine_time(connection)
            count = connection.execute(select(func.count()).select_from(USAGE_ROLLUP))
            return int(count.scalar_one())

    def _books(self, records: Sequence[UsageRecord]) -> Mapping[int, PriceBook]:
        """Return the price books that records name, read before the ledger is locked."""
        books: dict[int, PriceBook] = {}
        for version in {record.charge.price_version for record in records}:
            book = self._prices.book(version)
            if book is None:
                # A database that was replaced: the request happened and is not lost for it.
                book = self._prices.current()
                logger.error(
                    "price version %d is unknown, version %d is used", version, book.version
                )
            books[version] = book
        return books


def rates_of(row: Row[Any]) -> Rates:
    """Return the rates an event was priced at."""
    return Rates(
        row.input_rate_nanousd,
        row.cached_rate_nanousd,
        row.output_rate_nanousd,
        row.request_rate_nanousd,
    )


def account_of(row: Row[Any]) -> Account:
    """Return what an event's witness said."""
    usage = Usage(row.prompt_tokens, row.cached_prompt_tokens, row.output_tokens)
    return Account(row.witness, row.attempt, row.outcome, bool(row.billable), usage)


def tally_of(row: Row[Any]) -> Tally:
    """Return what an event adds."""
    return Tally(*(getattr(row, name) for name in SUMS))


def _billed(of: Tally) -> dict[str, Any]:
    """Return a bill as the audit trail tells it."""
    return {
        "billed_requests": of.billed_requests,
        "prompt_tokens": of.billed_prompt_tokens,
        "cached_prompt_tokens": of.billed_cached_tokens,
        "output_tokens": of.billed_output_tokens,
        "amount_usd": dollars(of.amount_nanousd),
    }


def _load(connection: Connection, request_ids: Iterable[str]) -> dict[str, _Request]:
    """Return what the ledger has of these requests."""
    known: dict[str, _Request] = {}
    for some in some_at_a_time(list(request_ids)):
        for row in connection.execute(_KNOWN.where(_is_one_of(connection, some))):
            request = known.get(row.request_id)
            if request is None:
                request = _Request(row.price_version, row.card, rates_of(row))
                known[row.request_id] = request
            if row.witness == Witness.OPERATOR:
                request.corrections += 1
                request.corrected += tally_of(row)
            else:
                request.accounts[row.witness, row.attempt] = account_of(row)
                request.total += tally_of(row)
    return known


def _is_one_of(connection: Connection, ids: list[str]) -> ColumnElement[bool]:
    if connection.dialect.name == "postgresql":
        # As one array that is joined: its plan for a long list of parameters, once it is
        # prepared, compares every row of the table with every parameter.
        wanted = func.unnest(cast(literal(ids, ARRAY(Text)), ARRAY(Text)))
        return USAGE_EVENT.c.request_id.in_(select(wanted))
    return USAGE_EVENT.c.request_id.in_(ids)


def _price(record: UsageRecord, books: Mapping[int, PriceBook]) -> _Request:
    charge = record.charge
    book = books[charge.price_version]
    card = book.find(priced(record))
    return _Request(
        book.version, None if card is None else card.name, Rates() if card is None else card.rates
    )


def priced(record: UsageRecord) -> Priced:
    """Return what a record's price depends on."""
    charge = record.charge
    return Priced(
        tenant=charge.tenant,
        model=charge.model,
        priority_class=charge.priority_class,
        at_s=arrived_at_s(charge.request_id),
        batch=charge.batch,
    )


def _add(request: _Request, record: UsageRecord) -> Tally | None:
    """Take a record into its request; return what it adds, or None if it is known."""
    key = (record.witness.value, record.attempt)
    if key in request.accounts:
        return None
    request.accounts[key] = Account(
        witness=record.witness.value,
        attempt=record.attempt,
        outcome=record.outcome,
        billable=record.billable,
        usage=Usage(record.prompt_tokens, record.cached_prompt_tokens, record.output_tokens),
    )
    after = tally(request.accounts.values(), request.rates)
    added = after - request.total
    request.total = after
    return added


def _row(record: UsageRecord, request: _Request, now_s: float) -> dict[str, Any]:
    charge, rates = record.charge, request.rates
    arrived_s = arrived_at_s(charge.request_id)
    return {
        "request_id": charge.request_id,
        "attempt": record.attempt,
        "witness": record.witness.value,
        "hour": int(arrived_s // HOUR_S) * HOUR_S,
        "tenant": _text("tenant", charge.tenant),
        "user_id": _text("user_id", charge.user),
        "key_id": _text("key_id", charge.key),
        "model": _text("model", charge.model),
        "priority_class": int(charge.priority_class),
        "tag": _text("tag", charge.tag),
        "pool": _text("pool", charge.pool),
        "endpoint": _text("endpoint", charge.endpoint),
        "client_label": (
            None if charge.client_label is None else _text("client_label", charge.client_label)
        ),
        "batch": charge.batch,
        "outcome": _text("outcome", record.outcome),
        "reason": _text("reason", record.reason),
        "finish_reason": _text("finish_reason", record.finish_reason),
        "degraded": _text("degraded", record.degraded),
        "replica": _text("replica", record.replica),
        "billable": record.billable,
        "exact": record.exact,
        "arrived_at_s": arrived_s,
        "ended_at_s": record.ended_at_s,
        "recorded_at_s": now_s,
        "queued_s": record.queued_s,
        "first_token_s": record.first_token_s,
        "token_interval_s": record.token_interval_s,
        "duration_s": record.duration_s,
        "engine_ns": record.engine_ns,
        "engine_hour": record.engine_hour or int(arrived_s // HOUR_S) * HOUR_S,
        "kv_block_us": record.kv_block_us,
        "note": None,
        "price_version": request.price_version,
        "card": request.card,
        "prompt_tokens": record.prompt_tokens,
        "cached_prompt_tokens": record.cached_prompt_tokens,
        "output_tokens": record.output_tokens,
        "input_rate_nanousd": rates.input_nanousd,
        "cached_rate_nanousd": rates.cached_input_nanousd,
        "output_rate_nanousd": rates.output_nanousd,
        "request_rate_nanousd": rates.request_nanousd,
    }


def _text(column: str, value: str) -> str:
    """Return a text that its column takes: one bad record must not hold up all others."""
    return value.replace("\0", "")[: _LENGTHS[column]]


def _add_up(connection: Connection, sums: Mapping[tuple[Any, ...], Tally]) -> None:
    new = upsert(connection, USAGE_ROLLUP)
    statement = new.on_conflict_do_update(
        index_elements=_ROLLUP_KEY,
        set_={name: USAGE_ROLLUP.c[name] + new.excluded[name] for name in SUMS},
    )
    # In order, so that the pages of the table are touched in order.
    rows = [dict(zip(_ROLLUP_KEY, key, strict=True)) | sums[key].columns() for key in sorted(sums)]
    connection.execute(statement, rows)
    add_spending(connection, _ROLLUP_KEY, sums)
