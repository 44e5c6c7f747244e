"""/admin/usage over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Scope

from serve_app.changes import Actor, Reversal, Via
from serve_app.gateway.admin_usage import UsageAdministration
from serve_app.gateway.auth import authenticate
from serve_app.gateway.http import exception_handlers
from serve_app.keys import KeyRecord, KeyTable, KeyWish, bootstrap_record, new_key
from serve_app.usage_report import FIELDS, UsageQuery

ADMIN = "the-admin-key"
FIGURES = {**dict.fromkeys(FIELDS, 1), "wasted_usd": "0", "amount_usd": "0.5"}
REPORT = {
    "by": ["tenant"],
    "data": [{"tenant": "acme", **FIGURES}],
    "total": FIGURES,
    "overheads": [],
}


class Reporter:
    """Control's part: keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[UsageQuery] = []
        self.reversed: list[tuple[str, str, Actor]] = []
        self.away = False

    async def usage(self, query: UsageQuery) -> dict[str, Any]:
        if self.away:
            raise ConnectionError("a stack trace of somebody else")
        self.asked.append(query)
        return REPORT

    async def insight(self, name: str, query: UsageQuery) -> dict[str, Any]:
        self.asked.append(query)
        return {"object": name, "columns": ["BilledCost"], "data": [{"BilledCost": "1.5"}]}

    async def reverse_usage(self, request_id: str, reason: str, by: Actor) -> Reversal | None:
        if request_id != "req_1":
            return None
        if self.reversed:
            return Reversal(request_id, 0, new=False)
        self.reversed.append((request_id, reason, by))
        return Reversal(request_id, 500, new=True)


@pytest.fixture
def reporter() -> Reporter:
    return Reporter()


@pytest.fixture
def other() -> tuple[str, KeyRecord]:
    return new_key(KeyWish(name="other"), 0.0)


@pytest.fixture
def client(reporter: Reporter, other: tuple[str, KeyRecord]) -> TestClient:
    table = KeyTable([bootstrap_record(ADMIN), other[1]], 1)

    def caller(scope: Scope) -> KeyRecord:
        return authenticate(scope["headers"], table, 1000.0)

    routes = UsageAdministration(caller, reporter).routes()
    app = Starlette(routes=routes, exception_handlers=exception_handlers())
    return TestClient(app, headers={"authorization": f"Bearer {ADMIN}"})


def test_a_report_is_json_or_csv(client: TestClient, reporter: Reporter) -> None:
    where = "/admin/usage?by=tenant&from=2026-01-01&to=2026-01-02"
    answer = client.get(where)
    assert answer.json() == REPORT
    assert answer.headers["cache-control"] == "no-store"
    assert reporter.asked == [UsageQuery(("tenant",), 1_767_225_600, 1_767_312_000)]
    text = client.get(f"{where}&format=csv")
    assert text.headers["content-type"].startswith("text/csv")
    assert text.text.splitlines()[1] == "acme,1,1,1,1,1,1,1,1,0,0.5,1,1,1,1,1,1,"


@pytest.mark.parametrize(
    ("query", "parameter"),
    [("by=colour", "by"), ("from=x", "from"), ("format=xml", "format"), ("since=1", "since")],
)
def test_a_wrong_parameter_is_named(client: TestClient, query: str, parameter: str) -> None:
    answer = client.get(f"/admin/usage?{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == parameter


def test_only_admin_keys_may_ask(
    client: TestClient, reporter: Reporter, other: tuple[str, KeyRecord]
) -> None:
    theirs = {"authorization": f"Bearer {other[0]}"}
    assert client.get("/admin/usage", headers=theirs).status_code == 403
    assert client.get("/admin/usage", headers={"authorization": ""}).status_code == 401
    assert reporter.asked == []


def test_a_control_that_is_away_is_a_503_without_its_trace(
    client: TestClient, reporter: Reporter
) -> None:
    reporter.away = True
    answer = client.get("/admin/usage")
    assert answer.status_code == 503
    assert "trace" not in answer.text


def test_a_bill_is_taken_back_once(client: TestClient, reporter: Reporter) -> None:
    where = "/admin/usage/req_1/reversal"
    done = client.post(where, json={"reason": " goodwill "})
    assert done.status_code == 201
    assert done.json() == {
        "object": "usage_reversal",
        "request_id": "req_1",
        "taken_back_usd": "0.0000005",
        "new": True,
    }
    again = client.post(where, json={"reason": "again"})
    assert (again.status_code, again.json()["new"]) == (200, False)
    assert reporter.reversed == [("req_1", "goodwill", Actor("key bootstrap", Via.HTTP))]
    assert client.post("/admin/usage/req_2/reversal", json={"reason": "x"}).status_code == 404


@pytest.mark.parametrize(
    "body", [{}, {"reason": ""}, {"reason": "  "}, {"reason": "x" * 1001}, {"reason": 7}]
)
def test_a_reversal_without_a_reason_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/admin/usage/req_1/reversal", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "reason"


def test_only_admins_take_bills_back(client: TestClient, other: tuple[str, KeyRecord]) -> None:
    headers = {"authorization": f"Bearer {other[0]}"}
    where = "/admin/usage/req_1/reversal"
    assert client.post(where, json={"reason": "x"}, headers=headers).status_code == 403


@pytest.mark.parametrize("form", ["focus", "focus-allocation"])
def test_focus_rows_are_csv(client: TestClient, form: str) -> None:
    answer = client.get(f"/admin/usage?format={form}")
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.text == "BilledCost\n1.5\n"
