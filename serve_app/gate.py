"""The asyncio shell around the core: requests wait here until the controller decides.

    async with gate.place(ticket) as lease:
        ...stream from lease.dispatch.replicas...
        lease.settle(usage)

Leaving the block always ends the request in the core: settled, failed or cancelled.
Every event of the core is one synchronous call; effects are carried out before control
returns to the loop, so nothing can change between a decision and its execution.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from serve_app.core.controller import Controller
from serve_app.core.demand import DemandCounter, PoolDemand
from serve_app.core.exchange import Digest
from serve_app.core.figures import PoolFigures
from serve_app.core.policy import PoolPolicy
from serve_app.core.types import (
    Dispatch,
    Effect,
    Failure,
    Notice,
    Outcome,
    PoolName,
    Reject,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)


class Refused(Exception):
    """The core turned the request away."""

    def __init__(self, reject: Reject) -> None:
        super().__init__(reject.reason.value)
        self.reject = reject


class Lease:
    """A dispatched request's hold on its slot, ended once, when its block is left.

    What ends it before its end is nobody's fault (a client that leaves or does not read, a
    deadline) until ``fail`` says that it was the replica's.
    """

    def __init__(self, gate: Gate, ticket: Ticket, dispatch: Dispatch, begun_s: float) -> None:
        self._gate = gate
        self.begun_s = begun_s
        self.ticket = ticket
        self.dispatch = dispatch
        self.replica: ReplicaId = dispatch.replicas[0]
        self.usage = Usage()
        self.outcome = Outcome.CANCELLED
        self._begun = False

    def progress(self, tokens: int) -> None:
        """Count output tokens that arrived from the engine."""
        self._gate.progress(self.replica, self.ticket.request_id, tokens, first=not self._begun)
        self._begun = True

    def settle(self, usage: Usage) -> None:
        """Record the engine's own count of a completed request."""
        self.usage = usage
        self.outcome = Outcome.COMPLETED

    def fail(self) -> None:
        """Record that the replica failed it for good."""
        self.outcome = Outcome.FAILED

    def move(self, why: Failure = Failure.LOST) -> None:
        """Place the request on another replica; its present one could not serve it.

        It keeps its place: nothing is charged again, and it does not wait.

        Raises:
            Refused: there is no other replica.
        """
        self.dispatch = self._gate.fail(self.ticket.request_id, self.replica, why)
        self.replica = self.dispatch.replicas[0]
        self.outcome = Outcome.CANCELLED
        self._begun = False


