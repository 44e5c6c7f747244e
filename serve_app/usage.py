"""What a process saw of one request's use of an engine, as it is journalled and shipped.

Two witnesses write a record each: the router says what was delivered, the engine's meter
what was generated. Either alone is enough to bill the request. A record is named by the
request (an id of the server's own), the attempt and the witness, so that one that arrives
twice is the same record.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

from serve_app.core.types import KeyId, PoolName, PriorityClass, RequestId, TenantId

_ID_PREFIX: Final = "req_"
_ID_TIME_BITS: Final = 80


class Witness(StrEnum):
    """Who says so. ``OPERATOR`` rows are corrections, made in the ledger only."""

    ROUTER = "router"
    ENGINE = "engine"
    OPERATOR = "operator"


class Charge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who pays for a request and by which prices: it travels with the call to the engine.

    ``model`` is the name the client asked for. ``user`` and ``tag`` are empty without one.
    ``client_label`` is the client's own name for the request; it identifies nothing.
    """

    request_id: RequestId
    tenant: TenantId
    key: KeyId
    model: str
    pool: PoolName
    priority_class: PriorityClass
    endpoint: str
    price_version: int
    user: str = ""
    tag: str = ""
    client_label: str | None = None
    batch: bool = False


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One witness's account of one attempt.

    ``attempt`` counts from 1; the router's record bears the number of its last attempt.
    ``billable`` is False where the response failed by our own fault. ``exact`` is False
    where the prompt's length is an estimate, as in a router that never got the engine's
    account. ``output_tokens`` were delivered (router) or generated (engine). Times are
    seconds, ``ended_at_s`` on the wall clock. ``engine_ns`` is the engine's time that the
    attempt took, in nanoseconds, and ``engine_hour`` the hour of the replica's account that
    it is in, wall seconds; ``kv_block_us`` is KV blocks times the microseconds that they were
    held. All are 0 where the engine does not measure it, the last in older records as well.
    """

    charge: Charge
    witness: Witness
    attempt: int
    outcome: str
    ended_at_s: float
    billable: bool = True
    exact: bool = True
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    output_tokens: int = 0
    replica: str = ""
    reason: str = ""
    finish_reason: str = ""
    degraded: str = ""
    queued_s: float | None = None
    first_token_s: float | None = None
    token_interval_s: float | None = None
    duration_s: float | None = None
    engine_ns: int = 0
    engine_hour: int = 0
    kv_block_us: int = 0


class ReplicaPeriod(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A piece of a replica's life, and where its time went; numbered from 1 without a gap.

    It is a part of the account of one ``hour``, wall seconds; ``from_ns`` and ``until_ns``
    are wall nanoseconds. ``uses_ns`` is by the names of attribution.Use and sums to the
    time between them; ``open`` is less than nothing where requests ended that an earlier
    account had as open. ``instance`` is what the node is priced as, ``gpus`` how many of
    its GPUs the replica holds. ``provisional_ns`` of the time was split over requests by
    default coefficients; 0 in records that are older than the field.
    """

    replica: str
    number: int
    pool: str
    node: str
    instance: str
    hour: int
    from_ns: int
    until_ns: int
    uses_ns: dict[str, int]
    gpus: float = 0.0
    provisional_ns: int = 0


LedgerRecord: TypeAlias = UsageRecord | ReplicaPeriod

# No map begins with it, and a usage record is a map.
_PERIOD: Final = b"P"
_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(UsageRecord)
_PERIOD_DECODER: Final = msgspec.msgpack.Decoder(ReplicaPeriod)


def encode(record: LedgerRecord) -> bytes:
    """Return a record as the bytes that journals keep."""
    encoded = _ENCODER.encode(record)
    return _PERIOD + encoded if isinstance(record, ReplicaPeriod) else encoded


def decode(payload: bytes) -> LedgerRecord:
    """Return the record in ``payload``.

    Raises:
        ValueError: it holds none; fields that this version does not know are ignored.
    """
    if payload.startswith(_PERIOD):
        return _PERIOD_DECODER.decode(payload[len(_PERIOD) :])
    return _DECODER.decode(payload)


def arrived_at_s(request_id: str) -> float:
    """Return when a request came, wall seconds, as its id tells; 0 if it tells nothing.

    All records of a request agree on it, whichever process wrote them: it decides the
    hour they count for and the prices in force.
    """
    try:
        number = int(request_id.removeprefix(_ID_PREFIX), 16)
    except ValueError:
        return 0.0
    return (number >> _ID_TIME_BITS) / 1000
