"""An open request as the core accounts it, from offer to end."""

from __future__ import annotations

from serve_app.core.saturation import Replica
from serve_app.core.types import ReplicaId, TenantId, Ticket


class Entry:
    """A request that waits while ``replica`` is None and is dispatched afterwards.

    ``rank`` is its priority class as an index and ``flow`` whose turn it takes in the
    fair queue; both follow the ticket unless the pool serves in order of arrival.
    ``order`` grows with arrival. ``expected_output`` is the predicted answer's length,
    raised if the answer outgrows it. ``cost`` is what has been charged, or will be.
    ``need_tokens`` is the KV room it is accounted with: uncached prompt plus expected
    output. The features are what its TTFT was predicted from at dispatch.
    """

    __slots__ = (
        "cost",
        "deadline_s",
        "degraded",
        "dispatched_s",
        "excluded",
        "expected_output",
        "feature_in_flight",
        "feature_prefill_tokens",
        "flow",
        "has_first_token",
        "need_tokens",
        "offered_s",
        "order",
        "output_cap",
        "predicted_ttft_s",
        "rank",
        "replica",
        "ticket",
        "tokens",
        "uncached_tokens",
    )

    def __init__(self, ticket: Ticket, rank: int, flow: TenantId, order: int) -> None:
        self.ticket = ticket
        self.rank = rank
        self.flow = flow
        self.order = order
        self.offered_s = 0.0
        self.deadline_s = 0.0
        self.dispatched_s = 0.0
        self.replica: Replica | None = None
        self.excluded: tuple[ReplicaId, ...] = ()
        self.tokens = 0
        self.has_first_token = False
        self.uncached_tokens = ticket.prompt_tokens
        self.expected_output = 0
        self.need_tokens = ticket.prompt_tokens
        self.cost = 0.0
        self.output_cap: int | None = None
        self.degraded: str | None = None
        self.feature_prefill_tokens = 0.0
        self.feature_in_flight = 0.0
        self.predicted_ttft_s: float | None = None
