"""The one state machine of a router: events with ``now_s`` go in, effects come out.

It owns what spans requests: who waits, what runs where, which replica is next. It does
no I/O and reads no clock, so the live router, the simulator and the property tests
drive the same object. Events are synchronous; each checks and changes state in one
step. Time never runs backwards inside: an earlier ``now_s`` counts as the latest seen.

A request is *offered* once and decided once: Dispatch or Reject. A dispatched request
ends once, by ``finish``, ``cancel`` or a ``fail`` that returns Reject; a ``fail`` that
returns Dispatch has moved it to another replica. Ending an unknown id returns no effect,
so a shell may end a request from every path that can.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import exp, inf
from typing import Protocol

from serve_app.core.policy import PoolPolicy
from serve_app.core.saturation import Replica
from serve_app.core.types import (
    Dispatch,
    Effect,
    Outcome,
    PoolName,
    Reject,
    RejectReason,
    ReplicaId,
    ReplicaView,
    RequestId,
    Ticket,
    Usage,
)

FALLBACKS_MAX = 3
DRAIN_WINDOW_S = 30.0


class RoutingPolicy(Protocol):
    """Orders replicas for a request. One instance per pool; calls are in event order."""

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        """Return ids of ``candidates``, best first.

        ``candidates`` is not empty and holds replicas that have room now; the order
        given is the order in which they were first seen. An empty answer means
        "none of these yet": the request keeps waiting.
        """

    def overlap_tokens(self, ticket: Ticket, replica: ReplicaId) -> int:
        """Return how many of the prompt's tokens the replica probably has cached."""

    def placed(self, ticket: Ticket, replica: ReplicaId, now_s: float) -> None:
        """Take note that the request went to ``replica``."""

    def forgotten(self, replica: ReplicaId) -> None:
        """Take note that the replica is gone; drop what was kept for it."""


class LeastLoaded:
    """The replica with the fewest requests in flight; ties go to the least KV use."""

    def rank(
        self, ticket: Ticket, candidates: Sequence[Replica], now_s: float
    ) -> Sequence[ReplicaId]:
        ordered = sorted(candidates, key=lambda r: (r.in_flight, r.view.kv_usage_ratio))
        return [replica.id for replica in ordered]

    def overlap_tokens(self, ticket: Ticket, replica: ReplicaId) -> int:
        return 0

    def placed(self, ticket: Ticket, replica: ReplicaId, now_s: float) -> None:
        return

    def forgotten(self, replica: ReplicaId) -> None:
        return


def least_loaded(policy: PoolPolicy) -> RoutingPolicy:
    """Build the default routing, whatever ``policy.routing`` says."""
    return LeastLoaded()


class _Entry:
    """An open request: waiting while ``replica`` is None, dispatched afterwards."""

    __slots__ = ("deadline_s", "excluded", "offered_s", "pool", "replica", "ticket", "tokens")

    def __init__(self, ticket: Ticket, pool: _Pool, now_s: float) -> None:
        self.ticket = ticket
        self.pool = pool
        self.offered_s = now_s
        deadline_s = now_s + pool.policy.queue_timeout_s
        if ticket.expires_at_s is not None:
            deadline_s = min(deadline_s, ticket.expires_at_s)
        self.deadline_s = deadline_s
        self.replica: Replica | None = None
        self.excluded: tuple[ReplicaId, ...] = ()
        self.tokens = 0


class _DrainRate:
    """Requests ended per second, exponentially forgotten over ``DRAIN_WINDOW_S``."""

    __slots__ = ("started_s", "updated_s", "weight")

    def __init__(self, now_s: float) -> None:
        self.weight = 0.0
        self.updated_s = now_s
        self.started_s = now_s

    def ended(self, now_s: float) -> None:
        self.weight = self.weight * exp((self.updated_s - now_s) / DRAIN_WINDOW_S) + 1.0
        self.updated_s = now_s

    def per_s(self, now_s: float) -> float:
        weight = self.weight * exp((self.updated_s - now_s) / DRAIN_WINDOW_S)
        seen = 1.0 - exp((self.started_s - now_s) / DRAIN_WINDOW_S)
        return weight / (DRAIN_WINDOW_S * max(seen, 0.03))


