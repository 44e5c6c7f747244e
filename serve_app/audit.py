"""What is known of one request, for its log line, the metrics and the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.core.types import Outcome, PoolName, PriorityClass, ReplicaId, RequestId
from serve_app.keys import KeyRecord
from serve_app.relay import Delivery
from serve_app.usage import Charge


@dataclass(slots=True)
class Audit:
    """Everything said of one request. Times are monotonic seconds.

    ``charge`` is there once an engine was asked; ``booked`` once the router's record of it
    was handed to the journal. ``expected_prompt_tokens`` stands in for the engine's count.
    ``price_version`` is that of the book in force when it was known what is asked for.
    """

    request_id: RequestId
    endpoint: str
    arrived_at_s: float
    client_label: str | None = None
    key: KeyRecord | None = None
    model: str | None = None
    pool: PoolName | None = None
    asked_class: PriorityClass | None = None
    served_class: PriorityClass | None = None
    decision: str = "refused"
    reason: str | None = None
    replica: ReplicaId | None = None
    queued_s: float | None = None
    outcome: Outcome | None = None
    degraded: str | None = None
    rated: bool = False
    status: int = 200
    ended_at_s: float | None = None
    delivery: Delivery = field(default_factory=Delivery)
    user: str | None = None
    tag: str = ""
    expected_prompt_tokens: int = 0
    price_version: int | None = None
    charge: Charge | None = None
    booked: bool = False


def token_interval_s(delivery: Delivery) -> float | None:
    """Return the mean time between output tokens of a stream, None if it had no two."""
    spread_s = since(delivery.first_byte_at_s, delivery.last_byte_at_s)
    if spread_s is None or not delivery.streamed or delivery.output_tokens < 2:
        return None
    return spread_s / (delivery.output_tokens - 1)


def since(start_s: float | None, at_s: float | None) -> float | None:
    """Return the time between two moments, None if one of them never came."""
    return None if start_s is None or at_s is None else at_s - start_s
