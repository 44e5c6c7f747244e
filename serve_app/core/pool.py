"""One pool of one router: who waits, who goes next and where, and who is refused.

A request with room goes out at once. Otherwise it waits in its class's fair queue, and
whenever capacity may have come free the pool is *pumped*: as long as something fits, the
class whose turn it is (admission.Turns) sends its fair queue's head to the replica the
routing policy ranks first among those with room (load.PoolLoad.candidates). A request
gets its replica when it leaves, not when it arrives.

A head that does not fit for its own size or its tenant's cap is passed over by the next
tenants' heads, at most ``BYPASS_MAX`` of them, so that capacity is not left idle.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from math import inf

from serve_app.core.admission import (
    CRITICAL,
    SHEDDABLE,
    STANDARD,
    ClientThrottle,
    ServiceRate,
    Turns,
)
from serve_app.core.breaker import RetryBudget
from serve_app.core.brownout import Ladder
from serve_app.core.entry import Entry
from serve_app.core.exchange import (
    LARGE_TENANT_RATIO,
    TENANTS_TOLD_MAX,
    Peers,
    PoolDigest,
    RouterId,
    TenantHeld,
    TenantWaiting,
)
from serve_app.core.fair_queue import FairQueue
from serve_app.core.load import PoolLoad, RoutingPolicy
from serve_app.core.policy import PoolPolicy
from serve_app.core.saturation import Replica
from serve_app.core.tokens import OutputPredictor
from serve_app.core.ttft import TtftPredictor
from serve_app.core.types import (
    Dispatch,
    PoolName,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)

FALLBACKS_MAX = 3
BYPASS_MAX = 8
EVERYONE = TenantId("")
ONLY_ROUTER = RouterId("router")
ENGINE_SECOND_KEEP = 0.999


class Pool:
    """One pool's queues and policies. Driven by the controller only."""

    def __init__(
        self,
        name: PoolName,
        policy: PoolPolicy,
        routing: RoutingPolicy,
        now_s: float,
        router: RouterId = ONLY_ROUTER,
    ) -> None:
        self.name = name
        self.routing = routing
        self.peers = Peers(router)
        self._critical_waits_elsewhere = False
        self.load = PoolLoad(policy)
        self.waiting: OrderedDict[RequestId, Entry] = OrderedDict()
        self.closing = False
        self.empty_since_s: float | None = now_s
        self.queues = tuple(FairQueue(policy.fairness) for _ in range(3))
        self.rates = tuple(ServiceRate() for _ in range(3))
        self.outputs = OutputPredictor(policy.expected_output_tokens, policy.fairness.tenants_max)
        self.ttft = TtftPredictor()
        self.throttle = ClientThrottle()
        self.ladder = Ladder(policy.brownout)
        self.retries = RetryBudget(policy.breaker)
        self._engine_cost = 0.0
        self._engine_s = 0.0
        self.reconfigure(policy)

    def reconfigure(self, policy: PoolPolicy) -> None:
        """Apply another policy to what is there. Who waits keeps place and deadline."""
        self.policy = policy
        self.turns = Turns(policy.classes)
        self.capacities = tuple(
            policy.queue_capacity if each.queue_capacity is None else each.queue_capacity
            for each in policy.classes
        )
        for queue in self.queues:
            queue.configure(policy.fairness)
        self.ladder.configure(policy.brownout)
        self.retries.configure(policy.breaker)
        self.load.configure(policy)
        self._full = [False, False, False]

    # Requests

    def entry(self, ticket: Ticket, order: int, now_s: float) -> Entry:
        """Return an entry for a request: predicted, priced and with its deadline."""
        policy = self.policy
        in_order = policy.ordering == "arrival"
        rank = STANDARD if in_order else int(ticket.priority_class)
        entry = Entry(ticket, self.name, rank, EVERYONE if in_order else ticket.tenant, order)
        max_tokens = ticket.max_tokens
        if rank and self.ladder.caps_output:
            cap = policy.brownout.output_cap_tokens
            if cap < max_tokens:
                entry.output_cap = max_tokens = cap
                entry.degraded = "max_tokens"
        expected = self.outputs.predict(ticket.tenant, max_tokens)
        entry.predicted_output = entry.expected_output = expected
        entry.need_tokens = ticket.prompt_tokens + expected
        entry.cost = self.cost(ticket.prompt_tokens, 0, expected)
        entry.offered_s = now_s
        entry.sparse = len(self.load.tenants) < 2 or self.queues[rank].is_sparse(entry.flow, now_s)
        timeout_s = policy.queue_timeout_s
        if policy.early_rejection:
            own = policy.classes[rank]
            timeout_s = min(timeout_s, own.queue_wait_slos * own.ttft_slo_s)
        if self.empty_since_s is not None:
            timeout_s = max(timeout_s, policy.hold_without_replica_s)
        entry.deadline_s = now_s + timeout_s
        if ticket.expires_at_s is not None and ticket.expires_at_s < entry.deadline_s:
            entry.deadline_s = ticket.expires_at_s
        return entry

    def cost(self, uncached_tokens: int, cached_tokens: int, output_tokens: int) -> float:
        """Return what a request costs its tenant, in fairness units."""
        fairness = self.policy.fairness
        return (
            fairness.request_cost
            + fairness.input_weight * uncached_tokens
            + fairness.cached_input_weight * cached_tokens
            + fairness.output_weight * output_tokens
        )

    def dispatch_at_once(self, entry: Entry, now_s: float) -> Dispatch | None:
        """Send an entered request if it fits and its tenant has none waiting.

        Whoever waits has been found not to fit at the last change of capacity, so this
        request takes nobody's place.
        """
        rank = entry.rank
        queue = self.queues[rank]
        if self._full[rank] or queue.waiting_of(entry.flow):
            return None
        dispatch = self._try(entry, now_s)
        if dispatch is not None:
            self._price(entry)
            queue.serve_at_once(entry, now_s)
            self._took_turn(entry, now_s)
        return dispatch

    def enqueue(self, entry: Entry, now_s: float) -> None:
        """Let an entered request wait."""
        self.waiting[entry.ticket.request_id] = entry
        self.queues[entry.rank].push(entry, now_s)
        if self.empty_since_s is None:
            self.rates[entry.rank].begin(now_s)

    def discard(self, entry: Entry, now_s: float) -> None:
        """Remove a waiting request that will not be dispatched."""
        del self.waiting[entry.ticket.request_id]
        queue = self.queues[entry.rank]
        queue.discard(entry, now_s)
        if not queue:
            self.rates[entry.rank].end(now_s)

    def pump(self, now_s: float) -> list[Dispatch]:
        """Dispatch waiting requests while something fits. Needed when capacity changed."""
        dispatched = []
        while self.waiting:
            dispatch = self._next(now_s)
            if dispatch is None:
                break
            dispatched.append(dispatch)
        return dispatched

    def capacity_changed(self) -> None:
        """Something may fit now that did not before."""
        self._full = [False, False, False]
        self.load.someone_size_blocked = False

    def move(self, entry: Entry, now_s: float) -> Dispatch | None:
        """Send a request that failed elsewhere to a replica it has not tried, full or not.

        It was admitted once and must not wait twice; the retry budget bounds how many
        requests can so pass the knee.
        """
        found = self.load.candidates(entry, self.routing, now_s) or self.load.standbys(entry, now_s)
        return self._send(entry, found, now_s) if found else None

    def hold_deadline_s(self) -> float:
        """When the oldest waiting request has been without any replica for too long."""
        if self.empty_since_s is None or not self.waiting:
            return inf
        oldest = next(iter(self.waiting.values()))
        return max(oldest.offered_s, self.empty_since_s) + self.policy.hold_without_replica_s

    def probe_s(self, now_s: float) -> float:
        """When the next open breaker lets a probe through, if anybody waits for it."""
        if not self.waiting:
            return inf
        times = [replica.breaker.closed_until_s for replica in self.load.live]
        return min((time_s for time_s in times if time_s > now_s), default=inf)

    # Other routers

    def digest(self) -> PoolDigest:
        """Return this router's part of the pool, and what was served since the last call."""
        load = self.load
        digest = PoolDigest(
            requests=_triple(load.shares.requests),
            tokens=_triple(load.shares.tokens),
            prefill=_triple(load.shares.prefill),
            critical_waits=self._critical_waits(),
            served=tuple(queue.tell(TENANTS_TOLD_MAX) for queue in self.queues),
            waiting=tuple(
                tuple(TenantWaiting(*each) for each in queue.backlogs(TENANTS_TOLD_MAX))
                for queue in self.queues
            ),
            large=self._large_tenants(),
        )
        self.peers.told(digest)
        return digest

    def hear(self, router: RouterId, digest: PoolDigest, now_s: float) -> None:
        """Take another router's digest of this pool: what it serves, and what it leaves."""
        for queue, served in zip(self.queues, digest.served, strict=True):
            for tenant, share in served:
                queue.hear(tenant, share, now_s)
        self.peers.hear(router, digest, now_s)
        self.peers_changed()

    def peers_changed(self) -> None:
        """Go by what the other routers said last."""
        self._critical_waits_elsewhere = self.peers.critical_waits
        self.load.share(self.peers)
        for queue, elsewhere in zip(self.queues, self.peers.waiting(), strict=True):
            queue.elsewhere = elsewhere
        self.capacity_changed()

    def _critical_waits(self) -> bool:
        """Whether a Critical request waits for room, and not only for its tenant's cap."""
        queue = self.queues[CRITICAL]
        return bool(queue) and any(map(self.load.tenant_may_take, queue.heads(BYPASS_MAX)))

    def _large_tenants(self) -> tuple[TenantHeld, ...]:
        """Return the tenants that hold enough for a cap of theirs to matter."""
        shares = self.load.shares
        requests = max(1.0, LARGE_TENANT_RATIO * shares.slots)
        tokens = max(1.0, LARGE_TENANT_RATIO * shares.tokens_capacity)
        return tuple(
            TenantHeld(tenant, held.in_flight, held.tokens)
            for tenant, held in self.load.tenants.items()
            if held.in_flight >= requests or held.tokens >= tokens
        )

    # Replicas

    def replicas_changed(self, now_s: float) -> None:
        """Note whether the pool has any replica at all; service is not measured without."""
        self.capacity_changed()
        if self.load.replicas:
            self.empty_since_s = None
            for queue, rate in zip(self.queues, self.rates, strict=True):
                if queue:
                    rate.begin(now_s)
        elif self.empty_since_s is None:
            self.empty_since_s = now_s
            for rate in self.rates:
                rate.end(now_s)

    def queue_ratios(self) -> tuple[float, float]:
        """Return how full the Critical and the Standard queue are."""
        critical, standard = (
            len(queue) / max(1, capacity)
            for queue, capacity in zip(self.queues[:SHEDDABLE], self.capacities, strict=False)
        )
        return critical, standard

    # Ends

    def first_token(self, entry: Entry, now_s: float) -> None:
        """A dispatched request's first token came: learn how long that took."""
        self.load.first_token(entry)
        self.ttft.observe(
            entry.feature_prefill_tokens, entry.feature_in_flight, now_s - entry.dispatched_s
        )

    def outgrown(self, entry: Entry, now_s: float) -> None:
        """A running answer is longer than expected: account for half as much again."""
        limit = entry.output_cap or entry.ticket.max_tokens
        grown = min(max(limit, entry.tokens), entry.tokens + max(32, entry.tokens // 2))
        more = grown - entry.expected_output
        self.load.grow(entry, more)
        cost = self.policy.fairness.output_weight * more
        self._charge(entry, cost, now_s)

    def settle(self, entry: Entry, usage: Usage, completed: bool, now_s: float) -> None:
        """Correct what a dispatched request was charged to what it cost, and learn from it."""
        if completed and usage.completion_tokens:
            self.outputs.observe(
                entry.ticket.tenant, usage.completion_tokens, entry.predicted_output
            )
        if usage.prompt_tokens:
            cached = min(usage.cached_prompt_tokens, usage.prompt_tokens)
            cost = self.cost(usage.prompt_tokens - cached, cached, usage.completion_tokens)
        else:
            cached = entry.ticket.prompt_tokens - entry.uncached_tokens
            cost = self.cost(entry.uncached_tokens, cached, entry.tokens)
        if self.policy.fairness.by_engine_seconds and usage.engine_s > 0:
            cost = self._cost_of_seconds(usage.engine_s, cost)
        self._charge(entry, cost - entry.charged, now_s)

    def refund(self, entry: Entry, now_s: float) -> None:
        """Give back the whole charge of a request that no replica served."""
        self._charge(entry, -entry.charged, now_s)

    # Inside

    def _next(self, now_s: float) -> Dispatch | None:
        """Dispatch one waiting request, of the class whose turn it is, or none."""
        shares, full = self.load.shares, self._full
        for rank in self._class_order():
            queue = self.queues[rank]
            if not queue or full[rank] or not shares.has_slot(rank, True):
                continue
            entry = queue.head()
            assert entry is not None
            dispatch = self._try(entry, now_s)
            if dispatch is None and not full[rank] and queue.tenants_waiting > 1:
                for entry in queue.heads(BYPASS_MAX)[1:]:
                    dispatch = self._try(entry, now_s)
                    if dispatch is not None:
                        break
            if dispatch is not None:
                self._leave_queue(entry, now_s)
                return dispatch
        return None

    def _class_order(self) -> tuple[int, int, int]:
        """Return the classes in the order in which they may go."""
        critical, standard, sheddable = self.queues
        if standard:
            head = standard.head() if critical else None
            if head is not None and self.turns.goes_first(STANDARD, head.cost):
                return (1, 0, 2)
            head = sheddable.head()
            if head is not None and self.turns.goes_first(SHEDDABLE, head.cost):
                return (0, 2, 1)
        return (0, 1, 2)

    def _try(self, entry: Entry, now_s: float) -> Dispatch | None:
        """Dispatch a request if its tenant, its class and a replica have room.

        Sheddable also waits while a Critical request waits for room here or elsewhere.
        Headroom for sparse tenants is not taken while more important classes wait.
        When no replica has room for anything of the class, it is marked full until
        capacity changes, and so are the less important ones, whose limits are tighter.
        """
        load, rank = self.load, entry.rank
        if rank == SHEDDABLE and (self._critical_waits_elsewhere or self._critical_waits()):
            return None
        sparse = entry.sparse and not (rank and self._somebody_above(rank))
        if not load.shares.has_slot(rank, sparse):
            return None
        if not load.tenant_may_take(entry):
            if entry.ticket.request_id in self.waiting:
                self.queues[rank].forfeit(entry)
            return None
        prefill_tokens = min(entry.ticket.prompt_tokens, self.policy.prefill_knee_tokens)
        if not load.shares.has_tokens(rank, sparse, entry.need_tokens, prefill_tokens):
            return None
        found = load.candidates(entry, self.routing, now_s)
        if found:
            return self._send(entry, found, now_s)
        if not load.size_blocked:
            for each in range(rank, 3):
                self._full[each] = True
        return None

    def _somebody_above(self, rank: int) -> bool:
        critical, standard, _ = self.queues
        return bool(critical) or (rank == SHEDDABLE and bool(standard))

    def _send(self, entry: Entry, found: Sequence[Replica], now_s: float) -> Dispatch | None:
        routing, ticket = self.routing, entry.ticket
        ranked = tuple(routing.rank(ticket, found, now_s)[: 1 + FALLBACKS_MAX])
        if not ranked:
            return None
        replica = self.load.replicas[ranked[0]]
        overlap_tokens = routing.overlap_tokens(ticket, replica.id)
        routing.placed(ticket, replica.id, now_s)
        self.load.hold(entry, replica, overlap_tokens, now_s)
        replica.breaker.sent()
        return Dispatch(
            ticket.request_id,
            self.name,
            ranked,
            now_s - entry.offered_s,
            entry.output_cap,
            entry.degraded,
        )

    def _charge(self, entry: Entry, cost: float, now_s: float) -> None:
        entry.charged += cost
        self.queues[entry.rank].charge(entry, cost, now_s)

    def _price(self, entry: Entry) -> None:
        """Set what a request just placed is charged: cached prompt tokens are cheaper."""
        fairness = self.policy.fairness
        cached = entry.ticket.prompt_tokens - entry.uncached_tokens
        discount = fairness.input_weight - fairness.cached_input_weight
        entry.charged = entry.cost - discount * cached

    def _leave_queue(self, entry: Entry, now_s: float) -> None:
        self._price(entry)
        del self.waiting[entry.ticket.request_id]
        queue, rate = self.queues[entry.rank], self.rates[entry.rank]
        queue.take(entry, now_s)
        rate.served(entry.cost, now_s)
        if not queue:
            rate.end(now_s)
        self._took_turn(entry, now_s)

    def _took_turn(self, entry: Entry, now_s: float) -> None:
        rank, ticket = entry.rank, entry.ticket
        self.retries.earn()
        self.throttle.accepted(ticket.key, rank, now_s)
        below = self.queues[rank + 1].head() if rank < SHEDDABLE else None
        if below is None:
            self.turns.dispatched(rank, entry.cost, None)
            return
        aged = now_s - below.offered_s > self.policy.classes[rank + 1].ttft_slo_s
        self.turns.dispatched(rank, entry.cost, (below.cost, aged))

    def _cost_of_seconds(self, engine_s: float, token_cost: float) -> float:
        """Return measured engine time in fairness units, at the pool's mean price of a second."""
        self._engine_cost = self._engine_cost * ENGINE_SECOND_KEEP + token_cost
        self._engine_s = self._engine_s * ENGINE_SECOND_KEEP + engine_s
        return engine_s * self._engine_cost / self._engine_s


def _triple(counts: list[int]) -> tuple[int, int, int]:
    critical, standard, sheddable = counts
    return critical, standard, sheddable
