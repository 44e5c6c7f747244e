"""Whether the books add up: every row, every request, every rollup, from the events alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, Final

from sqlalchemy import Connection, Row, func, select

from serve_app.core.calendar import HOUR_S
from serve_app.core.pricing import PriceBook, Priced, Rates
from serve_app.core.types import PriorityClass, TenantId, Usage
from serve_app.ledger.database import Database
from serve_app.ledger.engine_time import engine_time_differences
from serve_app.ledger.prices import read_book
from serve_app.ledger.schema import DIMENSIONS, SUMS, USAGE_EVENT, USAGE_ROLLUP
from serve_app.ledger.spending import spending_differences
from serve_app.ledger.tally import NOTHING, Tally, tally
from serve_app.ledger.usage import account_of, rates_of, tally_of
from serve_app.usage import Witness

LINES_MAX: Final = 100

_ROWS_AT_ONCE: Final = 5000


@dataclass(slots=True)
class Findings:
    """What was compared and what did not agree. ``lines`` holds the first LINES_MAX."""

    events: int = 0
    requests: int = 0
    rollups: int = 0
    amount_nanousd: int = 0
    differences: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Count a difference."""
        self.differences += 1
        if len(self.lines) < LINES_MAX:
            self.lines.append(line)


def verify(database: Database) -> Findings:
    """Recompute rows, bills and rollups from the events, at one moment, and compare.

    Raises:
        StoreUnavailable: the database failed.
    """
    findings = Findings()
    with database.snapshot() as connection:
        _verify_requests(connection, findings)
        _verify_rollups(connection, findings)
        for line in chain(spending_differences(connection), engine_time_differences(connection)):
            findings.add(line)
    return findings


def _verify_requests(connection: Connection, findings: Findings) -> None:
    books: dict[int, PriceBook | None] = {}
    query = select(USAGE_EVENT).order_by(
        USAGE_EVENT.c.request_id, USAGE_EVENT.c.attempt, USAGE_EVENT.c.witness
    )
    rows = connection.execute(query, execution_options={"yield_per": _ROWS_AT_ONCE})
    for _, group in groupby(rows, attrgetter("request_id")):
        events = list(group)
        findings.requests += 1
        for row in events:
            findings.events += 1
            findings.amount_nanousd += row.amount_nanousd
            if row.price_version not in books:
                books[row.price_version] = read_book(connection, row.price_version)
            for line in _row_problems(row, books[row.price_version]):
                findings.add(f"event {row.request_id}/{row.attempt}/{row.witness}: {line}")
        for line in _bill_problems(events):
            findings.add(f"request {events[0].request_id}: {line}")


def _row_problems(row: Row[Any], book: PriceBook | None) -> Iterator[str]:
    billed = Usage(row.billed_prompt_tokens, row.billed_cached_tokens, row.billed_output_tokens)
    rates = rates_of(row)
    amount = rates.cost_nanousd(billed, row.billed_requests)
    if amount != row.amount_nanousd:
        yield f"amount_nanousd is {row.amount_nanousd}, its tokens at its rates cost {amount}"
    if row.hour != int(row.arrived_at_s // HOUR_S) * HOUR_S:
        yield f"hour is {row.hour}, it arrived at {row.arrived_at_s}"
    if book is None:
        yield f"there is no price version {row.price_version}"
        return
    card = book.find(
        Priced(
            tenant=TenantId(row.tenant),
            model=row.model,
            priority_class=PriorityClass(row.priority_class),
            at_s=row.arrived_at_s,
            batch=bool(row.batch),
        )
    )
    if rates != (Rates() if card is None else card.rates):
        yield f"its rates are not those of price version {row.price_version}"


def _bill_problems(events: Iterable[Row[Any]]) -> Iterator[str]:
    witnessed = [row for row in events if row.witness != Witness.OPERATOR]
    if not witnessed:
        yield "corrections of a request that is not there"
        return
    expected = tally(map(account_of, witnessed), rates_of(witnessed[0]))
    total = sum(map(tally_of, witnessed), NOTHING)
    yield from _differences(total, expected, "its accounts come to")


def _verify_rollups(connection: Connection, findings: Findings) -> None:
    names = ("hour", *DIMENSIONS)
    keys = [USAGE_EVENT.c[name] for name in names]
    sums = select(*keys, *(func.sum(USAGE_EVENT.c[name]).label(name) for name in SUMS))
    expected = {
        tuple(row[: len(names)]): _tally_of_sums(row)
        for row in connection.execute(sums.group_by(*keys))
    }
    rollups = select(*(USAGE_ROLLUP.c[name] for name in (*names, *SUMS)))
    for row in connection.execute(rollups):
        findings.rollups += 1
        key = tuple(row[: len(names)])
        where = "rollup " + "/".join(str(part) for part in key)
        for line in _differences(_tally_of_sums(row), expected.pop(key, NOTHING), "events add to"):
            findings.add(f"{where}: {line}")
    for key, missing in expected.items():
        where = "rollup " + "/".join(str(part) for part in key)
        findings.add(f"{where}: missing; its events add to {missing.amount_nanousd} nano-dollars")


def _tally_of_sums(row: Row[Any]) -> Tally:
    # PostgreSQL's sums are of its arbitrary-precision type.
    return Tally(*(int(getattr(row, name)) for name in SUMS))


def _differences(found: Tally, expected: Tally, what: str) -> Iterator[str]:
    if found == expected:
        return
    pairs = zip(found.columns().items(), expected.columns().values(), strict=True)
    for (name, value), wanted in pairs:
        if value != wanted:
            yield f"{name} is {value}, {what} {wanted}"
