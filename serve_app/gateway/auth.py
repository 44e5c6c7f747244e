"""Who is calling: from request headers to a key's record, or to the error that says no."""

from __future__ import annotations

from collections.abc import Iterable

from serve_app.errors import Forbidden, Unauthenticated
from serve_app.keys import KeyRecord, KeyState, KeyTable

_MAX_SECRET_BYTES = 512
_KEY_HEADERS = (b"api-key", b"x-api-key")


class KeyRejected(Unauthenticated):
    """A 401 whose ``reason`` is for the log: the client is told the same in every case."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers of the error and the scheme a client should use."""
        return [*super().headers(), (b"www-authenticate", b"Bearer")]


def authenticate(
    headers: Iterable[tuple[bytes, bytes]], table: KeyTable, now_wall_s: float
) -> KeyRecord:
    """Return the record of the key in ``headers``, names in lower case as ASGI gives them.

    Raises:
        KeyRejected: no key, or one that is malformed, unknown, revoked or expired.
    """
    secret = _secret(headers)
    if secret is None:
        raise KeyRejected(
            "You didn't provide an API key. Send it as `Authorization: Bearer YOUR_KEY`.",
            "missing",
        )
    state, record = table.find(secret, now_wall_s)
    if record is None or state is not KeyState.VALID:
        raise KeyRejected("Incorrect API key provided.", state.value)
    return record


def require_admin(record: KeyRecord) -> None:
    """Check that a key may administer.

    Raises:
        Forbidden: it may not.
    """
    if not record.admin:
        raise Forbidden("This needs an admin key.")


def require_model(record: KeyRecord, model: str) -> None:
    """Check that ``model`` is within a key's scope.

    Raises:
        Forbidden: it is not.
    """
    if not record.may_use(model):
        raise Forbidden(f"This key may not use the model {model!r:.80}.", param="model")


def _secret(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the key a client sent: a bearer token first, then an API key header."""
    fallback: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            scheme, _, token = value.strip().partition(b" ")
            if scheme.lower() == b"bearer" and token.strip():
                return _text(token.strip())
        elif name in _KEY_HEADERS and value.strip():
            fallback = value.strip()
    return _text(fallback) if fallback is not None else None


def _text(token: bytes) -> str:
    """Decode a token; what cannot be one of ours becomes a text that no key equals."""
    return token.decode("latin-1") if len(token) <= _MAX_SECRET_BYTES else ""
