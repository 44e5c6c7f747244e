"""Price books by version: a new one replaces the last from the next request on.

Old versions stay: a request is priced by the version that its ticket was made with, however
late its record arrives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select

from serve_app.changes import PROGRAM, Actor
from serve_app.core.pricing import PriceBook, RateCard, Rates
from serve_app.core.types import PriorityClass, TenantId
from serve_app.ledger.database import Database
from serve_app.ledger.schema import META, PRICE_BOOK, PRICE_BOOK_VERSION, RATE_CARD
from serve_app.ledger.trail import note_change
from serve_app.price_file import BookLine


class PriceStore:
    """Price books in a database. Synchronous: call it from a thread, not from a loop.

    Version 0 is there from the start and empty: everything is free.
    """

    def __init__(self, database: Database, wall_clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._wall_clock = wall_clock
        # A version never changes once it is there.
        self._known: dict[int, PriceBook] = {0: PriceBook(0)}

    def version(self) -> int:
        """Return the version in force: one indexed row, cheap enough to poll."""
        with self._database.transaction() as connection:
            return _version(connection)

    def current(self) -> PriceBook:
        """Return the book in force."""
        book = self.book(self.version())
        assert book is not None, "a version is raised together with its book"
        return book

    def book(self, version: int) -> PriceBook | None:
        """Return a version's book, or None if there is no such version."""
        if version not in self._known:
            with self._database.transaction() as connection:
                found = read_book(connection, version)
            if found is None:
                return None
            self._known[version] = found
        return self._known[version]

    def books(self) -> list[BookLine]:
        """Return every version but the empty one, oldest first."""
        count = (
            select(func.count())
            .where(RATE_CARD.c.version == PRICE_BOOK.c.version)
            .scalar_subquery()
        )
        query = select(PRICE_BOOK, count.label("cards")).order_by(PRICE_BOOK.c.version)
        with self._database.transaction() as connection:
            return [
                BookLine(row.version, row.created_at_s, row.cards, row.note)
                for row in connection.execute(query)
            ]

    def replace(self, cards: Sequence[RateCard], note: str, by: Actor = PROGRAM) -> int:
        """Put cards in force in place of all that were; return their version.

        The cards have none of the problems that ``pricing.problems`` finds. Cards that are
        in force already make no new version.
        """
        ordered = sorted(cards, key=lambda card: card.name)
        with self._database.change(PRICE_BOOK_VERSION) as connection:
            version = _version(connection)
            before = read_book(connection, version - 1)
            if before is not None and sorted(before.cards, key=lambda c: c.name) == ordered:
                # Nothing changed, so the counter must not have either.
                connection.rollback()
                return version - 1
            connection.execute(
                insert(PRICE_BOOK).values(
                    version=version, created_at_s=self._wall_clock(), note=note
                )
            )
            if ordered:
                connection.execute(insert(RATE_CARD), [_row(version, card) for card in ordered])
            # Versions stay: which one it was says what its cards were.
            known = () if before is None else before.cards
            note_change(
                connection,
                by,
                "prices.import",
                "prices",
                at_s=self._wall_clock(),
                before={"version": version - 1, "cards": len(known)},
                after={"version": version, "cards": len(ordered)},
                note=note,
            )
        return version


def read_book(connection: Connection, version: int) -> PriceBook | None:
    """Return a version's book, or None if there is no such version."""
    if version == 0:
        return PriceBook(0)
    known = select(PRICE_BOOK.c.version).where(PRICE_BOOK.c.version == version)
    if connection.execute(known).first() is None:
        return None
    query = select(RATE_CARD).where(RATE_CARD.c.version == version).order_by(RATE_CARD.c.name)
    return PriceBook(version, [_card(row) for row in connection.execute(query)])


def _version(connection: Connection) -> int:
    query = select(META.c.value).where(META.c.name == PRICE_BOOK_VERSION)
    return int(connection.execute(query).scalar_one())


def _row(version: int, card: RateCard) -> dict[str, object]:
    return {
        "version": version,
        "name": card.name,
        "tenant": card.tenant,
        "model": card.model,
        "priority_class": None if card.priority_class is None else int(card.priority_class),
        "batch": card.batch,
        "from_s": card.from_s,
        "until_s": card.until_s,
        "input_nanousd": card.rates.input_nanousd,
        "cached_input_nanousd": card.rates.cached_input_nanousd,
        "output_nanousd": card.rates.output_nanousd,
        "request_nanousd": card.rates.request_nanousd,
    }


def _card(row: Row[Any]) -> RateCard:
    return RateCard(
        name=row.name,
        rates=Rates(
            row.input_nanousd, row.cached_input_nanousd, row.output_nanousd, row.request_nanousd
        ),
        tenant=None if row.tenant is None else TenantId(row.tenant),
        model=row.model,
        priority_class=None if row.priority_class is None else PriorityClass(row.priority_class),
        batch=None if row.batch is None else bool(row.batch),
        from_s=row.from_s,
        until_s=row.until_s,
    )
