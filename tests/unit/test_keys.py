"""Keys: their shape, their states, and the table that recognises them."""

from __future__ import annotations

import dataclasses
import pickle
import re

import pytest

from serve_app.core.types import KeyId, PriorityClass, TenantId
from serve_app.errors import ConfigError
from serve_app.keys import (
    KeyState,
    KeyTable,
    KeyWish,
    bootstrap_record,
    digest_of,
    key_id_of,
    new_key,
)

NOW_S = 1000.0


def test_a_new_key_has_the_documented_shape_and_its_secret_is_not_in_its_record() -> None:
    secret, record = new_key(KeyWish(name="laptop", tenant=TenantId("acme")), NOW_S)
    assert re.fullmatch(r"hr-[a-z0-9]{8}-[A-Za-z0-9_-]{43}", secret)
    assert key_id_of(secret) == record.key_id
    assert record.digest == digest_of(secret)
    assert secret[12:] not in repr(record)
    assert (record.tenant, record.created_at_s) == ("acme", NOW_S)


def test_keys_do_not_repeat() -> None:
    made = [new_key(KeyWish(name="x"), NOW_S) for _ in range(200)]
    assert len({secret for secret, _ in made}) == len({r.key_id for _, r in made}) == 200


def test_a_new_key_cannot_do_more_than_it_was_given() -> None:
    _, record = new_key(KeyWish(name="x"), NOW_S)
    assert not record.admin
    assert record.priority_ceiling is PriorityClass.STANDARD


@pytest.mark.parametrize("text", ["", "sk-abc", "hr-abcdefgh", "hr-ABCDEFGH-" + "x" * 43])
def test_other_texts_have_no_key_id(text: str) -> None:
    assert key_id_of(text) is None


def test_a_table_finds_exactly_the_keys_it_holds() -> None:
    secret, record = new_key(KeyWish(name="x"), NOW_S)
    other, _ = new_key(KeyWish(name="y"), NOW_S)
    table = KeyTable([record], 3)
    assert table.find(secret, NOW_S) == (KeyState.VALID, record)
    assert table.find(other, NOW_S) == (KeyState.UNKNOWN, None)
    assert table.find("", NOW_S) == (KeyState.UNKNOWN, None)
    assert table.find(record.key_id, NOW_S) == (KeyState.UNKNOWN, None)


def test_a_record_under_the_digest_of_another_key_opens_nothing() -> None:
    secret, record = new_key(KeyWish(name="x"), NOW_S)
    table = KeyTable([record], 1)
    forged = dataclasses.replace(record, digest=digest_of("another"))
    table._records = {digest_of(secret): forged}
    assert table.find(secret, NOW_S) == (KeyState.UNKNOWN, None)


@pytest.mark.parametrize(
    ("revoked_at_s", "expires_at_s", "state"),
    [
        (None, None, KeyState.VALID),
        (None, NOW_S + 0.001, KeyState.VALID),
        (None, NOW_S, KeyState.EXPIRED),
        (NOW_S + 50, None, KeyState.REVOKED),
        (1.0, 2.0, KeyState.REVOKED),
    ],
)
def test_the_state_of_a_key(
    revoked_at_s: float | None, expires_at_s: float | None, state: KeyState
) -> None:
    _, made = new_key(KeyWish(name="x", expires_at_s=expires_at_s), 0.0)
    record = dataclasses.replace(made, revoked_at_s=revoked_at_s)
    assert record.state(NOW_S) is state


def test_a_table_survives_the_way_to_another_process() -> None:
    secret, record = new_key(KeyWish(name="x", models=("small",)), NOW_S)
    copy = pickle.loads(pickle.dumps(KeyTable([record], 7)))
    assert copy.version == 7
    assert copy.find(secret, NOW_S) == (KeyState.VALID, record)
    assert len(copy) == 1


def test_adding_a_record_leaves_the_table_as_it_was() -> None:
    table = KeyTable([], 7)
    more = table.with_record(bootstrap_record("a-bootstrap-key"))
    assert (len(table), len(more), more.version) == (0, 1, 7)


def test_the_bootstrap_key_is_an_admin_of_the_default_tenant() -> None:
    record = bootstrap_record("a-bootstrap-key")
    assert (record.key_id, record.tenant, record.admin) == (KeyId("bootstrap"), "default", True)
    assert KeyTable([record], 0).find("a-bootstrap-key", NOW_S)[0] is KeyState.VALID


@pytest.mark.parametrize(
    "secret", ["", "short", "with a space", "ümlaut-ümlaut", "x" * 257, "a\nb" * 9]
)
def test_a_bootstrap_key_that_cannot_be_a_secret_is_refused_without_showing_it(secret: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bootstrap_record(secret)
    assert "HEADRACE_BOOTSTRAP_KEY" in str(caught.value)
    assert not secret or secret not in str(caught.value)
