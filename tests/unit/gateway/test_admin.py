"""/admin/keys over HTTP, against the real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Scope

from serve_app.changes import Actor, ChangeQuery, Via
from serve_app.errors import Unavailable
from serve_app.gateway.admin import KeyAdministration, from_control
from serve_app.gateway.auth import authenticate
from serve_app.gateway.http import exception_handlers
from serve_app.keys import KeyRecord, KeyTable, KeyWish, bootstrap_record, new_key
from serve_app.ledger.store import KeyStore
from serve_app.ledger.trail import Trail
from tests.virtual_time import run

ADMIN = "the-admin-key"


class StoredKeys:
    """Control's part, in this process."""

    def __init__(self, store: KeyStore) -> None:
        self.store = store
        self.away = False

    async def list_keys(self) -> list[KeyRecord]:
        if self.away:
            raise ConnectionError("a stack trace of somebody else")
        return await asyncio.to_thread(self.store.list)

    async def create_key(self, wish: KeyWish, by: Actor) -> tuple[str, KeyRecord]:
        return await asyncio.to_thread(self.store.create, wish, by)

    async def rotate_key(
        self, key_id: str, overlap_s: float, by: Actor
    ) -> tuple[str, KeyRecord, KeyRecord] | None:
        return await asyncio.to_thread(self.store.rotate, key_id, overlap_s, by)

    async def revoke_key(self, key_id: str, by: Actor) -> KeyRecord | None:
        return await asyncio.to_thread(self.store.revoke, key_id, by)


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[StoredKeys]:
    store = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    yield StoredKeys(store)
    store.close()


@pytest.fixture
def client(keys: StoredKeys) -> TestClient:
    def caller(scope: Scope) -> KeyRecord:
        table = keys.store.snapshot().with_record(bootstrap_record(ADMIN))
        return authenticate(scope["headers"], table, 1000.0)

    routes = KeyAdministration(caller, keys).routes()
    app = Starlette(routes=routes, exception_handlers=exception_handlers())
    return TestClient(app, headers={"authorization": f"Bearer {ADMIN}"})


def test_a_created_key_works_until_it_is_revoked(client: TestClient) -> None:
    created = client.post("/admin/keys", json={"name": "root two", "admin": True})
    assert created.status_code == 201
    assert created.headers["cache-control"] == "no-store"
    theirs = {"authorization": f"Bearer {created.json()['key']}"}
    assert client.get("/admin/keys", headers=theirs).status_code == 200
    revoked = client.delete(f"/admin/keys/{created.json()['id']}")
    assert revoked.json()["state"] == "revoked"
    assert client.get("/admin/keys", headers=theirs).status_code == 401


def test_a_rotated_key_has_a_successor_of_its_scope(client: TestClient) -> None:
    wish = {"name": "bot", "tenant": "acme", "models": ["sim"], "priority_ceiling": "critical"}
    old = client.post("/admin/keys", json=wish).json()
    answer = client.post(f"/admin/keys/{old['id']}/rotation", json={"overlap_s": 60})
    assert answer.status_code == 201
    new = answer.json()
    assert new["key"] != old["key"]
    assert {name: new[name] for name in wish} == wish
    assert new["replaces"]["id"] == old["id"]
    assert new["replaces"]["expires_at"] is not None
    for path, body, status in (
        ("nobody00", {}, 404),
        ("bootstrap", {}, 400),
        (old["id"], {"overlap_s": -1}, 400),
        (old["id"], {"overlap": 1}, 400),
    ):
        refused = client.post(f"/admin/keys/{path}/rotation", json=body)
        assert refused.status_code == status, refused.text


def test_the_trail_says_whose_key_made_and_revoked_one(
    client: TestClient, keys: StoredKeys
) -> None:
    created = client.post("/admin/keys", json={"name": "root two", "admin": True}).json()
    theirs = {"authorization": f"Bearer {created['key']}"}
    other = client.post("/admin/keys", json={"name": "three"}, headers=theirs).json()
    client.delete(f"/admin/keys/{other['id']}", headers=theirs)
    changes = Trail(keys.store._database).changes(ChangeQuery())
    assert [(each.action, each.actor) for each in reversed(changes)] == [
        ("key.create", Actor("key bootstrap", Via.HTTP)),
        ("key.create", Actor(f"key {created['id']}", Via.HTTP)),
        ("key.revoke", Actor(f"key {created['id']}", Via.HTTP)),
    ]