class Gate:
    """Drives one controller from one event loop. Not thread-safe: the loop's only."""

    def __init__(
        self,
        controller: Controller,
        clock: Callable[[], float],
        on_notice: Callable[[Notice], None],
    ) -> None:
        self._core = controller
        self._clock = clock
        self._on_notice = on_notice
        self._waiting: dict[RequestId, asyncio.Future[Dispatch]] = {}
        self._demand = DemandCounter()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s: float | None = None

    @asynccontextmanager
    async def place(
        self,
        ticket: Ticket,
        while_waiting: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> AsyncIterator[Lease]:
        """Wait for a place for the request; hold it while the block runs.

        What ``while_waiting`` returns surrounds the wait, if the core does not decide at once.

        Raises:
            Refused: the core refused the request, at once or after it had waited.
        """
        decision: asyncio.Future[Dispatch] = asyncio.get_running_loop().create_future()
        self._waiting[ticket.request_id] = decision
        self._demand.offered(ticket.pool)
        lease: Lease | None = None
        try:
            self._apply(self._core.offer(ticket, self._clock()))
            if not decision.done():
                async with while_waiting():
                    await decision
            lease = Lease(self, ticket, decision.result(), self._clock())
            yield lease
        finally:
            self._waiting.pop(ticket.request_id, None)
            self._end(ticket.request_id, lease)

    def progress(
        self, replica: ReplicaId, request_id: RequestId, tokens: int, *, first: bool
    ) -> None:
        """Tell the core of output tokens, and of the ``first`` ones that they are.

        Once per frame, so nothing is done for the many that change nothing: deadlines
        depend on a request's first token only.
        """
        effects = self._core.progress(replica, [(request_id, tokens)], self._clock())
        if effects or first:
            self._apply(effects)

    def fail(self, request_id: RequestId, replica: ReplicaId, why: Failure) -> Dispatch:
        """Ask the core for another replica; see Lease.move."""
        own: Effect | None = None
        others: list[Effect] = []
        for effect in self._core.fail(request_id, replica, self._clock(), why):
            if not isinstance(effect, Notice) and effect.request_id == request_id:
                own = effect
            else:
                others.append(effect)
        self._apply(others)
        if isinstance(own, Dispatch):
            return own
        assert isinstance(own, Reject), "a failed request is moved or refused"
        raise Refused(own)

    def observe(self, view: ReplicaView) -> None:
        """Take a replica's load."""
        self._apply(self._core.observe(view, self._clock()))

    def forget(self, replica: ReplicaId) -> None:
        """Drop a replica that is gone."""
        self._apply(self._core.forget(replica, self._clock()))

    def configure(self, pools: Mapping[PoolName, PoolPolicy]) -> None:
        """Replace the pools' policies."""
        self._apply(self._core.configure(pools, self._clock()))

    def digest(self) -> Digest:
        """Return what to tell the other routers of the fleet."""
        self._apply(self._core.advance(self._clock()))
        return self._core.digest(self._clock())

    def hear(self, digest: Digest) -> None:
        """Take what another router tells."""
        self._apply(self._core.hear(digest, self._clock()))

    def demand(self, pool: PoolName) -> PoolDemand:
        """Return what this router was asked for of a pool, and what it has."""
        return self._demand.read(
            pool, queued=self.queue_depth(pool), in_flight=self.in_flight(pool)
        )

    def queue_depth(self, pool: PoolName) -> int:
        """Return how many requests wait for ``pool``."""
        return self._core.queue_depth(pool)

    def in_flight(self, pool: PoolName) -> int:
        """Return how many requests of ``pool`` are dispatched and not ended."""
        return self._core.in_flight(pool)

    def open_requests(self) -> int:
        """Return how many requests are waiting or dispatched, in all pools."""
        return self._core.open_requests()

    def replicas(self, pool: PoolName) -> int:
        """Return how many replicas of ``pool`` report their load."""
        return len(self._core.replicas(pool))

    def snapshot_age_s(self, pool: PoolName) -> float:
        """Return the age of the oldest load snapshot of a pool's replicas; 0 without any."""
        times_s = [replica.observed_at_s for replica in self._core.replicas(pool)]
        return max(0.0, self._clock() - min(times_s)) if times_s else 0.0

    def figures(self, pool: PoolName) -> PoolFigures | None:
        """Return a pool's state for metrics, or None if it is unknown."""
        return self._core.figures(pool)

    def noisiest_tenants(self, pool: PoolName, limit: int) -> list[tuple[TenantId, float]]:
        """Return the active tenants furthest ahead of their fair share, with their debts."""
        return self._core.noisiest_tenants(pool, limit)

    def expected_output(self, pool: PoolName, tenant: TenantId, max_tokens: int) -> int:
        """Return the output expected of a tenant's request, at most ``max_tokens``."""
        return self._core.expected_output(pool, tenant, max_tokens)

    def output_error_ratio(self, pool: PoolName, tenant: TenantId) -> float:
        """Return a tenant's recent error of that expectation over tokens produced."""
        return self._core.output_error_ratio(pool, tenant)

    def largest_kv_tokens(self, pool: PoolName) -> int:
        """Return the largest KV cache among a pool's live replicas; 0 without any."""
        return self._core.largest_kv_tokens(pool)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, request_id: RequestId, lease: Lease | None) -> None:
        now_s = self._clock()
        if lease is None or lease.outcome is Outcome.CANCELLED:
            self._apply(self._core.cancel(request_id, now_s))
        else:
            if lease.outcome is Outcome.COMPLETED:
                self._demand.ended(lease.dispatch.pool, now_s - lease.begun_s)
            self._apply(self._core.finish(request_id, lease.usage, lease.outcome, now_s))

    def _apply(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Notice):
                self._on_notice(effect)
                continue
            decision = self._waiting.pop(effect.request_id, None)
            if decision is None or decision.done():
                continue
            if isinstance(effect, Dispatch):
                decision.set_result(effect)
            else:
                decision.set_exception(Refused(effect))
        self._arm()

    def _arm(self) -> None:
        """Have ``advance`` called when the core next wants it."""
        due_s = self._core.next_wakeup_s()
        if due_s == self._timer_at_s:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at_s = due_s
        if due_s is not None:
            delay_s = max(0.0, due_s - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._timer = None
        self._timer_at_s = None
        self._apply(self._core.advance(self._clock()))
