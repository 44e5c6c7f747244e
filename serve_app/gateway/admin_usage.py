"""/admin/usage: what was used and what it cost, by whoever has an admin key.

GET  /admin/usage?by=tenant,model&from=2026-01-01&to=2026-02-01&format=json
POST /admin/usage/{request_id}/reversal    take back its bill: {"reason": "..."}
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, Protocol

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.changes import Actor, Reversal, reason_of
from serve_app.core.pricing import dollars
from serve_app.errors import InvalidRequest, NotFound
from serve_app.gateway.admin import (
    actor,
    checked_values,
    from_control,
    json_answer,
    parameters,
    read_fields,
    validated,
)
from serve_app.gateway.auth import require_admin
from serve_app.keys import KeyRecord
from serve_app.usage_report import (
    FOCUS_FORMATS,
    UsageQuery,
    focus_csv,
    to_csv,
    usage_query,
)

logger = logging.getLogger("headrace.admin")

_FORMATS: Final = ("json", "csv", *FOCUS_FORMATS)


class UsageReporter(Protocol):
    """Where the ledger is, as this module needs it: Control, from any router."""

    async def usage(self, query: UsageQuery) -> dict[str, Any]:
        """Return a report; see ledger.report."""

    async def insight(self, name: str, query: UsageQuery) -> dict[str, Any]:
        """Return a report on cost; see ledger.insights."""

    async def reverse_usage(self, request_id: str, reason: str, by: Actor) -> Reversal | None:
        """Take back what a request was billed; None if there is no such request."""


class ReversalRequest(BaseModel):
    """Why a bill is taken back."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    reason: str


def reversal_json(done: Reversal) -> dict[str, Any]:
    """Return what was taken back as the API shows it."""
    return {
        "object": "usage_reversal",
        "request_id": done.request_id,
        "taken_back_usd": dollars(done.amount_nanousd),
        "new": done.new,
    }


class UsageAdministration:
    """The handler. ``caller`` authenticates a request and returns the key it came with."""

    def __init__(self, caller: Callable[[Scope], KeyRecord], reporter: UsageReporter) -> None:
        self._caller = caller
        self._reporter = reporter

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/admin/usage", self.usage, methods=["GET"]),
            Route("/admin/usage/{request_id}/reversal", self.reverse, methods=["POST"]),
        ]

    async def usage(self, request: Request) -> Response:
        """Answer with the sums asked for, as JSON or CSV, or with FOCUS rows."""
        require_admin(self._caller(request.scope))
        query, form = _query(request)
        if form in FOCUS_FORMATS:
            rows = await from_control(self._reporter.insight(FOCUS_FORMATS[form], query))
            return _csv(focus_csv(rows))
        report = await from_control(self._reporter.usage(query))
        return json_answer(report) if form == "json" else _csv(to_csv(report))

    async def reverse(self, request: Request) -> Response:
        """Take back what a request was billed; doing it twice takes back once."""
        caller = self._caller(request.scope)
        require_admin(caller)
        wanted = validated(ReversalRequest, await read_fields(request))
        with checked_values():
            reason = reason_of(wanted.reason)
        name = request.path_params["request_id"]
        done = await from_control(self._reporter.reverse_usage(name, reason, actor(caller)))
        if done is None:
            raise NotFound(f"The ledger has no request {name!r:.80}.", param="request_id")
        logger.info("bill of request %s taken back by key %s", done.request_id, caller.key_id)
        return json_answer(reversal_json(done), status=201 if done.new else 200)


def _csv(text: str) -> Response:
    return Response(text, headers={"cache-control": "no-store"}, media_type="text/csv")


def _query(request: Request) -> tuple[UsageQuery, str]:
    given = parameters(request, "by", "from", "to", "format")
    form = given.get("format", "json")
    if form not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise InvalidRequest(
            f"Invalid value for 'format': one of {known} (got {form!r:.40}).", param="format"
        )
    with checked_values():
        return usage_query(given.get("by", ""), given.get("from"), given.get("to")), form
