"""From headers to a key."""

from __future__ import annotations

import pytest

from serve_app.core.types import KeyId, TenantId
from serve_app.errors import Forbidden
from serve_app.gateway.auth import KeyRejected, authenticate, require_admin, require_model
from serve_app.keys import KeyRecord, KeyTable, digest_of

NOW_S = 1000.0
SECRET = "hr-abcdefgh-" + "s" * 43


def record(secret: str = SECRET, **fields: object) -> KeyRecord:
    known = {"key_id": KeyId("abcdefgh"), "name": "n", "tenant": TenantId("t"), "created_at_s": 1.0}
    return KeyRecord(digest=digest_of(secret), **{**known, **fields})  # type: ignore[arg-type]


TABLE = KeyTable([record()], 1)


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer " + SECRET.encode()),
        (b"authorization", b"bearer  " + SECRET.encode() + b" "),
        (b"api-key", SECRET.encode()),
        (b"x-api-key", SECRET.encode()),
    ],
)
def test_a_key_is_found_wherever_clients_put_it(header: tuple[bytes, bytes]) -> None:
    assert authenticate([(b"host", b"x"), header], TABLE, NOW_S).key_id == "abcdefgh"


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ([], "missing"),
        ([(b"authorization", b"")], "missing"),
        ([(b"authorization", b"Bearer")], "missing"),
        ([(b"authorization", b"Bearer   ")], "missing"),
        ([(b"authorization", b"Basic " + SECRET.encode())], "missing"),
        ([(b"authorization", b"Bearer " + SECRET[:-1].encode())], "unknown"),
        ([(b"authorization", b"Bearer \xff\xfe")], "unknown"),
        ([(b"authorization", b"Bearer " + b"x" * 100_000)], "unknown"),
    ],
)
def test_requests_without_a_valid_key_are_rejected(
    headers: list[tuple[bytes, bytes]], reason: str
) -> None:
    with pytest.raises(KeyRejected) as caught:
        authenticate(headers, TABLE, NOW_S)
    assert (caught.value.status, caught.value.reason) == (401, reason)
    assert caught.value.code == "invalid_api_key"
    assert (b"www-authenticate", b"Bearer") in caught.value.headers()


def test_a_client_cannot_tell_why_a_key_was_rejected() -> None:
    headers = [(b"authorization", b"Bearer " + SECRET.encode())]
    tables = {
        "unknown": KeyTable([], 1),
        "revoked": KeyTable([record(revoked_at_s=5.0)], 1),
        "expired": KeyTable([record(expires_at_s=NOW_S)], 1),
    }
    bodies = set()
    for reason, table in tables.items():
        with pytest.raises(KeyRejected) as caught:
            authenticate(headers, table, NOW_S)
        assert caught.value.reason == reason
        bodies.add(caught.value.body())
    assert len(bodies) == 1
    assert SECRET.encode() not in bodies.pop()


def test_scopes_are_checked() -> None:
    require_model(record(), "anything")
    require_model(record(models=("small",)), "small")
    with pytest.raises(Forbidden) as caught:
        require_model(record(models=("small",)), "large")
    assert caught.value.param == "model"
    require_admin(record(admin=True))
    with pytest.raises(Forbidden):
        require_admin(record())
