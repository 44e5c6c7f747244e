"""/admin/usage/...: reports on what it truly cost, by whoever has an admin key.

GET /admin/usage/economics?from=2026-01-01&to=2026-02-01      and so on for each of INSIGHTS
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.gateway.admin import checked_values, from_control, json_answer, parameters
from serve_app.gateway.auth import require_admin
from serve_app.keys import KeyRecord
from serve_app.usage_report import INSIGHTS, UsageQuery, usage_query


class Insights(Protocol):
    """Where the reports are made: Control, from any router."""

    async def insight(self, name: str, query: UsageQuery) -> dict[str, Any]:
        """Return a report; see ledger.insights."""


class CostAdministration:
    """The handlers. ``caller`` authenticates a request and returns the key it came with."""

    def __init__(self, caller: Callable[[Scope], KeyRecord], insights: Insights) -> None:
        self._caller = caller
        self._insights = insights

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [Route(f"/admin/usage/{name}", self.report, methods=["GET"]) for name in INSIGHTS]

    async def report(self, request: Request) -> Response:
        """Answer with the report that the path names, as JSON."""
        require_admin(self._caller(request.scope))
        given = parameters(request, "from", "to")
        with checked_values():
            query = usage_query("", given.get("from"), given.get("to"))
        name = request.url.path.rpartition("/")[2]
        return json_answer(await from_control(self._insights.insight(name, query)))
