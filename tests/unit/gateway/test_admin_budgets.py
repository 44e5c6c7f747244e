"""/admin/budgets over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serve_app.changes import Actor, Via
from serve_app.core.budget import FOREVER, Balance, Budget, BudgetKey, BudgetScope, Window
from serve_app.core.pricing import AmountTooLarge, amount_in_all
from serve_app.gateway.admin_budgets import BudgetAdministration
from serve_app.gateway.auth import authenticate
from serve_app.gateway.http import exception_handlers
from serve_app.keys import KeyTable, KeyWish, bootstrap_record, new_key

ADMIN = "the-admin-key"
OTHER, OTHER_RECORD = new_key(KeyWish(name="other"), 0.0)


class Budgets:
    """Control's part."""

    def __init__(self) -> None:
        self.kept: dict[BudgetKey, Budget] = {}
        self.by: list[Actor] = []

    async def list_budgets(self) -> Sequence[Balance]:
        return [Balance(each, FOREVER, 7, 11) for each in self.kept.values()]

    async def put_budget(self, budget: Budget, by: Actor) -> None:
        self.by.append(by)
        self.kept[budget.key] = budget

    async def add_credit(self, key: BudgetKey, amount_nanousd: int, by: Actor) -> Budget | None:
        self.by.append(by)
        known = self.kept.get(key)
        if known is None:
            return None
        total = amount_in_all(known.amount_nanousd, amount_nanousd)
        self.kept[key] = Budget(key, total, known.window)
        return self.kept[key]

    async def remove_budget(self, key: BudgetKey, by: Actor) -> bool:
        self.by.append(by)
        return self.kept.pop(key, None) is not None


@pytest.fixture
def budgets() -> Budgets:
    return Budgets()


@pytest.fixture
def client(budgets: Budgets) -> TestClient:
    table = KeyTable([bootstrap_record(ADMIN), OTHER_RECORD], 1)
    administration = BudgetAdministration(
        lambda scope: authenticate(scope["headers"], table, 1000.0), budgets
    )
    app = Starlette(routes=administration.routes(), exception_handlers=exception_handlers())
    return TestClient(app, headers={"authorization": f"Bearer {ADMIN}"})


def test_a_budget_is_set_topped_up_listed_and_removed(client: TestClient, budgets: Budgets) -> None:
    answer = client.put(
        "/admin/budgets/user/acme/ann",
        json={"amount_usd": "0.25", "window": "rolling", "rolling_hours": 24, "alerts": [0.5]},
    )
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "budget",
        "scope": "user",
        "id": "acme/ann",
        "amount_usd": "0.25",
        "window": "rolling",
        "rolling_hours": 24,
        "alerts": [0.5],
        "hard": True,
        "spent_usd": "0.000000007",
        "at_routers_usd": "0.000000011",
        "period_start": None,
    }
    client.put("/admin/budgets/tenant/acme", json={"amount_usd": "1"})
    added = client.post("/admin/budgets/tenant/acme/credits", json={"amount_usd": "0.5"})
    assert added.json()["amount_usd"] == "1.5"
    assert len(client.get("/admin/budgets").json()["data"]) == 2
    assert client.delete("/admin/budgets/tenant/acme").json()["deleted"]
    assert list(budgets.kept) == [BudgetKey(BudgetScope.USER, "acme/ann")]
    assert budgets.kept[BudgetKey(BudgetScope.USER, "acme/ann")].window is Window.ROLLING
    assert budgets.by == [Actor("key bootstrap", Via.HTTP)] * 4


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("tenant/acme", {"amount_usd": "-1"}, 400, "amount_usd"),
        ("tenant/acme", {"amount_usd": "0.0000000001"}, 400, "amount_usd"),
        ("tenant/acme", {"amount_usd": "much"}, 400, "amount_usd"),
        ("tenant/acme", {"amount_usd": "1e10"}, 400, "amount_usd"),
        ("tenant/acme", {"amount_usd": "1e999999999"}, 400, "amount_usd"),
        ("tenant/acme", {"amount_usd": 1.5}, 400, "amount_usd"),
        ("tenant/acme", {"amount_usd": "1", "window": "year"}, 400, "window"),
        ("tenant/acme", {"amount_usd": "1", "window": "rolling"}, 400, "rolling_hours"),
        ("tenant/acme", {"amount_usd": "1", "rolling_hours": 2}, 400, "rolling_hours"),
        ("tenant/acme", {"amount_usd": "1", "alerts": [0]}, 400, "alerts[0]"),
        ("tenant/acme", {"amount_usd": "1", "color": "red"}, 400, "color"),
        ("user/ann", {"amount_usd": "1"}, 400, "id"),
        ("planet/mars", {"amount_usd": "1"}, 404, None),
    ],
)
def test_what_is_wrong_is_named(
    client: TestClient, budgets: Budgets, path: str, body: object, status: int, param: str | None
) -> None:
    answer = client.put(f"/admin/budgets/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert not budgets.kept


def test_an_amount_may_be_large_and_together_with_more_has_a_bound(client: TestClient) -> None:
    path = "/admin/budgets/tenant/acme"
    assert client.put(path, json={"amount_usd": "5000"}).json()["amount_usd"] == "5000"
    answer = client.post(f"{path}/credits", json={"amount_usd": "1e9"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "amount_usd")
    assert "at most 1000000000" in answer.json()["error"]["message"]


def test_what_is_not_there_is_404(client: TestClient) -> None:
    assert client.delete("/admin/budgets/tenant/acme").status_code == 404
    credits = client.post("/admin/budgets/tenant/acme/credits", json={"amount_usd": "1"})
    assert credits.status_code == 404


def test_only_an_admin_may(client: TestClient, budgets: Budgets) -> None:
    for method, path in (
        ("GET", ""),
        ("PUT", "/tenant/acme"),
        ("DELETE", "/tenant/acme"),
        ("POST", "/tenant/acme/credits"),
    ):
        headers = {"authorization": f"Bearer {OTHER}"}
        answer = client.request(
            method, f"/admin/budgets{path}", headers=headers, json={"amount_usd": "1"}
        )
        assert answer.status_code == 403
    assert not budgets.kept


def test_an_amount_too_large_is_the_clients_error_however_a_call_wraps_it(
    client: TestClient, budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a Serve handle it comes as an exception of both kinds."""

    class OfATask(RuntimeError, AmountTooLarge):  # type: ignore[misc]  # as Ray makes it
        """What a handle raises."""

    async def add(*_: object) -> None:
        raise OfATask("1000000001 dollars in all are too much")

    monkeypatch.setattr(budgets, "add_credit", add)
    answer = client.post("/admin/budgets/tenant/acme/credits", json={"amount_usd": "1"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "amount_usd"
    assert "at most 1000000000" in answer.json()["error"]["message"]
