"""/admin/usage/economics and the other reports on cost, over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Scope

from serve_app.gateway.admin_costs import CostAdministration
from serve_app.gateway.auth import authenticate
from serve_app.gateway.http import exception_handlers
from serve_app.keys import KeyRecord, KeyTable, KeyWish, bootstrap_record, new_key
from serve_app.usage_report import INSIGHTS, UsageQuery

ADMIN = "the-admin-key"


class Insights:
    """Control's part: keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, UsageQuery]] = []

    async def insight(self, name: str, query: UsageQuery) -> dict[str, Any]:
        self.asked.append((name, query))
        return {"object": name}


OTHER = new_key(KeyWish(name="other"), 0.0)


@pytest.fixture
def insights() -> Insights:
    return Insights()


@pytest.fixture
def client(insights: Insights) -> TestClient:
    table = KeyTable([bootstrap_record(ADMIN), OTHER[1]], 1)

    def caller(scope: Scope) -> KeyRecord:
        return authenticate(scope["headers"], table, 1000.0)

    routes = CostAdministration(caller, insights).routes()
    app = Starlette(routes=routes, exception_handlers=exception_handlers())
    return TestClient(app, headers={"authorization": f"Bearer {ADMIN}"})


@pytest.mark.parametrize("name", INSIGHTS)
def test_each_report_has_its_path(client: TestClient, insights: Insights, name: str) -> None:
    assert client.get(f"/admin/usage/{name}?from=2026-01-01").json() == {"object": name}
    assert insights.asked == [(name, UsageQuery((), 1_767_225_600, None))]


@pytest.mark.parametrize(
    ("query", "parameter"), [("by=tenant", "by"), ("from=x", "from"), ("to=2026-01-01T00:30", "to")]
)
def test_a_wrong_parameter_is_named(client: TestClient, query: str, parameter: str) -> None:
    answer = client.get(f"/admin/usage/economics?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == parameter


def test_only_admin_keys_may_ask(client: TestClient, insights: Insights) -> None:
    theirs = {"authorization": f"Bearer {OTHER[0]}"}
    assert client.get("/admin/usage/savings", headers=theirs).status_code == 403
    assert client.get("/admin/usage/unknown").status_code == 404
    assert insights.asked == []
