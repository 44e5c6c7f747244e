"""The nouns every policy speaks: tickets, replica views, effects.

Times are monotonic seconds handed in by the shell that drives the core; token
counts are whole tokens; ratios lie in [0, 1] unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import NewType

TenantId = NewType("TenantId", str)
UserId = NewType("UserId", str)
KeyId = NewType("KeyId", str)
RequestId = NewType("RequestId", str)
ReplicaId = NewType("ReplicaId", str)
PoolName = NewType("PoolName", str)


class PriorityClass(IntEnum):
    """Admission classes, most important first: a lower value is served first."""

    CRITICAL = 0
    STANDARD = 1
    SHEDDABLE = 2


class Outcome(StrEnum):
    """How a dispatched request ended; exactly one per request."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


class Failure(StrEnum):
    """Why a replica could not serve a request that it was sent."""

    LOST = "lost"  # the replica, with all that it held
    BUSY = "busy"  # it took no more just now, and is none the worse for it
    REQUEST = "request"  # this one, which another replica may fail as well


class RejectReason(StrEnum):
    """Why the core refused a request. The edge maps each to a status and a code."""

    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"
    NO_REPLICA = "no_replica"
    UNKNOWN_POOL = "unknown_pool"
    POOL_CLOSING = "pool_closing"
    TENANT_CONCURRENCY = "tenant_concurrency"
    TTFT_UNREACHABLE = "ttft_unreachable"
    KV_BUDGET = "kv_budget"
    SHED = "shed"
    RETRY_BUDGET = "retry_budget"
    CLIENT_THROTTLED = "client_throttled"


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request as the policies see it.

    ``prompt_tokens`` is an upper estimate (the engine's count reconciles it at
    completion); ``max_tokens`` the most output tokens the request may produce, per
    choice times choices. ``prefix_hashes`` are chained block hashes of the prompt,
    shortest prefix first. ``expires_at_s`` is when the client stops caring, or None.
    ``weight`` is the tenant's share of the capacity relative to other tenants'.
    """

    request_id: RequestId
    pool: PoolName
    tenant: TenantId
    key: KeyId
    priority_class: PriorityClass
    prompt_tokens: int
    max_tokens: int
    user: UserId | None = None
    prefix_hashes: tuple[int, ...] = ()
    session: str | None = None
    adapter: str | None = None
    expires_at_s: float | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request as the engine counted them.

    ``engine_s`` is the engine time they took and ``kv_block_us`` KV blocks times the
    microseconds that they were held, where the engine measures it, else 0.
    """

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    completion_tokens: int = 0
    engine_s: float = 0.0
    kv_block_us: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica's load at one moment, as its engine reported it.

    ``kv_usage_ratio`` is used over total KV blocks. ``preemptions_total`` counts up
    for the replica's life. ``kv_tokens_capacity`` is how many tokens of context the
    KV cache holds. ``slots`` is how many requests the engine runs at once.
    ``prefill_tokens`` are prompt tokens that wait or are being computed.
    """

    replica: ReplicaId
    pool: PoolName
    sequence: int
    slots: int
    running: int
    waiting: int
    kv_usage_ratio: float
    kv_tokens_capacity: int
    preemptions_total: int = 0
    in_flight_tokens: tuple[int, int, int] = (0, 0, 0)
    prefill_tokens: int = 0
    adapters: tuple[str, ...] = ()
    draining: bool = False


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Send the request now, to the first of ``replicas`` that accepts it.

    ``max_tokens`` is the cap in force if a policy lowered it, else None;
    ``degraded`` says what a brownout rung did, for the response header.
    """

    request_id: RequestId
    pool: PoolName
    replicas: tuple[ReplicaId, ...]
    queued_s: float
    max_tokens: int | None = None
    degraded: str | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse the request. ``retry_after_s`` is None when a retry cannot help."""

    request_id: RequestId
    reason: RejectReason
    retry_after_s: float | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something an operator wants to see: a rung change, a breaker opening.

    ``kind`` is a bounded vocabulary, used as a log event name and a metric label.
    """

    kind: str
    pool: PoolName
    replica: ReplicaId | None = None
    detail: dict[str, str | int | float] = field(default_factory=dict)


Effect = Dispatch | Reject | Notice