class _Pool:
    """One pool's replicas and waiting requests."""

    __slots__ = (
        "closing",
        "drain",
        "empty_since_s",
        "in_flight",
        "name",
        "policy",
        "replicas",
        "routing",
        "waiting",
    )

    def __init__(
        self, name: PoolName, policy: PoolPolicy, routing: RoutingPolicy, now_s: float
    ) -> None:
        self.name = name
        self.policy = policy
        self.routing = routing
        self.replicas: dict[ReplicaId, Replica] = {}
        self.waiting: OrderedDict[RequestId, _Entry] = OrderedDict()
        self.in_flight = 0
        self.closing = False
        self.empty_since_s: float | None = now_s
        self.drain = _DrainRate(now_s)

    def retry_after_s(self, now_s: float) -> float:
        """When a refused client may find room, from the queue and the observed drain rate."""
        policy = self.policy
        per_s = self.drain.per_s(now_s)
        wait_s = (len(self.waiting) + 1) / per_s if per_s > 0 else policy.retry_after_min_s
        return min(max(wait_s, policy.retry_after_min_s), policy.retry_after_max_s)

    def candidates(self, excluded: tuple[ReplicaId, ...], now_s: float) -> list[Replica]:
        return [
            replica
            for replica in self.replicas.values()
            if replica.has_room(self.policy, now_s) and replica.id not in excluded
        ]

    def hold_deadline_s(self) -> float:
        """When the oldest waiting request has been without any replica for too long."""
        if self.empty_since_s is None or not self.waiting:
            return inf
        oldest = next(iter(self.waiting.values()))
        return max(oldest.offered_s, self.empty_since_s) + self.policy.hold_without_replica_s


