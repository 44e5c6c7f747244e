"""The one state machine of a router: events with ``now_s`` go in, effects come out.

It owns what spans requests: who waits, what runs where, which replica is next. It does
no I/O and reads no clock, so the live router, the simulator and the property tests
drive the same object. Events are synchronous; each checks and changes state in one
step. Time never runs backwards inside: an earlier ``now_s`` counts as the latest seen.

A request is *offered* once and decided once: Dispatch or Reject. A dispatched request
ends once, by ``finish``, ``cancel`` or a ``fail`` that returns Reject; a ``fail`` that
returns Dispatch has moved it to another replica. Ending an unknown id returns no effect,
so a shell may end a request from every path that can.

What a pool decides and how is in pool.py and refusals.py; here is which pool an event
belongs to, every open request, and every deadline.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf

from serve_app.core.entry import Entry
from serve_app.core.exchange import STOOD_STILL_S, Digest, RouterId
from serve_app.core.figures import PoolFigures, noisiest_tenants, pool_figures
from serve_app.core.load import RoutingPolicy
from serve_app.core.policy import PoolPolicy
from serve_app.core.pool import ONLY_ROUTER, Pool
from serve_app.core.refusals import refusal_at_offer, refusal_to_wait, refuse, sheds
from serve_app.core.saturation import Replica
from serve_app.core.types import (
    Effect,
    Failure,
    Notice,
    Outcome,
    PoolName,
    Reject,
    RejectReason,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)

__all__ = ["Controller", "LeastLoaded", "RoutingPolicy", "least_loaded"]

LADDER_PERIOD_S = 0.1


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


class Controller:
    """Admission, queueing and routing of every pool, for one router."""

    def __init__(
        self,
        routing: Callable[[PoolPolicy], RoutingPolicy] = least_loaded,
        router: RouterId = ONLY_ROUTER,
    ) -> None:
        """Start with no pools; ``routing`` builds each pool's ranking from its policy.

        ``router`` tells this router from the others of its fleet (exchange.py).
        """
        self._build_routing = routing
        self._router = router
        self._told = 0
        self._heard: dict[RouterId, int] = {}
        self._pools: dict[PoolName, Pool] = {}
        self._entries: dict[RequestId, Entry] = {}
        self._pool_of: dict[ReplicaId, Pool] = {}
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
                routing = self._build_routing(policy)
                self._pools[name] = Pool(name, policy, routing, now_s, self._router)
                continue
            known = pool.policy
            if (known.routing, known.routing_settings) != (
                policy.routing,
                policy.routing_settings,
            ):
                pool.routing = self._build_routing(policy)
            pool.reconfigure(policy)
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
        request_id = ticket.request_id
        assert request_id not in self._entries, "request ids are offered once"
        now_s, effects = self._begin(now_s)
        pool = self._pools.get(ticket.pool)
        if pool is None or pool.closing:
            effects.append(Reject(request_id, RejectReason.UNKNOWN_POOL, None))
            return effects
        pool, entry = self._entry(pool, ticket, now_s)
        reason = refusal_at_offer(pool, entry, now_s)
        if reason is not None:
            effects.append(refuse(pool, entry, reason, now_s))
            return effects
        pool.load.enter(ticket.tenant)
        dispatch = pool.dispatch_at_once(entry, now_s)
        if dispatch is not None:
            self._entries[request_id] = entry
            effects.append(dispatch)
            return effects
        reason = refusal_to_wait(pool, entry, now_s)
        if reason is not None:
            pool.load.leave(ticket.tenant)
            effects.append(refuse(pool, entry, reason, now_s))
            return effects
        self._entries[request_id] = entry
        heapq.heappush(self._deadlines, (entry.deadline_s, entry.order, request_id))
        pool.enqueue(entry, now_s)
        return effects

    def progress(
        self, replica: ReplicaId, tokens: Iterable[tuple[RequestId, int]], now_s: float
    ) -> list[Effect]:
        """Count newly generated tokens, once per frame batch; unknown ids are ignored.

        ``replica`` is where they came from: if a fallback took the request, its load is
        moved there.
        """
        now_s, effects = self._begin(now_s)
        entries = self._entries
        changed: Pool | None = None
        for request_id, count in tokens:
            entry = entries.get(request_id)
            if entry is None or entry.replica is None:
                continue
            if entry.replica.id != replica:
                changed = self._move_load(entry, replica, now_s) or changed
            entry.tokens += count
            entry.replica.own_present_tokens += count
            if not entry.has_first_token:
                changed = self._first_token(entry, now_s, effects)
            if entry.tokens > entry.expected_output:
                self._pools[entry.pool].outgrown(entry, now_s)
        if changed is not None:
            changed.capacity_changed()
            self._pump(changed, now_s, effects)
        return effects

    def finish(
        self, request_id: RequestId, usage: Usage, outcome: Outcome, now_s: float
    ) -> list[Effect]:
        """End a request with the engine's count; frees its slot. Unknown ids: no effect."""
        return self._end(request_id, usage, outcome, now_s)

    def cancel(self, request_id: RequestId, now_s: float) -> list[Effect]:
        """End a request whose client left, waiting or dispatched. Unknown ids: no effect."""
        return self._end(request_id, Usage(), Outcome.CANCELLED, now_s)

    def fail(
        self,
        request_id: RequestId,
        replica: ReplicaId,
        now_s: float,
        why: Failure = Failure.LOST,
    ) -> list[Effect]:
        """Move a dispatched request that ``replica`` could not serve to another one.

        Replicas that failed it are not tried again. Prefers replicas with room; otherwise
        any live one, since the request was admitted once and must not wait twice. With a
        replica all that it holds is lost at once: that takes nothing from the retry budget,
        and the caller bounds how often one request goes on. A request that failed by itself
        takes from it. Returns Dispatch, or Reject(NO_REPLICA or RETRY_BUDGET), which
        ends it. Unknown or waiting ids: no effect of their own.
        """
        now_s, effects = self._begin(now_s)
        entry = self._entries.get(request_id)
        if entry is None or entry.replica is None:
            return effects
        pool = self._pools[entry.pool]
        entry.excluded = (*entry.excluded, entry.replica.id, replica)
        failed = pool.load.lost(entry)
        judged = pool.load.replicas.get(replica, failed)
        if why is Failure.BUSY:
            judged.breaker.abandoned(now_s)
        else:
            self._failed(pool, judged, now_s, effects)
        pool.capacity_changed()
        reason = RejectReason.NO_REPLICA
        dispatch = None
        if pool.load.live:
            if why is not Failure.REQUEST or pool.retries.spend():
                dispatch = pool.move(entry, now_s)
            else:
                reason = RejectReason.RETRY_BUDGET
        if dispatch is not None:
            effects.append(dispatch)
        else:
            if entry.tokens:
                pool.settle(entry, Usage(), False, now_s)
            else:
                pool.refund(entry, now_s)
            self._close(pool, entry)
            effects.append(refuse(pool, entry, reason, now_s))
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
        observed = pool.load.observe(view, now_s)
        if observed is None:
            return effects
        if view.replica not in self._pool_of:
            self._pool_of[view.replica] = pool
            pool.replicas_changed(now_s)
        self._climb(pool, observed.preemptions, now_s, effects)
        if observed.has_more_room:
            pool.capacity_changed()
            self._pump(pool, now_s, effects)
        return effects

    def forget(self, replica: ReplicaId, now_s: float) -> list[Effect]:
        """Drop a replica that left the set. What runs there stays until it is ended."""
        now_s, effects = self._begin(now_s)
        pool = self._pool_of.get(replica)
        if pool is not None:
            self._drop_replica(pool, replica, now_s)
            self._pump(pool, now_s, effects)
        return effects

    def advance(self, now_s: float) -> list[Effect]:
        """Let time pass: refuse what waited too long, drop replicas long unheard of."""
        now_s, effects = self._begin(now_s)
        for pool in list(self._pools.values()):
            for replica in list(pool.load.replicas.values()):
                if now_s - replica.observed_at_s >= pool.policy.lost_after_s:
                    self._drop_replica(pool, replica.id, now_s)
            self._give_up_holding(pool, now_s, effects)
            if pool.peers.expire(now_s):
                pool.peers_changed()
            pool.capacity_changed()
            self._pump(pool, now_s, effects)
            self._drop_if_drained(pool)
        return effects

    def digest(self, now_s: float) -> Digest:
        """Return what to tell the other routers; call it every ``EXCHANGE_PERIOD_S``.

        Call ``advance`` before, so that routers that fell silent are forgotten.
        """
        self._told += 1
        pools = {name: pool.digest() for name, pool in self._pools.items()}
        return Digest(self._router, self._told, pools)

    def hear(self, digest: Digest, now_s: float) -> list[Effect]:
        """Take another router's digest; its own and those not newer than the last: no effect."""
        now_s, effects = self._begin(now_s)
        if digest.router == self._router or digest.sequence <= self._heard.get(digest.router, 0):
            return effects
        self._heard[digest.router] = digest.sequence
        for name, part in digest.pools.items():
            pool = self._pools.get(name)
            if pool is not None:
                pool.hear(digest.router, part, now_s)
                self._pump(pool, now_s, effects)
        return effects

    def next_wakeup_s(self) -> float | None:
        """When ``advance`` must be called at the latest, or None if nothing is due."""
        self._trim_deadlines()
        earliest_s = self._deadlines[0][0] if self._deadlines else inf
        for pool in self._pools.values():
            if pool.waiting:
                earliest_s = min(
                    earliest_s,
                    pool.hold_deadline_s(),
                    pool.probe_s(self._now_s),
                    pool.peers.expires_s(),
                )
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
            return known.load.in_flight if known else 0
        return sum(each.load.in_flight for each in self._pools.values())

    def replicas(self, pool: PoolName) -> Sequence[Replica]:
        """Return the replicas known in ``pool`` with their load; read only."""
        known = self._pools.get(pool)
        return list(known.load.replicas.values()) if known else []

    def open_requests(self) -> int:
        """Return how many requests are waiting or dispatched."""
        return len(self._entries)

    def figures(self, pool: PoolName) -> PoolFigures | None:
        """Return a pool's state for metrics, or None if it is unknown."""
        known = self._pools.get(pool)
        return pool_figures(known, self._now_s) if known else None

    def fairness_debt(self, pool: PoolName, tenant: TenantId) -> float:
        """Return how far a tenant is ahead of its fair share, over all classes, in cost."""
        known = self._pools.get(pool)
        if known is None:
            return 0.0
        return sum(queue.debt(tenant, self._now_s) for queue in known.queues)

    def noisiest_tenants(self, pool: PoolName, limit: int) -> list[tuple[TenantId, float]]:
        """Return the active tenants furthest ahead of their fair share, with their debts."""
        known = self._pools.get(pool)
        return noisiest_tenants(known, limit, self._now_s) if known else []

    def expected_output(self, pool: PoolName, tenant: TenantId, max_tokens: int) -> int:
        """Return the output expected of a tenant's request, at most ``max_tokens``."""
        known = self._pools.get(pool)
        return known.outputs.predict(tenant, max_tokens) if known else max_tokens

    def output_error_ratio(self, pool: PoolName, tenant: TenantId) -> float:
        """Return a tenant's recent error of that expectation over tokens produced."""
        known = self._pools.get(pool)
        return known.outputs.error_ratio(tenant) if known else 0.0

    def largest_kv_tokens(self, pool: PoolName) -> int:
        """Return the largest KV cache among a pool's live replicas; 0 without any."""
        known = self._pools.get(pool)
        return known.load.largest_kv_tokens if known else 0

    # Inside

    def _begin(self, now_s: float) -> tuple[float, list[Effect]]:
        """Start an event: clamp time and refuse whatever is past its deadline."""
        slept_s = now_s - self._now_s
        if slept_s > 0.0:
            self._now_s = now_s
        if slept_s > STOOD_STILL_S:
            for pool in self._pools.values():
                pool.peers.stood_still(slept_s)
        effects: list[Effect] = []
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= self._now_s:
            entry = self._entries.get(heapq.heappop(deadlines)[2])
            if entry is None or entry.replica is not None:
                continue
            if entry.deadline_s <= self._now_s:
                self._expire(entry, RejectReason.QUEUE_TIMEOUT, effects)
        return self._now_s, effects

    def _expire(self, entry: Entry, reason: RejectReason, effects: list[Effect]) -> None:
        """Refuse a waiting request; without any replica, that is the reason."""
        pool = self._pools[entry.pool]
        if pool.closing and pool.empty_since_s is not None:
            reason = RejectReason.POOL_CLOSING
        elif pool.empty_since_s is not None:
            reason = RejectReason.NO_REPLICA
        pool.discard(entry, self._now_s)
        self._close(pool, entry)
        effects.append(refuse(pool, entry, reason, self._now_s))
        self._drop_if_drained(pool)

    def _entry(self, pool: Pool, ticket: Ticket, now_s: float) -> tuple[Pool, Entry]:
        """Return the request's entry and the pool that will serve it, a fallback perhaps."""
        self._order += 1
        standard = ticket.priority_class == 1
        name = pool.policy.brownout.fallback_pool
        if standard and name is not None and pool.ladder.uses_fallback:
            fallback = self._pools.get(name)
            if (
                fallback is not None
                and fallback is not pool
                and not fallback.closing
                and fallback.load.live
                and fallback.ladder.rung < 3
            ):
                entry = fallback.entry(ticket, self._order, now_s)
                entry.degraded = "fallback_model"
                return fallback, entry
        return pool, pool.entry(ticket, self._order, now_s)

    def _end(
        self, request_id: RequestId, usage: Usage, outcome: Outcome, now_s: float
    ) -> list[Effect]:
        now_s, effects = self._begin(now_s)
        entry = self._entries.get(request_id)
        if entry is None:
            return effects
        pool = self._pools[entry.pool]
        if entry.replica is None:
            pool.discard(entry, now_s)
        else:
            replica = pool.load.release(entry)
            pool.settle(entry, usage, outcome is Outcome.COMPLETED, now_s)
            pool.capacity_changed()
            self._judge(pool, replica, entry, outcome, now_s, effects)
        self._close(pool, entry)
        self._pump(pool, now_s, effects)
        if pool.closing:
            self._drop_if_drained(pool)
        return effects

    def _judge(
        self,
        pool: Pool,
        replica: Replica,
        entry: Entry,
        outcome: Outcome,
        now_s: float,
        effects: list[Effect],
    ) -> None:
        """Tell the replica's breaker how a request ended.

        A failure after the first token is the engine's. One before it may be the
        client's (the engine's own refusal); what is the engine's then comes by ``fail``.
        """
        if outcome is Outcome.COMPLETED:
            if replica.breaker.succeeded():
                effects.append(Notice("breaker_closed", pool.name, replica.id))
        elif outcome is Outcome.FAILED and entry.has_first_token:
            self._failed(pool, replica, now_s, effects)
        else:
            replica.breaker.abandoned(now_s)

    def _failed(self, pool: Pool, replica: Replica, now_s: float, effects: list[Effect]) -> None:
        if replica.breaker.failed(now_s):
            until_s = replica.breaker.closed_until_s - now_s
            effects.append(Notice("breaker_open", pool.name, replica.id, {"for_s": until_s}))

    def _first_token(self, entry: Entry, now_s: float, effects: list[Effect]) -> Pool:
        pool, replica = self._pools[entry.pool], entry.replica
        assert replica is not None
        pool.first_token(entry, now_s)
        if replica.breaker.succeeded():
            effects.append(Notice("breaker_closed", pool.name, replica.id))
        return pool

    def _move_load(self, entry: Entry, replica: ReplicaId, now_s: float) -> Pool | None:
        """Account a dispatched request on the replica that really took it."""
        pool = self._pools[entry.pool]
        actual = pool.load.replicas.get(replica)
        if actual is None:
            return None
        dispatched_s = entry.dispatched_s
        overlap_tokens = pool.routing.overlap_tokens(entry.ticket, replica)
        pool.load.release(entry).breaker.abandoned(now_s)
        pool.load.hold(entry, actual, overlap_tokens, dispatched_s)
        pool.routing.placed(entry.ticket, replica, now_s)
        return pool

    def _close(self, pool: Pool, entry: Entry) -> None:
        """Forget a request that is neither waiting nor dispatched any more."""
        del self._entries[entry.ticket.request_id]
        pool.load.leave(entry.ticket.tenant)

    def _pump(self, pool: Pool, now_s: float, effects: list[Effect]) -> None:
        if pool.waiting:
            effects.extend(pool.pump(now_s))

    def _climb(self, pool: Pool, preemptions: int, now_s: float, effects: list[Effect]) -> None:
        """Move the brownout ladder and refuse who waits in a class that it sheds now."""
        ladder = pool.ladder
        if preemptions:
            ladder.preempted(preemptions, len(pool.load.live), now_s)
        elif now_s < ladder.updated_s + LADDER_PERIOD_S:
            return
        kv_usage_ratio = pool.load.kv_usage_ratio()
        if kv_usage_ratio is None:
            return
        before = ladder.rung
        rung = ladder.update(kv_usage_ratio, pool.queue_ratios(), now_s)
        if rung is None:
            return
        detail: dict[str, str | int | float] = {
            "rung": rung,
            "from_rung": before,
            "kv_usage_ratio": round(kv_usage_ratio, 4),
        }
        effects.append(Notice("brownout", pool.name, None, detail))
        for entry in list(pool.waiting.values()):
            if sheds(pool, entry.rank):
                self._expire(entry, RejectReason.SHED, effects)

    def _drop_replica(self, pool: Pool, replica: ReplicaId, now_s: float) -> None:
        self._pool_of.pop(replica, None)
        pool.load.drop(replica)
        pool.routing.forgotten(replica)
        pool.replicas_changed(now_s)

    def _give_up_holding(self, pool: Pool, now_s: float, effects: list[Effect]) -> None:
        while pool.hold_deadline_s() <= now_s:
            self._expire(next(iter(pool.waiting.values())), RejectReason.NO_REPLICA, effects)

    def _drop_if_drained(self, pool: Pool) -> None:
        if pool.closing and not pool.waiting and not pool.load.in_flight:
            for replica in pool.load.replicas:
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
