"""What a pool has in flight: per replica, per class and per tenant, kept in step.

Every dispatched request is counted in all three at once and leaves all three at once, so
the sums always agree. ``candidates`` is the saturation test: the replicas that may take
one more request of a class now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from serve_app.core.admission import Shares
from serve_app.core.entry import Entry
from serve_app.core.exchange import ALONE, Held, Peers
from serve_app.core.policy import PoolPolicy
from serve_app.core.saturation import Prompts, Replica
from serve_app.core.types import ReplicaId, ReplicaView, TenantId, Ticket

LONG_PROMPT_RATIO = 0.25


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


class Observed(NamedTuple):
    """What a snapshot told: new preemptions, and whether more may fit than before."""

    preemptions: int
    has_more_room: bool


class TenantLoad:
    """What one tenant has open in a pool; forgotten when it has nothing.

    ``in_flight`` and ``tokens`` are what it has on live replicas, as in ``Shares``.
    """

    __slots__ = ("in_flight", "open", "tokens")

    def __init__(self) -> None:
        self.open = 0
        self.in_flight = 0
        self.tokens = 0


class PoolLoad:
    """The replicas of one pool and everything dispatched to them.

    ``largest_kv_tokens`` is the largest KV cache among live replicas, 0 without any.
    ``size_blocked`` says of the last ``candidates`` that came back empty, whether a smaller
    request would have found room; ``someone_size_blocked`` whether that was so of any since
    the pool was last pumped.
    """

    __slots__ = (
        "_policy",
        "_prefill_limits",
        "_prompts",
        "_taken",
        "in_flight",
        "largest_kv_tokens",
        "live",
        "others_large",
        "part",
        "replicas",
        "shares",
        "size_blocked",
        "someone_size_blocked",
        "tenants",
    )

    def __init__(self, policy: PoolPolicy) -> None:
        self.replicas: dict[ReplicaId, Replica] = {}
        self.live: list[Replica] = []
        self.shares = Shares()
        self.tenants: dict[TenantId, TenantLoad] = {}
        self.others_large: dict[TenantId, tuple[int, int]] = {}
        self.part = ALONE
        self._taken = Held()
        self._prompts = Prompts()
        self.in_flight = 0
        self.size_blocked = False
        self.someone_size_blocked = False
        self.configure(policy)

    def configure(self, policy: PoolPolicy) -> None:
        """Apply a pool's policy to what is there."""
        self._policy = policy
        for replica in self.replicas.values():
            replica.limit(policy, self.part)
        self._recount()

    def share(self, peers: Peers) -> None:
        """Leave to the other routers what is theirs; places change hands at snapshots."""
        self.part = peers.part
        self._taken = peers.held()
        self.others_large = peers.large()
        self._resize()

    # Replicas

    def observe(self, view: ReplicaView, now_s: float) -> Observed | None:
        """Take a snapshot; return what it changed, or None if it is not newer."""
        known = self.replicas.get(view.replica)
        if known is None:
            self.replicas[view.replica] = Replica(view, now_s, self._policy, self.part)
            self._recount()
            return Observed(0, True)
        before, own_cap, others_kv_tokens = known.view, known.own_cap, known.others_kv_tokens
        others_prefill_tokens = known.others_prefill_tokens
        was_fresh = known.is_fresh(self._policy, now_s)
        if not known.observe(view, now_s, self.part, self._prompts):
            return None
        preemptions = max(0, view.preemptions_total - before.preemptions_total)
        if (
            before.draining != view.draining
            or before.slots != view.slots
            or before.kv_tokens_capacity != view.kv_tokens_capacity
        ):
            known.limit(self._policy, self.part)
            self._recount()
            return Observed(preemptions, True)
        has_more_room = (
            not was_fresh
            or known.others_prefill_tokens < others_prefill_tokens
            or known.own_cap > own_cap
            or (self.someone_size_blocked and known.others_kv_tokens < others_kv_tokens)
        )
        return Observed(preemptions, has_more_room)

    def drop(self, replica: ReplicaId) -> None:
        """Forget a replica; what still runs there no longer competes."""
        self.replicas.pop(replica).live = False
        self._recount()

    def kv_usage_ratio(self) -> float | None:
        """Return the mean KV use that live replicas reported; None without any."""
        live = self.live
        if not live:
            return None
        return sum([replica.view.kv_usage_ratio for replica in live]) / len(live)

    # Room

    def candidates(self, entry: Entry, routing: RoutingPolicy, now_s: float) -> list[Replica]:
        """Return the live replicas with room for a request, in the order first seen.

        A prompt that is a good part of the prefill knee goes only where what it lacks
        fits behind the prompts already sent, or where there are none.
        """
        rank, excluded, ticket = entry.rank, entry.excluded, entry.ticket
        prompt_tokens = ticket.prompt_tokens
        prefill_limit = self._prefill_limits[rank]
        is_long = prompt_tokens > LONG_PROMPT_RATIO * prefill_limit
        need_tokens = prompt_tokens + entry.expected_output
        stale_after_s = self._policy.stale_after_s
        found = []
        size_blocked = False
        for replica in self.live:
            prefill_tokens = replica.own_uncached_prompt_tokens + replica.others_prefill_tokens
            if replica.own >= replica.own_cap or prefill_tokens >= prefill_limit:
                continue
            if now_s - replica.observed_at_s >= stale_after_s:
                continue
            if replica.breaker.closed_until_s > now_s:
                continue
            held_tokens = replica.own_tokens + replica.others_kv_tokens
            if held_tokens and held_tokens + need_tokens > replica.token_limits[rank]:
                size_blocked = True
                continue
            if is_long and prefill_tokens:
                lacking = prompt_tokens - routing.overlap_tokens(ticket, replica.id)
                if prefill_tokens + lacking > prefill_limit:
                    size_blocked = True
                    continue
            if excluded and replica.id in excluded:
                continue
            found.append(replica)
        self.size_blocked = size_blocked
        self.someone_size_blocked = self.someone_size_blocked or size_blocked
        return found

    def standbys(self, entry: Entry, now_s: float) -> list[Replica]:
        """Return live replicas that may take a request that failed elsewhere, full or not."""
        return [
            replica
            for replica in self.live
            if replica.is_fresh(self._policy, now_s)
            and replica.breaker.closed_until_s <= now_s
            and replica.id not in entry.excluded
        ]

    def tenant_may_take(self, entry: Entry) -> bool:
        """Whether a tenant's caps allow one more; they bind only while others are active."""
        if len(self.tenants) < 2:
            return True
        tenant = entry.ticket.tenant
        load = self.tenants[tenant]
        requests, tokens = load.in_flight, load.tokens
        if not requests:
            return True
        if tenant in self.others_large:
            elsewhere = self.others_large[tenant]
            requests, tokens = requests + elsewhere[0], tokens + elsewhere[1]
        policy, shares = self._policy, self.shares
        if requests + 1 > policy.tenant_concurrency_ratio * shares.slots:
            return False
        return tokens + entry.need_tokens <= policy.tenant_kv_ratio * shares.tokens_capacity

    def fits_somewhere(self, entry: Entry) -> bool:
        """Whether some live replica's KV cache has room by prediction; true without any."""
        if not self.live:
            return True
        rank, need_tokens = entry.rank, entry.need_tokens
        for replica in self.live:
            held_tokens = replica.own_tokens + replica.others_kv_tokens
            if not held_tokens or held_tokens + need_tokens <= replica.token_limits[rank]:
                return True
        return False

    # What is open

    def enter(self, tenant: TenantId) -> None:
        """A request of the tenant is open from now on."""
        load = self.tenants.get(tenant)
        if load is None:
            load = self.tenants[tenant] = TenantLoad()
        load.open += 1

    def leave(self, tenant: TenantId) -> None:
        """A request of the tenant has ended."""
        load = self.tenants[tenant]
        load.open -= 1
        if not load.open:
            assert not load.in_flight
            del self.tenants[tenant]

    def hold(self, entry: Entry, replica: Replica, overlap_tokens: int, now_s: float) -> None:
        """Count an entered request as dispatched to ``replica``."""
        prompt_tokens = entry.ticket.prompt_tokens
        uncached = max(0, prompt_tokens - overlap_tokens)
        self._prompts.learn(prompt_tokens, uncached)
        need_tokens = uncached + entry.expected_output
        rank = entry.rank
        entry.uncached_tokens = uncached
        entry.need_tokens = need_tokens
        entry.feature_in_flight = replica.own + replica.others
        entry.replica = replica
        entry.dispatched_s = now_s
        replica.own += 1
        replica.own_tokens += need_tokens
        replica.own_present_tokens += uncached + entry.tokens
        replica.own_by_class[rank] += 1
        replica.own_tokens_by_class[rank] += need_tokens
        prefill_tokens = 0
        if not entry.has_first_token:
            replica.own_prompt_tokens += prompt_tokens + entry.resumed_tokens
            lacking = uncached + entry.resumed_tokens
            replica.own_uncached_prompt_tokens += lacking
            prefill_tokens = min(lacking, self._policy.prefill_knee_tokens)
            replica.own_prefill_by_class[rank] += prefill_tokens
        entry.prefill_tokens = prefill_tokens
        entry.feature_prefill_tokens = replica.own_uncached_prompt_tokens
        tenant = entry.ticket.tenant
        held = replica.own_by_tenant.get(tenant)
        if held is None:
            replica.own_by_tenant[tenant] = [1, need_tokens]
        else:
            held[0] += 1
            held[1] += need_tokens
        if replica.live:
            self.shares.requests[rank] += 1
            self.shares.tokens[rank] += need_tokens
            self.shares.prefill[rank] += prefill_tokens
            load = self.tenants[tenant]
            load.in_flight += 1
            load.tokens += need_tokens
        self.in_flight += 1

    def release(self, entry: Entry) -> Replica:
        """Undo ``hold``; return the replica the request was on."""
        replica = entry.replica
        assert replica is not None
        rank, need_tokens = entry.rank, entry.need_tokens
        entry.replica = None
        replica.own -= 1
        assert replica.own >= 0
        replica.own_tokens -= need_tokens
        replica.own_present_tokens -= entry.uncached_tokens + entry.tokens
        replica.own_by_class[rank] -= 1
        replica.own_tokens_by_class[rank] -= need_tokens
        if not entry.has_first_token:
            self._prompt_done(entry, replica)
        tenant = entry.ticket.tenant
        held = replica.own_by_tenant[tenant]
        held[0] -= 1
        held[1] -= need_tokens
        if not held[0]:
            del replica.own_by_tenant[tenant]
        if replica.live:
            self.shares.requests[rank] -= 1
            self.shares.tokens[rank] -= need_tokens
            load = self.tenants[tenant]
            load.in_flight -= 1
            load.tokens -= need_tokens
        self.in_flight -= 1
        return replica

    def first_token(self, entry: Entry) -> None:
        """A dispatched request's prompt has been computed."""
        assert entry.replica is not None
        self._prompt_done(entry, entry.replica)
        entry.has_first_token = True

    def grow(self, entry: Entry, more_tokens: int) -> None:
        """A dispatched request is now expected to need ``more_tokens`` more."""
        replica = entry.replica
        assert replica is not None
        entry.expected_output += more_tokens
        entry.need_tokens += more_tokens
        replica.own_tokens += more_tokens
        replica.own_tokens_by_class[entry.rank] += more_tokens
        tenant = entry.ticket.tenant
        replica.own_by_tenant[tenant][1] += more_tokens
        if replica.live:
            self.shares.tokens[entry.rank] += more_tokens
            self.tenants[tenant].tokens += more_tokens

    def lost(self, entry: Entry) -> Replica:
        """Undo ``hold``; what was delivered is to be computed again before it goes on."""
        replica = self.release(entry)
        entry.has_first_token = False
        entry.resumed_tokens = entry.tokens
        return replica

    def _prompt_done(self, entry: Entry, replica: Replica) -> None:
        rank, prefill_tokens = entry.rank, entry.prefill_tokens
        replica.own_prompt_tokens -= entry.ticket.prompt_tokens + entry.resumed_tokens
        replica.own_uncached_prompt_tokens -= entry.uncached_tokens + entry.resumed_tokens
        replica.own_prefill_by_class[rank] -= prefill_tokens
        if replica.live:
            self.shares.prefill[rank] -= prefill_tokens
        entry.prefill_tokens = 0

    def _recount(self) -> None:
        """Rebuild what depends on which replicas are live and how large they are."""
        shares = self.shares
        self.live = live = [each for each in self.replicas.values() if each.live]
        self.largest_kv_tokens = max([each.kv_capacity for each in live], default=0)
        self._resize()
        for rank in range(3):
            shares.requests[rank] = sum([each.own_by_class[rank] for each in live])
            shares.tokens[rank] = sum([each.own_tokens_by_class[rank] for each in live])
            shares.prefill[rank] = sum([each.own_prefill_by_class[rank] for each in live])
        for load in self.tenants.values():
            load.in_flight = load.tokens = 0
        for replica in live:
            for tenant, (requests, tokens) in replica.own_by_tenant.items():
                load = self.tenants[tenant]
                load.in_flight += requests
                load.tokens += tokens

    def _resize(self) -> None:
        """Set the limits of the pool and of each replica's uncomputed prompts."""
        policy, live = self._policy, self.live
        prefill_knee = policy.prefill_knee_tokens
        self._prefill_limits = (
            prefill_knee,
            max(1, int((1.0 - policy.critical_reserve_ratio) * prefill_knee)),
            max(1, int(policy.sheddable_share_ratio * prefill_knee)),
        )
        knee = policy.knee_tokens_per_replica
        capacity = sum([min(each.kv_capacity, knee or each.kv_capacity) for each in live])
        self.shares.resize(
            sum([each.slots_cap for each in live]),
            capacity,
            prefill_knee * len(live),
            policy,
            self._taken,
        )
