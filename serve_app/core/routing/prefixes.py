"""Routing by cached prefixes: sticky until saturated, and three rules in use elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from serve_app.core.prefix_index import PrefixIndex
from serve_app.core.routing.loads import by_load, kv_queue_cost_s
from serve_app.core.routing.rendezvous import rendezvous
from serve_app.core.routing.settings import RandomSource, RoutingSettings
from serve_app.core.saturation import Replica
from serve_app.core.types import ReplicaId, Ticket


class PrefixAware:
    """Keeps a prefix index of what was sent where, for the policies below.

    The last lookup is kept: within one decision the same prompt is asked for several times.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self._settings = settings
        self._index = PrefixIndex(settings.prefix_capacity_blocks)
        self._looked_up: tuple[int, ...] = ()
        self._matches: Mapping[ReplicaId, int] = {}

    def overlap_tokens(self, ticket: Ticket, replica: ReplicaId) -> int:
        """Return the prompt tokens the replica has probably cached, at most all of them."""
        blocks = self._match(ticket).get(replica, 0)
        return ticket.prompt_tokens * blocks // len(ticket.prefix_hashes) if blocks else 0

    def placed(self, ticket: Ticket, replica: ReplicaId, now_s: float) -> None:
        """Remember the prompt as cached on the replica."""
        if ticket.prefix_hashes:
            self._index.record(replica, ticket.prefix_hashes)
            self._looked_up = ()

    def forgotten(self, replica: ReplicaId) -> None:
        """Drop what the lost replica had cached."""
        self._index.forget(replica)
        self._looked_up = ()

    def _match(self, ticket: Ticket) -> Mapping[ReplicaId, int]:
        """Return the matched blocks of a ticket's prompt per replica."""
        if not ticket.prefix_hashes:
            return {}
        if ticket.prefix_hashes is not self._looked_up:
            self._matches = self._index.match(ticket.prefix_hashes)
            self._looked_up = ticket.prefix_hashes
        return self._matches

    def _hit_ratios(self, ticket: Ticket) -> Mapping[ReplicaId, float]:
        """Return the share of a ticket's prompt blocks each replica has cached."""
        total = len(ticket.prefix_hashes)
        return {replica: blocks / total for replica, blocks in self._match(ticket).items()}


