"""Routing by load alone: round-robin, least-loaded, power of two, KV and queue score."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.routing.settings import RandomSource, RoutingSettings
from serve_app.core.saturation import Replica
from serve_app.core.types import ReplicaId, Ticket

KV_USE_MAX_RATIO = 0.99


class LoadOnly:
    """What policies share that know nothing of caches and remember nothing."""

    def overlap_tokens(self, ticket: Ticket, replica: ReplicaId) -> int:
        """Return 0: no knowledge of what is cached where."""
        return 0

    def placed(self, ticket: Ticket, replica: ReplicaId, now_s: float) -> None:
        """Remember nothing."""

    def forgotten(self, replica: ReplicaId) -> None:
        """Nothing was remembered."""


class RoundRobin(LoadOnly):
    """The replica whose last turn is longest ago; a new replica's turn is at once.

    With a steady set of replicas that all have room this is the plain rotation; a
    replica without room keeps its turn instead of losing it.
    """

    def __init__(self) -> None:
        self._turns: dict[ReplicaId, int] = {}
        self._turn = 0

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by last turn, oldest first; ties as given."""
        turns = self._turns
        return sorted([each.id for each in candidates], key=lambda replica: turns.get(replica, 0))

    def placed(self, ticket: Ticket, replica: ReplicaId, now_s: float) -> None:
        """The replica had its turn."""
        self._turn += 1
        self._turns[replica] = self._turn

    def forgotten(self, replica: ReplicaId) -> None:
        """Drop the turn of a replica that is gone."""
        self._turns.pop(replica, None)


class LeastLoaded(LoadOnly):
    """The fewest requests in flight; ties go to the fewest tokens in flight.

    Counts include what this router sent since the last snapshot (join the shortest
    queue, on fresh numbers).
    """

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by requests, then tokens in flight."""
        return by_load(candidates)


class PowerOfTwo(LoadOnly):
    """The less loaded of two replicas drawn at random; the others follow by load.

    Exponentially better than one random choice and immune to the herd that chases the
    one least-loaded replica on stale numbers. Source: Mitzenmacher, "The power of two
    choices in randomized load balancing"; Ray Serve's default router.
    """

    def __init__(self, random: RandomSource) -> None:
        self._random = random

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Draw two without replacement and put the less loaded first."""
        count = len(candidates)
        if count <= 2:
            return by_load(candidates)
        first = int(self._random.random() * count)
        second = int(self._random.random() * (count - 1))
        second += second >= first
        drawn = by_load((candidates[first], candidates[second]))
        rest = [each for place, each in enumerate(candidates) if place not in (first, second)]
        return [*drawn, *by_load(rest)]


class KvQueueScore(LoadOnly):
    """Least predicted wait with a barrier as the KV cache fills.

    cost = (queued + in-flight tokens) / tokens_per_s + kv_barrier_s x k / (1 - k), with k
    the KV use predicted from what is in flight. The barrier is negligible below half and
    grows without bound towards a full cache, where a request would evict others.

    Source: the SGLang gateway's least-load policy with barrier (0.15 s).
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self._settings = settings

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by cost, ties by requests in flight."""
        settings = self._settings
        rate, barrier_s = settings.tokens_per_s, settings.kv_barrier_s
        costs = [
            (kv_queue_cost_s(each, rate, barrier_s), each.in_flight, each) for each in candidates
        ]
        costs.sort(key=lambda cost: cost[:2])
        return [each.id for _, _, each in costs]


def by_load(candidates: Sequence[Replica]) -> list[ReplicaId]:
    """Return the ids by requests in flight, then tokens in flight, then as given."""
    if len(candidates) == 1:
        return [candidates[0].id]
    ordered = sorted(candidates, key=lambda each: (each.in_flight, each.in_flight_tokens))
    return [each.id for each in ordered]


def kv_queue_cost_s(replica: Replica, tokens_per_s: float, barrier_s: float) -> float:
    """Return the KV and queue score of a replica in seconds; lower is better."""
    kv_ratio = min(replica.kv_prediction_ratio, KV_USE_MAX_RATIO)
    return replica.in_flight_tokens / tokens_per_s + barrier_s * kv_ratio / (1.0 - kv_ratio)
