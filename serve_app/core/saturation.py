"""What one router knows of each replica's load, and when a replica can take no more.

A snapshot is old the moment it arrives. A replica's load is therefore what this router
has in flight there now, exactly, plus what others had there when the snapshot came:
the reported figure less what was ours at that moment. What was dispatched since the
snapshot is so counted, and what ended since is not.

KV use is predicted, not read: every request of ours with its uncached prompt and its
whole expected output, plus the use the snapshot shows beyond what ours explain. A
replica is saturated when any side of its knee is reached (hybrid detector: the most
loaded dimension decides), or when it has been silent for three snapshots.
"""

from __future__ import annotations

from math import inf

from serve_app.core.breaker import Breaker
from serve_app.core.exchange import ALONE, Part, divided
from serve_app.core.policy import PoolPolicy
from serve_app.core.types import ReplicaId, ReplicaView, TenantId

PROMPT_RATE = 0.01


class Prompts:
    """What the pool's prompts are like, over about the last hundred.

    ``uncached_ratio`` is how much of a prompt is not cached where it goes: engines report
    whole prompts.
    """

    __slots__ = ("uncached_ratio",)

    def __init__(self) -> None:
        self.uncached_ratio = 1.0

    def learn(self, prompt_tokens: int, uncached_tokens: int) -> None:
        """A prompt was sent, so much of it not cached."""
        ratio = uncached_tokens / max(1, prompt_tokens)
        self.uncached_ratio += PROMPT_RATE * (ratio - self.uncached_ratio)


class Replica:
    """One replica's load as this router accounts it. Mutated by the controller only.

    Routing policies get these as candidates and read: ``id``, ``view``, ``in_flight``,
    ``in_flight_tokens``, ``uncached_prompt_tokens``, ``kv_prediction_ratio``. Counts
    include other routers' work as last reported. ``own_*`` is this router's work:
    requests, KV tokens they are expected to need, tokens they hold by now, and prompt
    tokens, all and uncached, whose first output token has not come. ``own_cap`` is how
    many requests it may have here: what the others leave of ``slots_cap``.
    ``expected_prefill_tokens`` is what another router may send here before the next
    snapshot: all see a replica become free at the same moment, and by turns one of them
    prefers it. ``live`` is false once the replica drains or left the set.
    """

    __slots__ = (
        "breaker",
        "expected_prefill_tokens",
        "id",
        "kv_capacity",
        "live",
        "observed_at_s",
        "others",
        "others_kv_tokens",
        "others_prefill_tokens",
        "others_tokens",
        "own",
        "own_by_class",
        "own_by_tenant",
        "own_cap",
        "own_prefill_by_class",
        "own_present_tokens",
        "own_prompt_tokens",
        "own_tokens",
        "own_tokens_by_class",
        "own_uncached_prompt_tokens",
        "prefill_knee_tokens",
        "slots_cap",
        "token_limits",
        "view",
    )

    def __init__(
        self,
        view: ReplicaView,
        now_s: float,
        policy: PoolPolicy | None = None,
        part: Part = ALONE,
    ) -> None:
        policy = policy or PoolPolicy()
        self.id: ReplicaId = view.replica
        self.own = 0
        self.own_tokens = 0
        self.own_present_tokens = 0
        self.own_prompt_tokens = 0
        self.own_uncached_prompt_tokens = 0
        self.own_by_class = [0, 0, 0]
        self.own_tokens_by_class = [0, 0, 0]
        self.own_prefill_by_class = [0, 0, 0]
        self.own_by_tenant: dict[TenantId, list[int]] = {}
        self.expected_prefill_tokens = 0
        self.breaker = Breaker(policy.breaker)
        self._take(view, now_s)
        self.limit(policy, part)

    def limit(self, policy: PoolPolicy, part: Part = ALONE) -> None:
        """Apply the pool's knee: requests in flight, and tokens in flight by class."""
        self.breaker.configure(policy.breaker)
        self.prefill_knee_tokens = policy.prefill_knee_tokens
        self.slots_cap = min(policy.max_concurrency_per_replica, self.view.slots)
        knee = policy.knee_tokens_per_replica or self.kv_capacity
        self.token_limits = tuple(
            [min(knee, int(each.kv_limit_ratio * self.kv_capacity)) for each in policy.classes]
        )
        self._claim(part)

    def observe(
        self, view: ReplicaView, now_s: float, part: Part = ALONE, prompts: Prompts | None = None
    ) -> bool:
        """Take a newer snapshot; older or repeated ones change nothing. Return if taken.

        Of the places it shows free this router may fill its ``part``. ``prompts`` says what
        prompts are like.
        """
        if view.sequence <= self.view.sequence:
            return False
        self._take(view, now_s, prompts.uncached_ratio if prompts else 1.0)
        self._claim(part)
        if prompts is None:
            return True
        others_turn = divided(1, part, self.id, view.sequence) == 0
        self.expected_prefill_tokens = self.prefill_knee_tokens if others_turn else 0
        return True

    def _claim(self, part: Part) -> None:
        """Set how many requests this router may have here until the next snapshot."""
        free = self.slots_cap - self.own - self.others
        self.own_cap = self.own + divided(free, part, self.id, self.view.sequence)

    def _take(self, view: ReplicaView, now_s: float, uncached_ratio: float = 1.0) -> None:
        self.view = view
        self.observed_at_s = now_s
        self.live = not view.draining
        self.kv_capacity = max(1, view.kv_tokens_capacity)
        present = self.own_present_tokens
        self.others_prefill_tokens = 0
        if view.prefill_tokens:
            others = max(0, view.prefill_tokens - self.own_prompt_tokens)
            self.others_prefill_tokens = int(uncached_ratio * others)
        self.others = max(0, view.running + view.waiting - self.own)
        self.others_tokens = max(0, sum(view.in_flight_tokens) - present)
        self.others_kv_tokens = max(0, int(view.kv_usage_ratio * self.kv_capacity) - present)

    @property
    def in_flight(self) -> int:
        """Requests running or waiting in the engine, ours since the snapshot included."""
        return self.own + self.others

    @property
    def in_flight_tokens(self) -> int:
        """Uncached prompt and expected output tokens of what is in flight."""
        return self.own_tokens + self.others_tokens

    @property
    def uncached_prompt_tokens(self) -> int:
        """Prompt tokens sent by this router whose first output token has not come."""
        return self.own_uncached_prompt_tokens

    @property
    def kv_prediction_ratio(self) -> float:
        """KV use expected if everything in flight runs to its expected end; may pass 1."""
        return (self.own_tokens + self.others_kv_tokens) / self.kv_capacity

    def is_fresh(self, policy: PoolPolicy, now_s: float) -> bool:
        """Whether the last snapshot is recent enough to trust."""
        return now_s - self.observed_at_s < policy.stale_after_s

    def saturation_ratio(self, policy: PoolPolicy, now_s: float) -> float:
        """Return load over knee, the larger of slots, prompt tokens and KV; stale: inf."""
        if not self.live or not self.is_fresh(policy, now_s):
            return inf
        return max(
            self.in_flight / max(1, self.slots_cap),
            (self.own_uncached_prompt_tokens + self.others_prefill_tokens)
            / policy.prefill_knee_tokens,
            self.kv_prediction_ratio / policy.critical.kv_limit_ratio,
        )
