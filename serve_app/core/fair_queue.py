"""Weighted fair queueing between tenants over token cost (virtual token counters).

Each tenant has a counter of the service it got, in cost over weight. The next request is
the oldest of the waiting tenant with the lowest counter. Sending it charges its predicted
cost at once; at completion the counter is corrected to what it really cost.

- Lift: a tenant that starts to wait is raised to the lowest waiting counter, or to where
  service has got to, so idling earns nothing.
- Debt: a counter above that level is remembered while the tenant is away and halves per
  ``debt_half_life_s``. Credit is not remembered.
- Splitting a request gains nothing: cost is additive over tokens, plus a fixed part each.

Between two tenants that keep waiting, service over weight differs by at most the largest
single cost of either. All operations are O(log tenants).

Source: Sheng et al., "Fairness in Serving Large Language Models" (VTC), arXiv 2401.00588;
start-time fair queueing (Goyal et al., 1996) for the level when nobody waits.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from math import exp2, isfinite

from serve_app.core.admission import ServiceRate
from serve_app.core.entry import Entry
from serve_app.core.policy import FairnessPolicy
from serve_app.core.types import RequestId, TenantId

WEIGHT_MIN = 1e-3
WEIGHT_MAX = 1e3
DEBT_FORGOTTEN = 1.0
OWN_RATE_AFTER_S = 0.5


def usable_weight(weight: float) -> float:
    """Return a weight in [0.001, 1000]: zero, negative or NaN serve last, not never."""
    if not weight > 0:
        return WEIGHT_MIN
    return min(max(weight, WEIGHT_MIN), WEIGHT_MAX) if isfinite(weight) else WEIGHT_MAX


class _Flow:
    """One tenant: its counter, and its waiting requests in order of arrival."""

    __slots__ = ("backlog", "counter", "rate", "tenant", "touched_s", "waiting", "weight")

    def __init__(self, tenant: TenantId, counter: float, now_s: float) -> None:
        self.tenant = tenant
        self.weight = 1.0
        self.counter = counter
        self.backlog = 0.0
        self.touched_s = now_s
        self.rate = ServiceRate()
        self.waiting: OrderedDict[RequestId, Entry] = OrderedDict()


class FairQueue:
    """The waiting requests of one class, in weighted fair order between tenants."""

    __slots__ = (
        "_count",
        "_flows",
        "_heap",
        "_idle",
        "_level",
        "_policy",
        "_served",
        "backlog",
        "elsewhere",
        "weights",
    )

    def __init__(self, policy: FairnessPolicy) -> None:
        self._policy = policy
        self._flows: dict[TenantId, _Flow] = {}
        self._idle: OrderedDict[TenantId, _Flow] = OrderedDict()
        self._heap: list[tuple[float, int, _Flow]] = []
        self._level = 0.0
        self._served: dict[TenantId, float] | None = None
        self.elsewhere: dict[TenantId, float] = {}
        self._count = 0
        self.backlog = 0.0
        self.weights = 0.0

    def configure(self, policy: FairnessPolicy) -> None:
        """Use another policy from now on; counters stay."""
        self._policy = policy

    def __len__(self) -> int:
        return self._count

    @property
    def tenants(self) -> int:
        """Tenants with a counter: those that wait, and those away in debt."""
        return len(self._flows) + len(self._idle)

    @property
    def tenants_waiting(self) -> int:
        """Tenants that have requests waiting."""
        return len(self._flows)

    def waiting_of(self, tenant: TenantId) -> int:
        """Return how many requests of a tenant wait."""
        flow = self._flows.get(tenant)
        return len(flow.waiting) if flow else 0

    def debt(self, tenant: TenantId, now_s: float) -> float:
        """Return how far a tenant is ahead of the service level, in cost over weight."""
        flow = self._flows.get(tenant)
        if flow is not None:
            return max(0.0, flow.counter - self._level)
        idle = self._idle.get(tenant)
        return self._decayed(idle, now_s) - self._level if idle else 0.0

    def is_sparse(self, tenant: TenantId, now_s: float) -> bool:
        """Whether what a tenant has waiting and owes is no more than ``sparse_cost``.

        ``elsewhere``, what tenants have waiting at other routers in cost over weight, counts.
        """
        owed = self.elsewhere.get(tenant, 0.0)
        flow = self._flows.get(tenant)
        if flow is not None:
            owed += flow.counter - self._level + flow.backlog / flow.weight
            return owed <= self._policy.sparse_cost
        idle = self._idle.get(tenant)
        if idle is not None:
            owed += self._decayed(idle, now_s) - self._level
        return owed <= self._policy.sparse_cost

    def push(self, entry: Entry, now_s: float) -> None:
        """Let a request wait; its tenant is lifted if it did not wait already."""
        flow = self._flows.get(entry.flow)
        weight = usable_weight(entry.ticket.weight)
        if flow is None:
            flow = self._start_waiting(entry.flow, now_s)
            self.weights += weight
            flow.weight = weight
            flow.waiting[entry.ticket.request_id] = entry
            heapq.heappush(self._heap, (flow.counter, entry.order, flow))
        else:
            self.weights += weight - flow.weight
            flow.weight = weight
            flow.waiting[entry.ticket.request_id] = entry
        flow.backlog += entry.cost
        self.backlog += entry.cost
        self._count += 1

    def head(self) -> Entry | None:
        """Return the request whose turn it is, without taking it."""
        heap, flows = self._heap, self._flows
        while heap:
            counter, _, flow = heap[0]
            if flow.counter == counter and flows.get(flow.tenant) is flow:
                return next(iter(flow.waiting.values()))
            heapq.heappop(heap)
        return None

    def heads(self, limit: int) -> list[Entry]:
        """Return the next request of each of the first ``limit`` tenants, in order."""
        popped: list[tuple[float, int, _Flow]] = []
        entries: list[Entry] = []
        while len(entries) < limit and self.head() is not None:
            item = heapq.heappop(self._heap)
            entry = next(iter(item[2].waiting.values()))
            if entry not in entries:
                popped.append(item)
                entries.append(entry)
        for item in popped:
            heapq.heappush(self._heap, item)
        return entries

    def take(self, entry: Entry, now_s: float) -> None:
        """Remove a request to be served; its tenant is charged ``entry.charged``."""
        flow = self._flows[entry.flow]
        self._level = max(self._level, flow.counter)
        share = entry.charged / flow.weight
        flow.counter += share
        self._note(entry.flow, share)
        flow.rate.served(entry.cost, now_s)
        self._leave(flow, entry, now_s)
        if flow.waiting:
            self._rekey(flow)

    def discard(self, entry: Entry, now_s: float) -> None:
        """Remove a request that will not be served; nothing is charged."""
        self._leave(self._flows[entry.flow], entry, now_s)

    def serve_at_once(self, entry: Entry, now_s: float) -> None:
        """Charge a request that is served without waiting, while its tenant has none waiting."""
        assert entry.flow not in self._flows
        flow = self._idle.pop(entry.flow, None)
        start = self._level if flow is None else max(self._level, self._decayed(flow, now_s))
        if flow is None:
            flow = _Flow(entry.flow, start, now_s)
        flow.weight = usable_weight(entry.ticket.weight)
        self._level = start
        share = entry.charged / flow.weight
        flow.counter = start + share
        self._note(entry.flow, share)
        self._rest(flow, now_s)

    def charge(self, entry: Entry, cost: float, now_s: float) -> None:
        """Add ``cost`` (negative: give back) to a served request's tenant.

        A tenant that is away and out of debt is given nothing back: that would be credit.
        """
        share = cost / usable_weight(entry.ticket.weight)
        self._note(entry.flow, share)
        self.hear(entry.flow, share, now_s)

    def hear(self, tenant: TenantId, share: float, now_s: float) -> None:
        """Count service a tenant got elsewhere, in cost over weight."""
        flow = self._flows.get(tenant)
        if flow is not None:
            flow.counter += share
            self._rekey(flow)
            return
        idle = self._idle.get(tenant)
        if idle is not None:
            idle.counter = self._decayed(idle, now_s) + share
            idle.touched_s = now_s
            if idle.counter <= self._level:
                del self._idle[tenant]
        elif share > 0:
            self._rest(_Flow(tenant, self._level + share, now_s), now_s)

    def tell(self, limit: int) -> tuple[tuple[TenantId, float], ...]:
        """Return what tenants were charged since the last call, the ``limit`` largest.

        In cost over weight. The first call starts the count and returns nothing.
        """
        served, self._served = self._served, {}
        if not served:
            return ()
        largest = sorted(served.items(), key=lambda item: -abs(item[1]))
        return tuple(largest[:limit])

    def backlogs(self, limit: int) -> list[tuple[TenantId, float, float]]:
        """Return up to ``limit`` waiting tenants with their weight and waiting cost."""
        waiting = sorted(self._flows.values(), key=lambda flow: -flow.backlog)[:limit]
        return [(flow.tenant, flow.weight, flow.backlog) for flow in waiting]

    def forfeit(self, entry: Entry) -> None:
        """Raise a waiting tenant to the service level: it could not take its turn by its
        own doing (a cap it has reached), and must not save the turn up."""
        flow = self._flows[entry.flow]
        if flow.counter < self._level:
            flow.counter = self._level
            self._rekey(flow)

    def wait_s(self, tenant: TenantId, weight: float, cost_per_s: float, now_s: float) -> float:
        """Return about how long a request offered now waits for its turn.

        ``cost_per_s`` is the rate at which the queue is served. The longer of two views:
        what fair order serves before it, at that rate; and the tenant's own backlog at the
        rate it has lately been served itself, which knows of tenants that come and go.
        """
        wait_s = self._cost_ahead(tenant, weight) / cost_per_s
        flow = self._flows.get(tenant)
        if flow is not None and flow.rate.seconds(now_s) >= OWN_RATE_AFTER_S:
            own_per_s = flow.rate.per_s(now_s)
            if own_per_s is not None:
                wait_s = max(wait_s, flow.backlog / own_per_s)
        return wait_s

    def _cost_ahead(self, tenant: TenantId, weight: float) -> float:
        """Return about how much cost is served before a request offered now.

        The tenant's own backlog, and of the others what fits into their share until then;
        never more than what waits.
        """
        head = self.head()
        if head is None:
            return 0.0
        lowest = self._flows[head.flow].counter
        flow = self._flows.get(tenant)
        if flow is not None:
            turn = flow.counter - lowest + flow.backlog / flow.weight
            return min(self.backlog, max(flow.backlog, turn * self.weights))
        idle = self._idle.get(tenant)
        turn = max(0.0, idle.counter - lowest) if idle else 0.0
        return min(self.backlog, turn * (self.weights + usable_weight(weight)))

    def _start_waiting(self, tenant: TenantId, now_s: float) -> _Flow:
        """Return the tenant's flow, lifted to where it may not be below."""
        floor = self._level
        head = self.head()
        if head is not None:
            floor = max(floor, self._flows[head.flow].counter)
        flow = self._idle.pop(tenant, None)
        if flow is None:
            flow = _Flow(tenant, floor, now_s)
        else:
            flow.counter = max(floor, self._decayed(flow, now_s))
        self._flows[tenant] = flow
        flow.rate.begin(now_s)
        return flow

    def _note(self, tenant: TenantId, share: float) -> None:
        """Remember a charge for the other routers, if there are any."""
        served = self._served
        if served is not None and (tenant in served or len(served) < self._policy.tenants_max):
            served[tenant] = served.get(tenant, 0.0) + share

    def _leave(self, flow: _Flow, entry: Entry, now_s: float) -> None:
        del flow.waiting[entry.ticket.request_id]
        self._count -= 1
        flow.backlog -= entry.cost
        self.backlog -= entry.cost
        if flow.waiting:
            return
        del self._flows[flow.tenant]
        flow.rate.end(now_s)
        self.weights -= flow.weight
        flow.backlog = 0.0
        if not self._flows:
            self.backlog = self.weights = 0.0
            self._heap.clear()
        self._rest(flow, now_s)

    def _rest(self, flow: _Flow, now_s: float) -> None:
        """Remember a tenant that no longer waits, if it is in debt; forget old debts."""
        idle = self._idle
        if flow.counter > self._level:
            flow.touched_s = now_s
            idle[flow.tenant] = flow
        while idle:
            oldest = next(iter(idle.values()))
            owed = self._decayed(oldest, now_s) - self._level
            if owed > DEBT_FORGOTTEN and len(idle) <= self._policy.tenants_max:
                idle.move_to_end(oldest.tenant)
                return
            del idle[oldest.tenant]

    def _decayed(self, flow: _Flow, now_s: float) -> float:
        """Return an idle tenant's counter with its debt halved per half-life."""
        debt = flow.counter - self._level
        if debt <= 0:
            return self._level
        away_s = max(0.0, now_s - flow.touched_s)
        return self._level + debt * exp2(-away_s / self._policy.debt_half_life_s)

    def _rekey(self, flow: _Flow) -> None:
        head = next(iter(flow.waiting.values()))
        heapq.heappush(self._heap, (flow.counter, head.order, flow))
        if len(self._heap) > 64 + 4 * len(self._flows):
            self._heap = [
                (each.counter, next(iter(each.waiting.values())).order, each)
                for each in self._flows.values()
            ]
            heapq.heapify(self._heap)