class Controller:
    """Admission, queueing and routing of every pool, for one router."""

    def __init__(self, routing: Callable[[PoolPolicy], RoutingPolicy] = least_loaded) -> None:
        """Start with no pools; ``routing`` builds each pool's ranking from its policy."""
        self._build_routing = routing
        self._pools: dict[PoolName, _Pool] = {}
        self._entries: dict[RequestId, _Entry] = {}
        self._pool_of: dict[ReplicaId, _Pool] = {}
        self._deadlines: list[tuple[float, int, RequestId]] = []
        self._order = 0
        self._now_s = -inf

    # Events

    def configure(self, pools: Mapping[PoolName, PoolPolicy], now_s: float) -> list[Effect]:
        """Make these the pools. Requests already accepted keep their place and deadline.

        A pool that is gone takes no offers but drains; it disappears with its last
        request. A smaller queue refuses new requests and never drops waiting ones.
        """
        now_s, effects = self._begin(now_s)
        for name, policy in pools.items():
            pool = self._pools.get(name)
            if pool is None:
                self._pools[name] = _Pool(name, policy, self._build_routing(policy), now_s)
                continue
            if pool.policy.routing != policy.routing:
                pool.routing = self._build_routing(policy)
            pool.policy = policy
            pool.closing = False
        for name, pool in list(self._pools.items()):
            if name not in pools:
                pool.closing = True
                self._drop_if_drained(pool)
            else:
                self._pump(pool, now_s, effects)
        return effects

    def offer(self, ticket: Ticket, now_s: float) -> list[Effect]:
        """Take a new request: Dispatch, Reject, or nothing yet (it waits).

        Ids are made by the server: offering an open id again is a bug and asserts.
        """
        assert ticket.request_id not in self._entries, "request ids are offered once"
        now_s, effects = self._begin(now_s)
        pool = self._pools.get(ticket.pool)
        if pool is None or pool.closing:
            effects.append(Reject(ticket.request_id, RejectReason.UNKNOWN_POOL, None))
            return effects
        entry = _Entry(ticket, pool, now_s)
        if entry.deadline_s <= now_s:
            self._refuse(entry, RejectReason.QUEUE_TIMEOUT, now_s, effects)
            return effects
        if not pool.waiting:
            dispatch = self._place(entry, now_s)
            if dispatch is not None:
                self._entries[ticket.request_id] = entry
                effects.append(dispatch)
                return effects
        if len(pool.waiting) >= pool.policy.queue_capacity:
            self._refuse(entry, RejectReason.QUEUE_FULL, now_s, effects)
            return effects
        self._enqueue(entry)
        return effects

    def progress(
        self, replica: ReplicaId, tokens: Iterable[tuple[RequestId, int]], now_s: float
    ) -> list[Effect]:
        """Count newly generated tokens, once per frame batch; unknown ids are ignored.

        ``replica`` is where they came from: if a fallback took the request, its load is
        moved there.
        """
        now_s, effects = self._begin(now_s)
        moved: _Pool | None = None
        for request_id, count in tokens:
            entry = self._entries.get(request_id)
            if entry is None or entry.replica is None:
                continue
            entry.tokens += count
            if entry.replica.id != replica:
                actual = entry.pool.replicas.get(replica)
                if actual is not None:
                    self._release_replica(entry)
                    self._hold_replica(entry, actual)
                    moved = entry.pool
        if moved is not None:
            self._pump(moved, now_s, effects)
        return effects

    def finish(
        self, request_id: RequestId, usage: Usage, outcome: Outcome, now_s: float
    ) -> list[Effect]:
        """End a request with the engine's count; frees its slot. Unknown ids: no effect."""
        return self._end(request_id, now_s)

    def cancel(self, request_id: RequestId, now_s: float) -> list[Effect]:
        """End a request whose client left, waiting or dispatched. Unknown ids: no effect."""
        return self._end(request_id, now_s)

    def fail(self, request_id: RequestId, replica: ReplicaId, now_s: float) -> list[Effect]:
        """Move a dispatched request that ``replica`` could not serve to another one.

        Only for requests of which no token was delivered. Replicas that failed it are not
        tried again. Prefers replicas with room; otherwise any live one, since the
        request was admitted once and must not wait twice. Returns Dispatch, or
        Reject(NO_REPLICA), which ends it. Unknown or waiting ids: no effect of their own.
        """
        now_s, effects = self._begin(now_s)
        entry = self._entries.get(request_id)
        if entry is None or entry.replica is None:
            return effects
        pool = entry.pool
        entry.excluded = (*entry.excluded, entry.replica.id, replica)
        self._release_replica(entry)
        dispatch = self._place(entry, now_s) or self._place_anywhere(entry, now_s)
        if dispatch is None:
            del self._entries[request_id]
            self._refuse(entry, RejectReason.NO_REPLICA, now_s, effects)
        else:
            effects.append(dispatch)
        self._pump(pool, now_s, effects)
        self._drop_if_drained(pool)
        return effects

    def observe(self, view: ReplicaView, now_s: float) -> list[Effect]:
        """Take a replica's load snapshot; a new replica is known from its first one.

        Snapshots not newer than the last are ignored, and so are those of unknown pools.
        """
        now_s, effects = self._begin(now_s)
        pool = self._pools.get(view.pool)
        if pool is None:
            return effects
        known = pool.replicas.get(view.replica)
        if known is not None:
            known.observe(view, now_s)
        else:
            pool.replicas[view.replica] = Replica(view, now_s)
            pool.empty_since_s = None
            self._pool_of[view.replica] = pool
        self._pump(pool, now_s, effects)
        return effects

    def forget(self, replica: ReplicaId, now_s: float) -> list[Effect]:
        """Drop a replica that left the set. What runs there stays until it is ended."""
        now_s, effects = self._begin(now_s)
        pool = self._pool_of.pop(replica, None)
        if pool is not None:
            self._drop_replica(pool, replica, now_s)
        return effects

    def advance(self, now_s: float) -> list[Effect]:
        """Let time pass: refuse what waited too long, drop replicas long unheard of."""
        now_s, effects = self._begin(now_s)
        for pool in list(self._pools.values()):
            for replica in list(pool.replicas.values()):
                if now_s - replica.observed_at_s >= pool.policy.lost_after_s:
                    self._pool_of.pop(replica.id, None)
                    self._drop_replica(pool, replica.id, now_s)
            self._give_up_holding(pool, now_s, effects)
            self._pump(pool, now_s, effects)
            self._drop_if_drained(pool)
        return effects

    def next_wakeup_s(self) -> float | None:
        """When ``advance`` must be called at the latest, or None if nothing is due."""
        self._trim_deadlines()
        earliest_s = self._deadlines[0][0] if self._deadlines else inf
        for pool in self._pools.values():
            earliest_s = min(earliest_s, pool.hold_deadline_s())
        return None if earliest_s == inf else earliest_s

    # Figures

    def queue_depth(self, pool: PoolName) -> int:
        """Return how many requests wait for ``pool``; 0 for an unknown pool."""
        known = self._pools.get(pool)
        return len(known.waiting) if known else 0

    def in_flight(self, pool: PoolName | None = None) -> int:
        """Return how many requests are dispatched and not ended, in one pool or in all."""
        if pool is not None:
            known = self._pools.get(pool)
            return known.in_flight if known else 0
        return sum(each.in_flight for each in self._pools.values())

    def replicas(self, pool: PoolName) -> Sequence[Replica]:
        """Return the replicas known in ``pool`` with their load; read only."""
        known = self._pools.get(pool)
        return list(known.replicas.values()) if known else []

    def open_requests(self) -> int:
        """Return how many requests are waiting or dispatched."""
        return len(self._entries)

    # Inside

    def _begin(self, now_s: float) -> tuple[float, list[Effect]]:
        """Start an event: clamp time and refuse whatever is past its deadline."""
        if now_s > self._now_s:
            self._now_s = now_s
        effects: list[Effect] = []
        while self._deadlines and self._deadlines[0][0] <= self._now_s:
            entry = self._entries.get(heapq.heappop(self._deadlines)[2])
            if entry is None or entry.replica is not None:
                continue
            if entry.deadline_s <= self._now_s:
                self._unqueue(entry)
                self._refuse(entry, RejectReason.QUEUE_TIMEOUT, self._now_s, effects)
                self._drop_if_drained(entry.pool)
        return self._now_s, effects

    def _end(self, request_id: RequestId, now_s: float) -> list[Effect]:
        now_s, effects = self._begin(now_s)
        entry = self._entries.get(request_id)
        if entry is None:
            return effects
        pool = entry.pool
        if entry.replica is None:
            self._unqueue(entry)
        else:
            del self._entries[request_id]
            self._release_replica(entry)
            pool.drain.ended(now_s)
        self._pump(pool, now_s, effects)
        self._drop_if_drained(pool)
        return effects

    def _enqueue(self, entry: _Entry) -> None:
        request_id = entry.ticket.request_id
        self._entries[request_id] = entry
        entry.pool.waiting[request_id] = entry
        self._order += 1
        heapq.heappush(self._deadlines, (entry.deadline_s, self._order, request_id))

    def _unqueue(self, entry: _Entry) -> None:
        del entry.pool.waiting[entry.ticket.request_id]
        del self._entries[entry.ticket.request_id]

    def _refuse(
        self, entry: _Entry, reason: RejectReason, now_s: float, effects: list[Effect]
    ) -> None:
        retry_after_s = entry.pool.retry_after_s(now_s)
        effects.append(Reject(entry.ticket.request_id, reason, retry_after_s))

    def _pump(self, pool: _Pool, now_s: float, effects: list[Effect]) -> None:
        """Dispatch waiting requests, oldest first, while a replica has room."""
        while pool.waiting:
            entry = next(iter(pool.waiting.values()))
            dispatch = self._place(entry, now_s)
            if dispatch is None:
                return
            del pool.waiting[entry.ticket.request_id]
            effects.append(dispatch)
        self._trim_deadlines()

    def _place(self, entry: _Entry, now_s: float) -> Dispatch | None:
        candidates = entry.pool.candidates(entry.excluded, now_s)
        return self._dispatch(entry, candidates, now_s) if candidates else None

    def _place_anywhere(self, entry: _Entry, now_s: float) -> Dispatch | None:
        pool = entry.pool
        live = [
            replica
            for replica in pool.replicas.values()
            if replica.is_fresh(pool.policy, now_s)
            and not replica.view.draining
            and replica.id not in entry.excluded
        ]
        return self._dispatch(entry, live, now_s) if live else None

    def _dispatch(
        self, entry: _Entry, candidates: Sequence[Replica], now_s: float
    ) -> Dispatch | None:
        pool, ticket = entry.pool, entry.ticket
        ranked = tuple(pool.routing.rank(ticket, candidates, now_s)[: 1 + FALLBACKS_MAX])
        if not ranked:
            return None
        self._hold_replica(entry, pool.replicas[ranked[0]])
        pool.routing.placed(ticket, ranked[0], now_s)
        return Dispatch(ticket.request_id, pool.name, ranked, now_s - entry.offered_s)

    def _hold_replica(self, entry: _Entry, replica: Replica) -> None:
        entry.replica = replica
        replica.own += 1
        replica.own_tokens += entry.ticket.prompt_tokens
        entry.pool.in_flight += 1

    def _release_replica(self, entry: _Entry) -> None:
        assert entry.replica is not None
        entry.replica.own -= 1
        entry.replica.own_tokens -= entry.ticket.prompt_tokens
        entry.pool.in_flight -= 1
        assert entry.replica.own >= 0
        entry.replica = None

    def _drop_replica(self, pool: _Pool, replica: ReplicaId, now_s: float) -> None:
        del pool.replicas[replica]
        pool.routing.forgotten(replica)
        if not pool.replicas:
            pool.empty_since_s = now_s

    def _give_up_holding(self, pool: _Pool, now_s: float, effects: list[Effect]) -> None:
        reason = RejectReason.POOL_CLOSING if pool.closing else RejectReason.NO_REPLICA
        while pool.hold_deadline_s() <= now_s:
            entry = next(iter(pool.waiting.values()))
            self._unqueue(entry)
            self._refuse(entry, reason, now_s, effects)

    def _drop_if_drained(self, pool: _Pool) -> None:
        if pool.closing and not pool.waiting and not pool.in_flight:
            for replica in pool.replicas:
                self._pool_of.pop(replica, None)
            self._pools.pop(pool.name, None)

    def _trim_deadlines(self) -> None:
        """Drop deadlines of requests that no longer wait, at the top and when they pile up."""
        heap = self._deadlines
        while heap and not self._is_waiting(heap[0][2]):
            heapq.heappop(heap)
        if len(heap) > 64 + 2 * len(self._entries):
            self._deadlines = [item for item in heap if self._is_waiting(item[2])]
            heapq.heapify(self._deadlines)

    def _is_waiting(self, request_id: RequestId) -> bool:
        entry = self._entries.get(request_id)
        return entry is not None and entry.replica is None
