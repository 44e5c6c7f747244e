"""Price books: versions that never change, and the one in force."""

from __future__ import annotations

import pytest

from serve_app.core.pricing import RateCard, Rates
from serve_app.core.types import PriorityClass, TenantId
from serve_app.ledger.database import Database
from serve_app.ledger.prices import BookLine, PriceStore

ANY = RateCard("any", Rates(1, 2, 3, 4))
FULL = RateCard("full", Rates(5), TenantId("acme"), "small", PriorityClass.CRITICAL, True, 10, 20)


@pytest.fixture
def store(database: Database) -> PriceStore:
    return PriceStore(database, lambda: 12.5)


def test_a_new_database_has_an_empty_book(store: PriceStore) -> None:
    assert (store.version(), store.current().cards, store.books()) == (0, (), [])


def test_cards_come_back_as_they_were_stored(store: PriceStore, database: Database) -> None:
    assert store.replace([FULL, ANY], "first") == 1
    book = PriceStore(database).current()
    assert (book.version, book.cards) == (1, (ANY, FULL))
    assert store.books() == [BookLine(1, 12.5, 2, "first")]


def test_a_version_stays_as_it_was_when_another_replaces_it(store: PriceStore) -> None:
    store.replace([ANY], "first")
    store.replace([FULL], "second")
    store.replace([], "everything free again")
    assert [store.book(version).cards for version in range(4)] == [  # type: ignore[union-attr]  # all are there
        (),
        (ANY,),
        (FULL,),
        (),
    ]
    assert store.book(4) is None
    assert store.version() == 3


def test_the_same_cards_again_are_no_new_version(store: PriceStore) -> None:
    assert store.replace([], "nothing") == 0
    assert store.replace([ANY, FULL], "first") == 1
    assert store.replace([FULL, ANY], "the same") == 1
    assert store.version() == 1
    assert len(store.books()) == 1
