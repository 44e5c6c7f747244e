"""An open request as the core accounts it, from offer to end."""

from __future__ import annotations

from serve_app.core.saturation import Replica
from serve_app.core.types import PoolName, ReplicaId, TenantId, Ticket


class Entry:
    """A request that waits while ``replica`` is None and is dispatched afterwards.

    ``rank`` is its priority class as an index and ``flow`` whose turn it takes in the
    fair queue; both follow the ticket unless the pool serves in order of arrival. ``pool``
    is where it is served, a fallback perhaps. ``order`` grows with arrival.
    ``predicted_output`` is the answer's length as predicted at its offer;
    ``expected_output`` the same, raised if the answer outgrows it. ``cost`` is what it
    is predicted to cost its tenant, ``charged`` what has been charged so far.
    ``need_tokens`` is the KV room it is accounted with: uncached prompt plus expected
    output. ``resumed_tokens`` are output that another replica delivered, computed again like
    the prompt by the one that goes on from there. ``sparse`` says that its tenant was not
    ahead of its fair share when it asked. The features are what its TTFT was predicted from
    at dispatch.
    """

    __slots__ = (
        "charged",
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
        "pool",
        "predicted_output",
        "predicted_ttft_s",
        "prefill_tokens",
        "rank",
        "replica",
        "resumed_tokens",
        "sparse",
        "ticket",
        "tokens",
        "uncached_tokens",
    )

    def __init__(
        self, ticket: Ticket, pool: PoolName, rank: int, flow: TenantId, order: int
    ) -> None:
        self.ticket = ticket
        self.pool = pool
        self.rank = rank
        self.flow = flow
        self.order = order
        self.offered_s = 0.0
        self.deadline_s = 0.0
        self.dispatched_s = 0.0
        self.replica: Replica | None = None
        self.excluded: tuple[ReplicaId, ...] = ()
        self.sparse = True
        self.tokens = 0
        self.resumed_tokens = 0
        self.has_first_token = False
        self.uncached_tokens = ticket.prompt_tokens
        self.prefill_tokens = 0
        self.predicted_output = 0
        self.expected_output = 0
        self.need_tokens = ticket.prompt_tokens
        self.cost = 0.0
        self.charged = 0.0
        self.output_cap: int | None = None
        self.degraded: str | None = None
        self.feature_prefill_tokens = 0.0
        self.feature_in_flight = 0.0
        self.predicted_ttft_s: float | None = None
