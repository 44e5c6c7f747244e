"""Keys for tests."""

from __future__ import annotations

from typing import Any

from tests.e2e.waiting import until
from tests.stack import Stack

ASKED_IN_A_ROW = 20


def make_key(stack: Stack, **fields: Any) -> str:
    """Make a key, wait until every router knows it (and what was changed before it), return it."""
    with stack.http() as admin:
        created = admin.post("/admin/keys", json={"name": "test", **fields})
    assert created.status_code == 201, created.text
    secret = str(created.json()["key"])
    known: list[bool] = []

    def by_all() -> bool:
        # Connections of their own, so that every router is met.
        for _ in range(ASKED_IN_A_ROW):
            with stack.http(secret) as client:
                known.append(client.get("/v1/models").status_code == 200)
            if not known[-1]:
                return False
        return True

    until(by_all, "the key is known to every router")
    return secret
