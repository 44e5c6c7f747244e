"""API keys: what one looks like, what is known about it, and how one is recognised.

    hr-k7f3m2qa-5Wd0...                the secret a client sends, 55 characters
       ^ key id ^ 32 random bytes, base64url

Only the SHA-256 digest of a key is kept. A slow hash would buy nothing: a key has 256
random bits, so its digest cannot be searched.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from serve_app.core.types import KeyId, PriorityClass, TenantId, UserId
from serve_app.errors import ConfigError

DEFAULT_TENANT = TenantId("default")
BOOTSTRAP_KEY_ID = KeyId("bootstrap")

_ID_ALPHABET = "abcdefghijkmnopqrstuvwxyz23456789"
_ID_CHARACTERS = 8
_SECRET_BYTES = 32
_SHAPE = re.compile(rf"hr-([a-z0-9]{{{_ID_CHARACTERS}}})-[A-Za-z0-9_-]{{43}}")
_BOOTSTRAP_SHAPE = re.compile(r"[\x21-\x7e]{8,256}")


class KeyState(StrEnum):
    """Whether a key opens the door; the log says which, the client never learns."""

    VALID = "valid"
    UNKNOWN = "unknown"
    REVOKED = "revoked"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is known about a key. Times are wall seconds since the epoch.

    ``models`` are the model names it may use, None for all. ``priority_ceiling`` is the
    most important class it may ask for. ``digest`` is the SHA-256 of the key. ``account`` is
    the first of the keys that it took the place of, one after the other; None if of none.
    """

    key_id: KeyId
    name: str
    digest: bytes
    tenant: TenantId
    created_at_s: float
    user: UserId | None = None
    admin: bool = False
    priority_ceiling: PriorityClass = PriorityClass.STANDARD
    models: tuple[str, ...] | None = None
    expires_at_s: float | None = None
    revoked_at_s: float | None = None
    account: KeyId | None = None

    @property
    def budget_id(self) -> KeyId:
        """Whose budget it spends: its own, or that of the key it took the place of."""
        return self.account or self.key_id

    def state(self, now_wall_s: float) -> KeyState:
        """Return whether the key is valid at ``now_wall_s``; it expires at its last second."""
        if self.revoked_at_s is not None:
            return KeyState.REVOKED
        if self.expires_at_s is not None and now_wall_s >= self.expires_at_s:
            return KeyState.EXPIRED
        return KeyState.VALID

    def may_use(self, model: str) -> bool:
        """Return whether the key's scope includes ``model``, a name as clients send it."""
        return self.models is None or model in self.models


@dataclass(frozen=True, slots=True)
class KeyWish:
    """What somebody asks of a new key; the rest is made by ``new_key``."""

    name: str
    tenant: TenantId = DEFAULT_TENANT
    user: UserId | None = None
    admin: bool = False
    priority_ceiling: PriorityClass = PriorityClass.STANDARD
    models: tuple[str, ...] | None = None
    expires_at_s: float | None = None
    account: KeyId | None = None


def successor(record: KeyRecord, now_wall_s: float) -> KeyWish:
    """Return the wish for a key that takes this one's place: its scope and account, a new life."""
    lifetime_s = None if record.expires_at_s is None else record.expires_at_s - record.created_at_s
    return KeyWish(
        name=record.name,
        tenant=record.tenant,
        user=record.user,
        admin=record.admin,
        priority_ceiling=record.priority_ceiling,
        models=record.models,
        expires_at_s=None if lifetime_s is None else now_wall_s + lifetime_s,
        account=record.budget_id,
    )


def new_key(wish: KeyWish, now_wall_s: float) -> tuple[str, KeyRecord]:
    """Make a key from the system's random source; return its secret and its record.

    This is the only moment when the secret exists outside the client.
    """
    key_id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_CHARACTERS))
    secret = f"hr-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    record = KeyRecord(
        key_id=KeyId(key_id),
        name=wish.name,
        digest=digest_of(secret),
        tenant=wish.tenant,
        created_at_s=now_wall_s,
        user=wish.user,
        admin=wish.admin,
        priority_ceiling=wish.priority_ceiling,
        models=wish.models,
        expires_at_s=wish.expires_at_s,
        account=wish.account,
    )
    return secret, record


def digest_of(secret: str) -> bytes:
    """Return the 32 bytes by which a key is recognised."""
    return hashlib.sha256(secret.encode()).digest()


def key_id_of(secret: str) -> KeyId | None:
    """Return the id a secret claims to have, for logs; None if it has not our shape."""
    match = _SHAPE.fullmatch(secret)
    return KeyId(match.group(1)) if match else None


def bootstrap_record(secret: str) -> KeyRecord:
    """Return the admin key that exists from the start, given by the operator.

    Raises:
        ConfigError: it is too short to be a secret, or cannot stand in a header.
    """
    if not _BOOTSTRAP_SHAPE.fullmatch(secret):
        raise ConfigError(
            "HEADRACE_BOOTSTRAP_KEY must have 8 to 256 visible ASCII characters without "
            "spaces; make one with `openssl rand -hex 24`"
        )
    return KeyRecord(
        key_id=BOOTSTRAP_KEY_ID,
        name="bootstrap",
        digest=digest_of(secret),
        tenant=DEFAULT_TENANT,
        created_at_s=0.0,
        admin=True,
        priority_ceiling=PriorityClass.CRITICAL,
    )


class KeyTable:
    """All keys at one version of the store: an immutable snapshot, cheap to share.

    A router authenticates against the table it holds, so that keys work while Control
    is away; a newer version replaces the whole table.
    """

    __slots__ = ("_records", "version")

    def __init__(self, records: Iterable[KeyRecord], version: int) -> None:
        self.version = version
        self._records: Mapping[bytes, KeyRecord] = MappingProxyType(
            {record.digest: record for record in records}
        )

    def __len__(self) -> int:
        return len(self._records)

    def __reduce__(self) -> tuple[type[KeyTable], tuple[tuple[KeyRecord, ...], int]]:
        return KeyTable, (self.records, self.version)

    @property
    def records(self) -> tuple[KeyRecord, ...]:
        """All records, in the order they were given."""
        return tuple(self._records.values())

    def with_record(self, record: KeyRecord) -> KeyTable:
        """Return a table that has ``record`` too, at the same version."""
        return KeyTable([*self._records.values(), record], self.version)

    def find(self, secret: str, now_wall_s: float) -> tuple[KeyState, KeyRecord | None]:
        """Look a key up: its state at ``now_wall_s``, and its record unless unknown.

        The table is indexed by digest, which a caller cannot choose byte by byte, and the
        digest found is compared in constant time.
        """
        digest = digest_of(secret)
        record = self._records.get(digest)
        stored = record.digest if record is not None else bytes(len(digest))
        if not hmac.compare_digest(stored, digest) or record is None:
            return KeyState.UNKNOWN, None
        return record.state(now_wall_s), record