class PrefixAffinity(PrefixAware):
    """Sticky until saturated: go where the prompt is cached unless that costs more than it saves.

    1. Predict every candidate's TTFT: its uncached prompt tokens in flight plus the
       prompt's tokens it lacks, over ``prefill_tokens_per_s``.
    2. Sticky candidates hold at least ``sticky_hit_ratio`` of the prompt's blocks. Among
       them take the least uncached tokens in flight.
    3. If its predicted TTFT exceeds the best of all candidates by more than
       ``sticky_gap_s``, or there is none, order by predicted TTFT plus tokens in flight over
       ``balance_tokens_per_s`` plus the KV barrier of ``KvQueueScore``, so a long partial
       match still counts for what it saves. Tokens in flight weigh little there: they slow
       decoding by tens of nanoseconds each, a prompt ahead delays the first token by tens
       of microseconds per token.
    4. A prompt cached nowhere, as far as this router knows, goes to its home within the
       same gap: the replica a hash of its beginning and the replica's id prefers, so that
       routers which share no index still send equal beginnings to one place.

    A replica without room is no candidate, so affinity also ends where admission's own
    limit is reached, and returns when there is room.

    Source: llm-d's prefix-affinity filter (2026-08); Dynamo's overlap-discounted prefill
    cost for step 3; rendezvous hashing within a load bound for step 4.
    """

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by affinity while it pays, else by predicted cost."""
        if len(candidates) == 1:
            return [candidates[0].id]
        waits_s = self._waits_s(ticket, candidates)
        settings = self._settings
        rate, barrier_s = settings.balance_tokens_per_s, settings.kv_barrier_s
        costs = sorted(
            (
                wait_s
                + (each.others_prefill_tokens + each.expected_prefill_tokens)
                / settings.prefill_tokens_per_s
                + kv_queue_cost_s(each, rate, barrier_s),
                each.in_flight,
                place,
            )
            for place, (each, wait_s) in enumerate(zip(candidates, waits_s, strict=True))
        )
        order = [place for _, _, place in costs]
        gap_s = settings.sticky_gap_s
        first = self._sticky(ticket, candidates)
        if first is not None:
            if waits_s[first] - min(waits_s) > gap_s:
                first = None
        elif ticket.prefix_hashes:
            first = self._home(ticket, candidates)
            cost_s = next(cost_s for cost_s, _, place in costs if place == first)
            if cost_s - costs[0][0] > gap_s:
                first = None
        if first is not None:
            order.remove(first)
            order.insert(0, first)
        return [candidates[place].id for place in order]

    def _waits_s(self, ticket: Ticket, candidates: Sequence[Replica]) -> list[float]:
        """Return the predicted TTFT of each candidate."""
        matches, blocks = self._match(ticket), max(1, len(ticket.prefix_hashes))
        rate = self._settings.prefill_tokens_per_s
        return [
            (
                each.uncached_prompt_tokens
                + ticket.prompt_tokens * (1.0 - matches.get(each.id, 0) / blocks)
            )
            / rate
            for each in candidates
        ]

    def _home(self, ticket: Ticket, candidates: Sequence[Replica]) -> int:
        """Return the place of the replica every router would choose for this beginning."""
        name = str(ticket.prefix_hashes[0])
        return max(range(len(candidates)), key=lambda place: rendezvous(name, candidates[place].id))

    def _sticky(self, ticket: Ticket, candidates: Sequence[Replica]) -> int | None:
        """Return the place of the least busy candidate that holds the prompt, if any."""
        matches = self._match(ticket)
        if not matches:
            return None
        needed = self._settings.sticky_hit_ratio * len(ticket.prefix_hashes)
        holders = [
            (each.uncached_prompt_tokens, each.in_flight, place)
            for place, each in enumerate(candidates)
            if matches.get(each.id, 0) >= needed
        ]
        return min(holders)[2] if holders else None


class CacheAware(PrefixAware):
    """Best prefix while loads are balanced, shortest queue when they are not.

    Loads are imbalanced iff max - min > ``imbalance_requests`` and max >
    ``imbalance_factor`` x min, in requests in flight: then least load. Otherwise the
    longest match if it covers more than ``cache_hit_ratio`` of the prompt, else least
    load. SGLang sends such misses to the replica with the smallest tree instead, which
    starves caches in a spiral (sglang#14532); least load is its published remedy.

    Source: SGLang router's cache-aware policy (defaults 64, 1.5, 0.5).
    """

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by load, with the best match first where the rule allows it."""
        order = by_load(candidates)
        settings = self._settings
        loads = [each.in_flight for each in candidates]
        most, least = max(loads), min(loads)
        if most - least > settings.imbalance_requests and most > settings.imbalance_factor * least:
            return order
        ratios = self._hit_ratios(ticket)
        best = max(order, key=lambda replica: ratios.get(replica, 0.0))
        if ratios.get(best, 0.0) > settings.cache_hit_ratio:
            order.remove(best)
            order.insert(0, best)
        return order


class AbandonAffinity(PrefixAware):
    """Longest match, abandoned when the fleet or the match is out of line.

    If max - min requests in flight exceeds ``abandon_gap_requests``, order by load.
    Otherwise order by match, longest first and least loaded among equals, with replicas
    whose load exceeds mean + ``abandon_sigmas`` x standard deviation after all others.

    Source: AIBrix's prefix-cache router (16 requests, 2 sigma).
    """

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by match while loads are in line, else by load."""
        order = by_load(candidates)
        loads = {each.id: each.in_flight for each in candidates}
        matches = self._match(ticket)
        gap = max(loads.values()) - min(loads.values())
        if not matches or gap > self._settings.abandon_gap_requests:
            return order
        mean = sum(loads.values()) / len(loads)
        variance = sum((load - mean) ** 2 for load in loads.values()) / len(loads)
        limit = mean + self._settings.abandon_sigmas * variance**0.5
        order.sort(key=lambda replica: (loads[replica] > limit, -matches.get(replica, 0)))
        return order


class WeightedScore(PrefixAware):
    """The Gateway API inference extension's scorer, as users run it today.

    score = ``queue_weight`` x (1 - normalised queue) + ``kv_weight`` x (1 - KV use) +
    ``prefix_weight`` x hit ratio; the highest score wins, ties at random. Queue and KV use
    are those of the last snapshot only, without what was sent since: a baseline keeps its
    flaws. The queue is normalised between the candidates' least and most (1 when equal).

    Source: the extension's default profile (queue 2, kv 2, prefix 3).
    """

    def __init__(self, settings: RoutingSettings, random: RandomSource) -> None:
        super().__init__(settings)
        self._random = random

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Order by score, highest first."""
        settings = self._settings
        queues = [each.view.waiting for each in candidates]
        most, span = max(queues), max(queues) - min(queues)
        ratios = self._hit_ratios(ticket)
        scored = [
            (
                settings.queue_weight * ((most - each.view.waiting) / span if span else 1.0)
                + settings.kv_weight * (1.0 - each.view.kv_usage_ratio)
                + settings.prefix_weight * ratios.get(each.id, 0.0),
                self._random.random(),
                each.id,
            )
            for each in candidates
        ]
        scored.sort(reverse=True)
        return [replica for _, _, replica in scored]
