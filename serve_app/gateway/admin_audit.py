"""/admin/audit: who changed what, by whoever has an admin key.

GET /admin/audit?limit=100&before=1234&subject=budget&actor=key%20k7f3m2qa    the latest first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.changes import Change, ChangeQuery, change_json, change_query
from serve_app.gateway.admin import checked_values, from_control, json_answer
from serve_app.gateway.auth import require_admin
from serve_app.keys import KeyRecord


class ChangeReader(Protocol):
    """Where the audit trail is, as this module needs it: Control, from any router."""

    async def changes(self, query: ChangeQuery) -> Sequence[Change]:
        """Return the changes asked for, the latest first."""


class AuditAdministration:
    """The handler. ``caller`` authenticates a request and returns the key it came with."""

    def __init__(self, caller: Callable[[Scope], KeyRecord], reader: ChangeReader) -> None:
        self._caller = caller
        self._reader = reader

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route("/admin/audit", self.changes, methods=["GET"])]

    async def changes(self, request: Request) -> Response:
        """Answer with the changes asked for."""
        require_admin(self._caller(request.scope))
        with checked_values():
            query = change_query(request.query_params)
        found = await from_control(self._reader.changes(query))
        return json_answer({"object": "list", "data": [change_json(each) for each in found]})