def test_a_list_has_every_key_and_no_secret(client: TestClient) -> None:
    fields = {
        "name": "batch",
        "tenant": "acme",
        "user": "ann",
        "priority_ceiling": "sheddable",
        "models": ["small"],
        "expires_in_s": 60,
    }
    before_s = int(time.time())
    created = client.post("/admin/keys", json=fields).json()
    after_s = int(time.time())
    answer = client.get("/admin/keys")
    (listed,) = answer.json()["data"]
    assert listed.items() >= {k: v for k, v in fields.items() if k != "expires_in_s"}.items()
    assert before_s <= listed["expires_at"] - 60 <= after_s
    assert "key" not in listed
    assert created["key"][12:] not in answer.text
    assert "digest" not in listed


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/admin/keys"), ("POST", "/admin/keys"), ("DELETE", "/admin/keys/x")],
)
def test_only_admin_keys_administer(
    client: TestClient, keys: StoredKeys, method: str, path: str
) -> None:
    secret, _ = keys.store.create(KeyWish(name="ordinary"))
    ordinary = {"authorization": f"Bearer {secret}"}
    assert client.request(method, path, headers=ordinary).status_code == 403
    assert client.request(method, path, headers={"authorization": ""}).status_code == 401
    assert len(keys.store.list()) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "x", "colour": "red"}, "colour"),
        ({"name": "x", "tenant": "a b"}, "tenant"),
        ({"name": "x", "admin": "yes"}, "admin"),
        ({"name": "x", "priority_ceiling": "high"}, "priority_ceiling"),
        ({"name": "x", "models": []}, "models"),
        ({"name": "x", "models": ["a", 3]}, "models[1]"),
        ({"name": "x", "expires_in_s": 0}, "expires_in_s"),
        ({"name": "x", "expires_in_s": 1e18}, "expires_in_s"),
        ({"name": "x", "user": "u" * 65}, "user"),
    ],
)
def test_a_wrong_wish_is_refused_by_field(
    client: TestClient, keys: StoredKeys, fields: dict[str, Any], param: str
) -> None:
    answer = client.post("/admin/keys", json=fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert keys.store.list() == []


def test_bodies_are_json_and_small(client: TestClient) -> None:
    assert client.post("/admin/keys", content=b"{}").status_code == 415
    json_header = {"content-type": "application/json"}
    assert client.post("/admin/keys", content=b"{", headers=json_header).status_code == 400
    huge = b'{"name": "' + b"x" * 70_000 + b'"}'
    assert client.post("/admin/keys", content=huge, headers=json_header).status_code == 413


def test_revoking_what_is_not_there_is_a_404(client: TestClient) -> None:
    assert client.delete("/admin/keys/nobody").status_code == 404


def test_the_bootstrap_key_is_not_revoked_here(client: TestClient) -> None:
    answer = client.delete("/admin/keys/bootstrap")
    assert answer.status_code == 400
    assert "HEADRACE_BOOTSTRAP_KEY" in answer.json()["error"]["message"]


def test_without_control_the_answer_is_a_503_to_retry(client: TestClient, keys: StoredKeys) -> None:
    keys.away = True
    answer = client.get("/admin/keys")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
    assert "stack trace" not in answer.text


def test_a_control_that_never_answers_is_not_waited_for_without_end() -> None:
    async def ask() -> None:
        with pytest.raises(Unavailable):
            await from_control(asyncio.Event().wait())

    run(ask())


def test_a_table_of_new_keys_does_not_need_the_store() -> None:
    secret, record = new_key(KeyWish(name="x"), 0.0)
    headers = [(b"authorization", f"Bearer {secret}".encode())]
    assert authenticate(headers, KeyTable([record], 1), 1.0) is record
