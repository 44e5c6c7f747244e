"""Keys for tests."""

from __future__ import annotations

from typing import Any

import httpx

from tests.e2e.waiting import until
from tests.stack import Stack

ASKED_IN_A_ROW = 20
# Connections of their own, so that every router is met. A client for each would be slow to make:
# one that has connected and says nothing for ten seconds is sent away.
EACH_ITS_OWN = httpx.Limits(max_connections=None, max_keepalive_connections=0)


def make_key(stack: Stack, **fields: Any) -> str:
    """Make a key, wait until every router knows it (and what was changed before it), return it."""
    with stack.http() as admin:
        created = admin.post("/admin/keys", json={"name": "test", **fields})
    assert created.status_code == 201, created.text
    secret = str(created.json()["key"])

    def by_all() -> bool:
        with stack.http(secret, limits=EACH_ITS_OWN) as client:
            asked = (client.get("/v1/models") for _ in range(ASKED_IN_A_ROW))
            return all(answer.status_code == 200 for answer in asked)

    until(by_all, "the key is known to every router")
    return secret
