"""/admin/usage: what was used and what it cost, by whoever has an admin key.

GET /admin/usage?by=tenant,model&from=2026-01-01&to=2026-02-01&format=json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.errors import InvalidRequest
from serve_app.gateway.admin import from_control, json_answer
from serve_app.gateway.auth import require_admin
from serve_app.keys import KeyRecord
from serve_app.usage_report import BadQuery, UsageQuery, to_csv, usage_query

_PARAMETERS: Final = ("by", "from", "to", "format")


class UsageReporter(Protocol):
    """Where the ledger is, as this module needs it: Control, from any router."""

    async def usage(self, query: UsageQuery) -> dict[str, Any]:
        """Return a report; see ledger.report."""


class UsageAdministration:
    """The handler. ``caller`` authenticates a request and returns the key it came with."""

    def __init__(self, caller: Callable[[Scope], KeyRecord], reporter: UsageReporter) -> None:
        self._caller = caller
        self._reporter = reporter

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route("/admin/usage", self.usage, methods=["GET"])]

    async def usage(self, request: Request) -> Response:
        """Answer with the sums asked for, as JSON or CSV."""
        require_admin(self._caller(request.scope))
        query, form = _query(request)
        report = await from_control(self._reporter.usage(query))
        if form == "json":
            return json_answer(report)
        return Response(
            to_csv(report), headers={"cache-control": "no-store"}, media_type="text/csv"
        )


def _query(request: Request) -> tuple[UsageQuery, str]:
    given = request.query_params
    for name in given:
        if name not in _PARAMETERS:
            known = ", ".join(_PARAMETERS)
            raise InvalidRequest(f"Unknown parameter {name!r:.40}; known are {known}.", param=name)
    form = given.get("format", "json")
    if form not in ("json", "csv"):
        raise InvalidRequest(
            f"Invalid value for 'format': json or csv (got {form!r:.40}).", param="format"
        )
    try:
        return usage_query(given.get("by", ""), given.get("from"), given.get("to")), form
    except BadQuery as error:
        raise InvalidRequest(f"Invalid value for {error}.", param=error.field) from None
