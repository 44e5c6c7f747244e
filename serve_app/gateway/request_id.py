"""Names of requests: the server's own id, and the label a client may add.

The id is the server's always: it names the request in logs, in the ledger and in the
engines. A client's ``x-request-id`` is a label that is echoed and goes no further.
"""

from __future__ import annotations

from collections.abc import Iterable

from serve_app.core.types import RequestId

_ID_RANDOM_BYTES = 10


def new_request_id(now_ns: int, random_bytes: bytes) -> RequestId:
    """Return ``req_`` and a UUIDv7 in hex: sortable by wall time, unique by chance.

    ``now_ns`` is wall time since the epoch; ``random_bytes`` are 10 fresh random bytes.
    Source: RFC 9562, section 5.7.
    """
    assert len(random_bytes) == _ID_RANDOM_BYTES, "a UUIDv7 takes ten random bytes"
    milliseconds = (now_ns // 1_000_000) & ((1 << 48) - 1)
    noise = int.from_bytes(random_bytes, "big")
    high = (noise >> 62) & 0xFFF
    low = noise & ((1 << 62) - 1)
    number = (milliseconds << 80) | (0x7 << 76) | (high << 64) | (0b10 << 62) | low
    return RequestId(f"req_{number:032x}")


def client_label(headers: Iterable[tuple[bytes, bytes]], max_bytes: int) -> str | None:
    """Return the client's ``x-request-id`` if it may be echoed, else None.

    It may if it has 1 to ``max_bytes`` bytes of visible ASCII. Anything else is ignored
    rather than refused: a label is not worth failing a request for.
    """
    for name, value in headers:
        if name.lower() == b"x-request-id":
            fits = 0 < len(value) <= max_bytes
            return value.decode("ascii") if fits and _is_visible_ascii(value) else None
    return None


def _is_visible_ascii(value: bytes) -> bool:
    return all(0x21 <= byte <= 0x7E for byte in value)
