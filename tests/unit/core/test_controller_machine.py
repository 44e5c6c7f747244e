"""Random events in virtual time, in order of arrival: what must hold after every event.

The policies of class, tenant and load are off here, so that the invariants are exact;
test_fair_machine.py drives the same events with all of them on.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from serve_app.core.controller import Controller
from serve_app.core.policy import PoolPolicy, arrival_order
from serve_app.core.types import (
    Dispatch,
    Effect,
    Failure,
    KeyId,
    Outcome,
    PoolName,
    PriorityClass,
    Reject,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)
from tests.properties import examples

POOL = PoolName("chat")
REPLICAS = [ReplicaId(f"r{number}") for number in range(3)]
SLOTS = 2
STALE_S = 0.3


class ControllerMachine(RuleBasedStateMachine):
    """Keeps its own simple account of the world and compares after each event."""

    @initialize(capacity=st.integers(0, 4), hold_s=st.sampled_from([0.0, 0.5, 5.0]))
    def start(self, capacity: int, hold_s: float) -> None:
        self.policy = arrival_order(
            PoolPolicy(
                max_concurrency_per_replica=SLOTS,
                queue_capacity=capacity,
                queue_timeout_s=5.0,
                hold_without_replica_s=hold_s,
                stale_after_s=STALE_S,
                lost_after_s=3.0,
            )
        )
        self.core = Controller()
        self.now_s = 0.0
        self.offered = 0
        self.sequence = 0
        self.waiting: dict[RequestId, float] = {}
        self.running: dict[RequestId, ReplicaId] = {}
        self.decided: set[RequestId] = set()
        self.seen_s: dict[ReplicaId, float] = {}
        self.take(self.core.configure({POOL: self.policy}, self.now_s))

    def take(self, effects: list[Effect], moving: RequestId | None = None) -> None:
        """Apply effects to the account, checking each decision is made once and in order."""
        for effect in effects:
            if isinstance(effect, Dispatch) and effect.request_id == moving:
                self.running[effect.request_id] = effect.replicas[0]
            elif isinstance(effect, Reject) and effect.request_id == moving:
                del self.running[effect.request_id]
            elif isinstance(effect, Dispatch | Reject):
                assert effect.request_id not in self.decided, "decided twice"
                self.decided.add(effect.request_id)
                deadline_s = self.waiting.pop(effect.request_id)
                if isinstance(effect, Dispatch):
                    assert self.now_s < deadline_s, "dispatched after its deadline"
                    older = [d for d in self.waiting.values() if d < deadline_s]
                    assert not older, "not first in, first out"
                    self.running[effect.request_id] = effect.replicas[0]

    @rule(wait_s=st.sampled_from([0.0, 0.01, 0.1, 0.31, 1.0, 4.0]))
    def offer(self, wait_s: float) -> None:
        self.now_s += wait_s
        self.offered += 1
        request_id = RequestId(f"q{self.offered}")
        ticket = Ticket(request_id, POOL, TenantId("t"), KeyId("k"), PriorityClass.STANDARD, 10, 10)
        self.waiting[request_id] = self.now_s + self.policy.queue_timeout_s
        self.take(self.core.offer(ticket, self.now_s))

    @rule(replica=st.sampled_from(REPLICAS), others=st.integers(0, 3), draining=st.booleans())
    def observe(self, replica: ReplicaId, others: int, draining: bool) -> None:
        self.sequence += 1
        own = sum(1 for where in self.running.values() if where == replica)
        view = ReplicaView(
            replica, POOL, self.sequence, 8, own, others, 0.0, 1000, draining=draining
        )
        self.seen_s[replica] = self.now_s
        self.take(self.core.observe(view, self.now_s))

    @rule(replica=st.sampled_from(REPLICAS))
    def forget(self, replica: ReplicaId) -> None:
        self.seen_s.pop(replica, None)
        self.take(self.core.forget(replica, self.now_s))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), wait_s=st.sampled_from([0.0, 0.05, 0.5]))
    def finish(self, data: st.DataObject, wait_s: float) -> None:
        self.now_s += wait_s
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        del self.running[request_id]
        self.take(self.core.finish(request_id, Usage(10, 0, 5), Outcome.COMPLETED, self.now_s))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        known = sorted({*self.waiting, *self.running, RequestId("unknown")})
        request_id = data.draw(st.sampled_from(known))
        if self.waiting.pop(request_id, None) is not None:
            self.decided.add(request_id)
        self.running.pop(request_id, None)
        self.take(self.core.cancel(request_id, self.now_s))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), why=st.sampled_from(Failure))
    def fail(self, data: st.DataObject, why: Failure) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        before = self.running[request_id]
        effects = self.core.fail(request_id, before, self.now_s, why)
        mine = [e for e in effects if getattr(e, "request_id", None) == request_id]
        assert len(mine) == 1, "a failed request is moved or refused at once"
        self.take(effects, moving=request_id)
        assert self.running.get(request_id) != before

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        self.take(self.core.progress(self.running[request_id], [(request_id, 3)], self.now_s))

    @rule()
    def wake(self) -> None:
        """Sleep exactly as long as told; whatever is due must then be decided."""
        wakeup_s = self.core.next_wakeup_s()
        if wakeup_s is None:
            assert not self.waiting, "asleep for ever with requests waiting"
            return
        self.now_s = max(self.now_s, wakeup_s)
        self.take(self.core.advance(self.now_s))
        assert all(deadline_s > self.now_s for deadline_s in self.waiting.values())

    @invariant()
    def nothing_is_lost_or_kept(self) -> None:
        if not hasattr(self, "core"):
            return
        assert self.core.open_requests() == len(self.waiting) + len(self.running)
        assert self.core.queue_depth(POOL) == len(self.waiting)
        assert self.core.in_flight() == len(self.running)
        assert self.core.queue_depth(POOL) <= self.policy.queue_capacity

    @invariant()
    def wakeup_covers_every_deadline(self) -> None:
        if getattr(self, "waiting", None):
            wakeup_s = self.core.next_wakeup_s()
            assert wakeup_s is not None
            assert wakeup_s <= min(self.waiting.values())

    @invariant()
    def nobody_waits_while_a_fresh_replica_has_room(self) -> None:
        if not getattr(self, "waiting", None):
            return
        for replica in self.core.replicas(POOL):
            fresh = self.now_s - self.seen_s[replica.id] < STALE_S
            free = replica.in_flight < SLOTS and not replica.view.draining
            assert not (fresh and free), "a free slot was left idle"

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for request_id in [*self.waiting, *self.running]:
            self.core.cancel(request_id, self.now_s)
        assert self.core.open_requests() == 0
        assert self.core.in_flight() == 0
        assert all(replica.own == 0 for replica in self.core.replicas(POOL))
        self.core.configure({}, self.now_s)
        assert self.core.next_wakeup_s() is None


TestController = ControllerMachine.TestCase
TestController.settings = examples(150, stateful_step_count=40)
