"""What one router knows of each replica's load, and when a replica can take no more.

A snapshot is old the moment it arrives. A replica's load is therefore what this router
has in flight there now, exactly, plus what others had there when the snapshot came:
``running + waiting`` less what was ours at that moment.
"""

from __future__ import annotations

from serve_app.core.policy import PoolPolicy
from serve_app.core.types import ReplicaId, ReplicaView


class Replica:
    """One replica's load as this router accounts it. Mutated by the controller only.

    Routing policies get these as candidates and read: ``id``, ``view``, ``in_flight``,
    ``in_flight_tokens``, ``uncached_prompt_tokens``, ``kv_prediction_ratio``. Counts
    include other routers' work as last reported.
    """

    __slots__ = (
        "id",
        "observed_at_s",
        "others",
        "own",
        "own_tokens",
        "own_uncached_prompt_tokens",
        "view",
    )

    def __init__(self, view: ReplicaView, now_s: float) -> None:
        self.id: ReplicaId = view.replica
        self.own = 0
        self.own_tokens = 0
        self.own_uncached_prompt_tokens = 0
        self.view = view
        self.observed_at_s = now_s
        self.others = view.running + view.waiting

    def observe(self, view: ReplicaView, now_s: float) -> None:
        """Take a newer snapshot; older or repeated ones change nothing."""
        if view.sequence <= self.view.sequence:
            return
        self.view = view
        self.observed_at_s = now_s
        self.others = max(0, view.running + view.waiting - self.own)

    @property
    def in_flight(self) -> int:
        """Requests running or waiting in the engine, ours since the snapshot included."""
        return self.own + self.others

    @property
    def in_flight_tokens(self) -> int:
        """Prompt and expected output tokens of what is in flight."""
        return max(self.own_tokens, sum(self.view.in_flight_tokens))

    @property
    def uncached_prompt_tokens(self) -> int:
        """Prompt tokens sent by this router whose first output token has not come."""
        return self.own_uncached_prompt_tokens

    @property
    def kv_prediction_ratio(self) -> float:
        """KV use expected if everything in flight runs to its expected end; may pass 1."""
        capacity = max(1, self.view.kv_tokens_capacity)
        return max(self.view.kv_usage_ratio, self.in_flight_tokens / capacity)

    def is_fresh(self, policy: PoolPolicy, now_s: float) -> bool:
        """Whether the last snapshot is recent enough to trust."""
        return now_s - self.observed_at_s < policy.stale_after_s

    def has_room(self, policy: PoolPolicy, now_s: float) -> bool:
        """Whether one more request may be sent here now."""
        if self.view.draining or not self.is_fresh(policy, now_s):
            return False
        return self.in_flight < min(policy.max_concurrency_per_replica, self.view.slots)
