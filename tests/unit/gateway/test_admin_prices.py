"""/admin/prices and /admin/audit over HTTP, against the real stores."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serve_app.changes import Actor, Change, ChangeQuery
from serve_app.core.pricing import PriceBook, RateCard
from serve_app.gateway.admin_audit import AuditAdministration
from serve_app.gateway.admin_prices import PriceAdministration
from serve_app.gateway.auth import authenticate
from serve_app.gateway.http import exception_handlers
from serve_app.keys import KeyTable, KeyWish, bootstrap_record, new_key
from serve_app.ledger.database import Database
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.trail import Trail
from serve_app.price_file import BookLine, load_prices

ADMIN = "the-admin-key"
OTHER, OTHER_RECORD = new_key(KeyWish(name="other"), 0.0)
BOOK: dict[str, Any] = {
    "currency": "USD",
    "cards": {
        "all": {"input": 0.1, "cached_input": "0.01", "output": 0.4},
        "acme": {"tenant": "acme", "from": "2026-01-01", "input": 1, "output": 2, "request": 1e-4},
    },
}


class Stored:
    """Control's part, in this process."""

    def __init__(self, database: Database) -> None:
        self.store = PriceStore(database)
        self.trail = Trail(database)

    async def price_books(self) -> tuple[Sequence[BookLine], int]:
        return self.store.books(), self.store.version()

    async def price_book(self, version: int | None) -> PriceBook | None:
        return self.store.current() if version is None else self.store.book(version)

    async def import_prices(
        self, cards: Sequence[RateCard], note: str, by: Actor
    ) -> tuple[int, bool]:
        before = self.store.version()
        version = await asyncio.to_thread(self.store.replace, cards, note, by)
        return version, version > before

    async def changes(self, query: ChangeQuery) -> Sequence[Change]:
        return self.trail.changes(query)


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Stored]:
    database = Database(f"sqlite:///{tmp_path}/books.db")
    yield Stored(database)
    database.close()


@pytest.fixture
def client(stored: Stored) -> TestClient:
    table = KeyTable([bootstrap_record(ADMIN), OTHER_RECORD], 1)
    prices = PriceAdministration(lambda s: authenticate(s["headers"], table, 1000.0), stored)
    audit = AuditAdministration(lambda s: authenticate(s["headers"], table, 1000.0), stored)
    app = Starlette(
        routes=[*prices.routes(), *audit.routes()], exception_handlers=exception_handlers()
    )
    return TestClient(app, headers={"authorization": f"Bearer {ADMIN}"})


def test_a_book_is_loaded_listed_and_shown(client: TestClient, stored: Stored) -> None:
    assert client.get("/admin/prices").json() == {"object": "list", "data": []}
    loaded = client.post("/admin/prices", params={"note": "January"}, json=BOOK)
    assert loaded.status_code == 201
    assert loaded.json() == {"object": "price_book", "version": 1, "cards": 2, "new": True}
    again = client.post("/admin/prices", json=BOOK)
    assert (again.status_code, again.json()["new"], again.json()["version"]) == (200, False, 1)
    dearer = json.loads(json.dumps(BOOK))
    dearer["cards"]["all"]["output"] = "0.401"
    assert client.post("/admin/prices", json=dearer).json()["version"] == 2
    first, second = client.get("/admin/prices").json()["data"]
    assert (first["version"], first["note"], first["in_force"]) == (1, "January", False)
    assert (second["version"], second["cards"], second["in_force"]) == (2, 2, True)
    shown = client.get("/admin/prices/current").json()
    assert shown["version"] == 2
    assert shown["cards"]["all"]["output"] == "0.401"
    assert client.get("/admin/prices/1").json()["cards"]["all"]["output"] == "0.4"
    back = {name: shown[name] for name in ("currency", "cards")}
    assert client.post("/admin/prices", json=back).json()["new"] is False, "as it is shown"


def test_a_book_over_http_is_the_same_as_from_a_file(
    client: TestClient, stored: Stored, tmp_path: Path
) -> None:
    client.post("/admin/prices", json=BOOK)
    file = tmp_path / "prices.yaml"
    file.write_text(json.dumps(BOOK))
    cards = sorted(load_prices(file), key=lambda card: card.name)
    assert list(stored.store.current().cards) == cards


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"currency": "EUR", "cards": {}}', "currency"),
        ('{"currency": "USD", "cards": {"a": {"input": -1, "output": 1}}}', "cards.a.input"),
        ('{"currency": "USD", "cards": {"a": {"input": 0.0001, "output": 1}}}', "cards.a.input"),
        ('{"currency": "USD", "cards": {"a": {"input": 1}}}', "cards.a.output"),
        ('{"currency": "USD", "cards": {"a": {"input": 1, "output": 1, "x": 1}}}', "cards.a.x"),
        (
            '{"currency": "USD", "cards": {"a": {"input": 1, "output": 1}, '
            '"b": {"input": 2, "output": 1}}}',
            "cards.b",
        ),
        ('{"currency": "USD", "cards": {"a": {}, "a": {}}}', "a"),
        ("[]", None),
        ("{", None),
    ],
)
def test_a_wrong_book_is_refused_with_its_field_and_changes_nothing(
    client: TestClient, stored: Stored, body: str, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/admin/prices", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert stored.store.version() == 0
    assert stored.trail.changes(ChangeQuery()) == []


@pytest.mark.parametrize("path", ["7", "x", "-1", "9" * 40])
def test_a_version_that_is_not_there_is_not_found(client: TestClient, path: str) -> None:
    assert client.get(f"/admin/prices/{path}").status_code == 404


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "prices"), ("POST", "prices"), ("GET", "prices/1"), ("GET", "audit")],
)
def test_only_admins_see_or_change_anything(client: TestClient, method: str, path: str) -> None:
    theirs = {"authorization": f"Bearer {OTHER}"}
    assert client.request(method, f"/admin/{path}", headers=theirs).status_code == 403
    nobody = {"authorization": "Bearer nothing"}
    assert client.request(method, f"/admin/{path}", headers=nobody).status_code == 401


def test_the_trail_is_read_page_by_page(client: TestClient) -> None:
    for number in range(1, 4):
        book = {"currency": "USD", "cards": {"all": {"input": number, "output": 1}}}
        client.post("/admin/prices", params={"note": f"no {number}"}, json=book)
    found = client.get("/admin/audit", params={"limit": 2}).json()
    assert [each["number"] for each in found["data"]] == [3, 2]
    [first] = client.get("/admin/audit", params={"before": 2}).json()["data"]
    assert first.pop("at").endswith("Z")
    assert first == {
        "object": "admin_change",
        "number": 1,
        "actor": "key bootstrap",
        "via": "http",
        "action": "prices.import",
        "subject": "prices",
        "before": {"version": 0, "cards": 0},
        "after": {"version": 1, "cards": 1},
        "note": "no 1",
    }
    assert client.get("/admin/audit", params={"subject": "key"}).json()["data"] == []


@pytest.mark.parametrize(
    ("name", "value"), [("limit", "0"), ("limit", "1001"), ("before", "x"), ("since", "1")]
)
def test_a_question_that_cannot_be_answered_is_refused(
    client: TestClient, name: str, value: str
) -> None:
    answer = client.get("/admin/audit", params={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
