"""Request ids and the labels of clients."""

from __future__ import annotations

import uuid

import pytest

from serve_app.gateway.request_id import client_label, new_request_id


def test_an_id_is_a_version_7_uuid_of_its_moment() -> None:
    made = new_request_id(1_700_000_000_123_456_789, bytes(range(10)))
    prefix, _, digits = made.partition("_")
    number = uuid.UUID(digits)
    assert prefix == "req"
    assert number.version == 7
    assert number.variant == uuid.RFC_4122
    assert number.int >> 80 == 1_700_000_000_123


def test_ids_sort_by_time_and_differ_by_chance() -> None:
    early = new_request_id(1_000_000_000, b"\xff" * 10)
    late = new_request_id(1_001_000_000, b"\x00" * 10)
    assert early < late
    assert new_request_id(0, b"\x00" * 10) != new_request_id(0, b"\x00" * 9 + b"\x01")
    assert new_request_id(0, b"\x00" * 10) != new_request_id(0, b"\x01" + b"\x00" * 9)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (b"abc-123", "abc-123"),
        (b"x" * 16, "x" * 16),
        (b"x" * 17, None),
        (b"", None),
        (b"two words", None),
        (b"line\r\nset-cookie: x", None),
        (b"caf\xc3\xa9", None),
    ],
)
def test_only_short_visible_ascii_is_echoed(value: bytes, label: str | None) -> None:
    assert client_label([(b"x-request-id", value)], 16) == label


def test_a_request_without_the_header_has_no_label() -> None:
    assert client_label([(b"x-other", b"mine")], 16) is None


def test_the_first_of_several_labels_decides() -> None:
    headers = [(b"X-Request-Id", b"one"), (b"x-request-id", b"two")]
    assert client_label(headers, 16) == "one"
