"""/admin/prices: price books listed, shown and put in force, by whoever has an admin key.

GET  /admin/prices              every version, the one in force marked
GET  /admin/prices/{version}    its cards, as they are imported; ``current`` is the one in force
POST /admin/prices?note=why     a whole book, in force from the next request on:
                                {"currency": "USD", "cards": {"all": {"input": "0.1", ...}}}
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.changes import Actor
from serve_app.core.pricing import PriceBook, RateCard
from serve_app.errors import ConfigError, InvalidRequest, NotFound
from serve_app.gateway.admin import actor, from_control, json_answer, parameters
from serve_app.gateway.auth import require_admin
from serve_app.gateway.http import read_body, require_json
from serve_app.gateway.invalid import parse_object
from serve_app.keys import KeyRecord
from serve_app.price_file import BookLine, checked_cards, to_document
from serve_app.usage_report import iso_time

logger = logging.getLogger("headrace.admin")

_MAX_BODY_BYTES = 2**20
_MAX_NOTE = 1000
_PROBLEMS_SHOWN = 20


class PriceAdmin(Protocol):
    """Where prices are kept, as this module needs it: Control, from any router."""

    async def price_books(self) -> tuple[Sequence[BookLine], int]:
        """Return every version but the empty one, and the one in force."""

    async def price_book(self, version: int | None) -> PriceBook | None:
        """Return a version's book, or the one in force; None if there is no such version."""

    async def import_prices(
        self, cards: Sequence[RateCard], note: str, by: Actor
    ) -> tuple[int, bool]:
        """Put cards in force; return their version, and whether it is a new one."""


class PriceAdministration:
    """The handlers. ``caller`` authenticates a request and returns the key it came with."""

    def __init__(self, caller: Callable[[Scope], KeyRecord], prices: PriceAdmin) -> None:
        self._caller = caller
        self._prices = prices

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/admin/prices", self.every, methods=["GET"]),
            Route("/admin/prices", self.load, methods=["POST"]),
            Route("/admin/prices/{version}", self.show, methods=["GET"]),
        ]

    async def every(self, request: Request) -> Response:
        """Answer with every version, oldest first."""
        require_admin(self._caller(request.scope))
        books, current = await from_control(self._prices.price_books())
        lines = [
            {
                "object": "price_book",
                "version": book.version,
                "created_at": iso_time(book.created_at_s),
                "cards": book.cards,
                "note": book.note,
                "in_force": book.version == current,
            }
            for book in books
        ]
        return json_answer({"object": "list", "data": lines})

    async def show(self, request: Request) -> Response:
        """Answer with a version's cards."""
        require_admin(self._caller(request.scope))
        wanted = request.path_params["version"]
        version = (
            int(wanted) if wanted.isascii() and wanted.isdigit() and len(wanted) < 19 else None
        )
        book = None
        if version is not None or wanted == "current":
            book = await from_control(self._prices.price_book(version))
        if book is None:
            raise NotFound(f"There is no version {wanted!r:.40}.", param="version")
        document = to_document(book.cards)
        return json_answer({"object": "price_book", "version": book.version, **document})

    async def load(self, request: Request) -> Response:
        """Put a price book in force; one that is already makes no new version."""
        caller = self._caller(request.scope)
        require_admin(caller)
        require_json(request.scope)
        note = _note(request)
        body = await read_body(request.scope, request.receive, _MAX_BODY_BYTES)
        parse_object(body)
        # Thousands of cards take a while.
        cards = await asyncio.to_thread(_cards, body)
        by = actor(caller)
        version, new = await from_control(self._prices.import_prices(cards, note, by))
        logger.info("price version %d imported by key %s", version, caller.key_id)
        answer = {"object": "price_book", "version": version, "cards": len(cards), "new": new}
        return json_answer(answer, status=201 if new else 200)


def _note(request: Request) -> str:
    note = parameters(request, "note").get("note", "")
    if len(note) > _MAX_NOTE or "\0" in note:
        raise InvalidRequest(f"A note has at most {_MAX_NOTE} characters.", param="note")
    return note


def _cards(body: bytes) -> list[RateCard]:
    """Return the cards of a price book in JSON, its numbers read as they are written.

    Raises:
        InvalidRequest: what `headrace prices check` would say of it.
    """
    try:
        document = json.loads(body, parse_float=str, object_pairs_hook=_without_doubles)
        return checked_cards(document)
    except ConfigError as error:
        lines = str(error).splitlines()
        more = len(lines) - _PROBLEMS_SHOWN
        shown = "; ".join(lines[:_PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise InvalidRequest(f"Invalid price book: {shown}.", param=_field(lines[0])) from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{double}: stands twice; names must differ")
    return found


def _field(line: str) -> str | None:
    return line.partition(": ")[0][:200] or None
