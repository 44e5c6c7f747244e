"""Random events in virtual time with every policy on: classes, tenants, brownout, breakers."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serve_app.core.controller import Controller
from serve_app.core.policy import BreakerPolicy, PoolPolicy
from serve_app.core.types import (
    Dispatch,
    Effect,
    Failure,
    KeyId,
    Notice,
    Outcome,
    PoolName,
    PriorityClass,
    Reject,
    RejectReason,
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
TENANTS = [TenantId(name) for name in ("ann", "bob", "cyd")]
SLOTS = 3
STALE_S = 0.3
STABLE_S = 2.0
CRITICAL, STANDARD, SHEDDABLE = PriorityClass


def machine_policy() -> PoolPolicy:
    policy = PoolPolicy(
        max_concurrency_per_replica=SLOTS,
        queue_capacity=4,
        queue_timeout_s=3.0,
        hold_without_replica_s=1.0,
        stale_after_s=STALE_S,
        lost_after_s=3.0,
        breaker=BreakerPolicy(failures=2, open_s=0.5, open_max_s=2.0, retry_reserve=3.0),
    )
    return replace(policy, brownout=replace(policy.brownout, stable_s=STABLE_S))


class FairMachine(RuleBasedStateMachine):
    """Keeps its own account of who waits and runs, and compares after each event."""

    @initialize()
    def start(self) -> None:
        self.policy = machine_policy()
        self.core = Controller()
        self.now_s = 0.0
        self.offered = 0
        self.sequence = 0
        self.preemptions = 0
        self.waiting: dict[RequestId, Ticket] = {}
        self.running: dict[RequestId, tuple[Ticket, ReplicaId]] = {}
        self.decided: set[RequestId] = set()
        self.seen_s: dict[ReplicaId, float] = {}
        self.rung = 0
        self.rung_changed_s = -100.0
        self.take(self.core.configure({POOL: self.policy}, self.now_s))

    # Effects

    def take(self, effects: list[Effect], moving: RequestId | None = None) -> None:
        for effect in effects:
            if isinstance(effect, Notice):
                self.take_notice(effect)
            elif effect.request_id == moving:
                ticket, _ = self.running.pop(moving)
                if isinstance(effect, Dispatch):
                    self.running[moving] = (ticket, effect.replicas[0])
            else:
                assert effect.request_id not in self.decided, "decided twice"
                self.decided.add(effect.request_id)
                ticket = self.waiting.pop(effect.request_id)
                if isinstance(effect, Dispatch):
                    self.check_turn(ticket)
                    self.running[effect.request_id] = (ticket, effect.replicas[0])
                else:
                    self.check_refusal(ticket, effect)

    def check_turn(self, ticket: Ticket) -> None:
        for other in self.waiting.values():
            if (other.tenant, other.priority_class) == (ticket.tenant, ticket.priority_class):
                assert int(other.request_id) > int(ticket.request_id), "not its tenant's oldest"
        if ticket.priority_class is SHEDDABLE and self.rung_allows(CRITICAL):
            above = [t for t in self.waiting.values() if t.priority_class is CRITICAL]
            assert not above, "a Sheddable request went before a Critical one"

    def rung_allows(self, priority_class: PriorityClass) -> bool:
        return priority_class is CRITICAL or self.rung < 4

    def check_refusal(self, ticket: Ticket, reject: Reject) -> None:
        assert reject.retry_after_s is not None
        assert 0.9 <= reject.retry_after_s <= self.policy.retry_after_max_s * 1.25
        if reject.reason is RejectReason.SHED:
            assert ticket.priority_class is not CRITICAL, "Critical is never shed"

    def take_notice(self, notice: Notice) -> None:
        if notice.kind != "brownout":
            return
        rung = notice.detail["rung"]
        assert isinstance(rung, int)
        assert notice.detail["from_rung"] == self.rung
        if rung < self.rung:
            assert rung == self.rung - 1, "stepped down more than one rung at once"
            assert self.now_s - self.rung_changed_s >= STABLE_S, "flapped"
        self.rung, self.rung_changed_s = rung, self.now_s

    # Events

    def pass_time(self, passed_s: float) -> None:
        """Time passes; who drives the controller wakes it when it asked to be, or later."""
        self.now_s += passed_s
        wakeup_s = self.core.next_wakeup_s()
        if wakeup_s is not None and wakeup_s <= self.now_s:
            self.take(self.core.advance(self.now_s))

    @rule(
        wait_s=st.sampled_from([0.0, 0.0, 0.01, 0.1, 0.4]),
        tenant=st.sampled_from(TENANTS),
        priority_class=st.sampled_from(PriorityClass),
        prompt_tokens=st.integers(1, 800),
        weight=st.sampled_from([1.0, 2.0, 0.0, float("nan"), -1.0]),
    )
    def offer(
        self,
        wait_s: float,
        tenant: TenantId,
        priority_class: PriorityClass,
        prompt_tokens: int,
        weight: float,
    ) -> None:
        self.pass_time(wait_s)
        self.offered += 1
        ticket = Ticket(
            RequestId(str(self.offered)),
            POOL,
            tenant,
            KeyId(tenant),
            priority_class,
            prompt_tokens,
            100,
            weight=weight,
        )
        self.waiting[ticket.request_id] = ticket
        self.take(self.core.offer(ticket, self.now_s))

    @rule(
        replica=st.sampled_from(REPLICAS),
        others=st.sampled_from([0, 0, 0, 1, 3]),
        kv_ratio=st.sampled_from([0.0, 0.1, 0.3, 0.3, 0.5, 0.86, 0.96, 1.0]),
        draining=st.sampled_from([False, False, False, True]),
        preempted=st.sampled_from([0, 0, 0, 0, 40]),
    )
    def observe(
        self, replica: ReplicaId, others: int, kv_ratio: float, draining: bool, preempted: int
    ) -> None:
        self.sequence += 1
        self.preemptions += preempted
        own = sum(1 for _, where in self.running.values() if where == replica)
        view = ReplicaView(
            replica,
            POOL,
            self.sequence,
            8,
            own,
            others,
            kv_ratio,
            400_000,
            preemptions_total=self.preemptions,
            draining=draining,
        )
        self.seen_s[replica] = self.now_s
        self.take(self.core.observe(view, self.now_s))

    @rule()
    def observe_all_idle(self) -> None:
        self.pass_time(0.1)
        for replica in REPLICAS:
            self.observe(replica, 0, 0.1, False, 0)

    @rule(replica=st.sampled_from(REPLICAS))
    def forget(self, replica: ReplicaId) -> None:
        self.seen_s.pop(replica, None)
        self.take(self.core.forget(replica, self.now_s))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), output=st.integers(0, 300))
    def finish(self, data: st.DataObject, outcome: Outcome, output: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        ticket, _ = self.running.pop(request_id)
        usage = Usage(ticket.prompt_tokens, 0, output)
        self.take(self.core.finish(request_id, usage, outcome, self.now_s))

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
        _, before = self.running[request_id]
        effects = self.core.fail(request_id, before, self.now_s, why)
        mine = [e for e in effects if getattr(e, "request_id", None) == request_id]
        assert len(mine) == 1, "a failed request is moved or refused at once"
        self.take(effects, moving=request_id)
        if request_id in self.running:
            assert self.running[request_id][1] != before

    @precondition(lambda self: self.running)
    @rule(data=st.data(), count=st.integers(1, 200), elsewhere=st.booleans())
    def progress(self, data: st.DataObject, count: int, elsewhere: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.running)))
        ticket, where = self.running[request_id]
        known = [replica.id for replica in self.core.replicas(POOL)]
        if elsewhere and known:
            where = data.draw(st.sampled_from(known))
            self.running[request_id] = (ticket, where)
        self.take(self.core.progress(where, [(request_id, count)], self.now_s))

    @rule()
    def wake(self) -> None:
        wakeup_s = self.core.next_wakeup_s()
        if wakeup_s is None:
            assert not self.waiting, "asleep for ever with requests waiting"
            return
        self.now_s = max(self.now_s, wakeup_s)
        self.take(self.core.advance(self.now_s))

    # What holds at all times

    @invariant()
    def nothing_is_lost_or_kept(self) -> None:
        if not hasattr(self, "core"):
            return
        assert self.core.open_requests() == len(self.waiting) + len(self.running)
        assert self.core.queue_depth(POOL) == len(self.waiting)
        assert self.core.in_flight() == len(self.running)
        figures = self.core.figures(POOL)
        assert figures is not None
        assert figures.rung == self.rung
        for rank, waiting in enumerate(figures.waiting):
            assert waiting <= 4
            assert waiting == sum(t.priority_class == rank for t in self.waiting.values())
        tenants = {t.tenant for t in self.waiting.values()}
        tenants |= {t.tenant for t, _ in self.running.values()}
        assert figures.tenants_active == len(tenants)

    @invariant()
    def nobody_waits_for_room_that_is_there(self) -> None:
        if not getattr(self, "waiting", None):
            return
        if not any(self.has_room(replica) for replica in self.core.replicas(POOL)):
            return
        live = {r.id for r in self.core.replicas(POOL) if not r.view.draining}
        held = [0, 0, 0]
        for ticket, where in self.running.values():
            held[ticket.priority_class] += where in live
        slots = SLOTS * len(live)
        classes = {t.priority_class for t in self.waiting.values()}
        assert CRITICAL not in classes or sum(held) >= slots
        open_slots = slots - int(0.3 * slots)
        if STANDARD in classes:
            assert held[1] + held[2] >= open_slots or sum(held) >= slots
        if SHEDDABLE in classes:
            assert (
                held[2] >= max(1, int(0.2 * slots))
                or held[1] + held[2] >= open_slots
                or sum(held) >= slots
            )

    def has_room(self, replica: object) -> bool:
        """Whether a replica could take even the largest request of the least class."""
        view, breaker = replica.view, replica.breaker  # type: ignore[attr-defined]
        fresh = self.now_s - self.seen_s.get(view.replica, -100.0) < STALE_S
        closed = breaker.closed_until_s <= self.now_s
        roomy = view.kv_usage_ratio <= 0.5
        calm = replica.own_uncached_prompt_tokens == 0  # type: ignore[attr-defined]
        slots = replica.in_flight < SLOTS  # type: ignore[attr-defined]
        return fresh and closed and roomy and calm and slots and not view.draining

    @invariant()
    def wakeup_covers_the_hold_and_every_deadline(self) -> None:
        if getattr(self, "waiting", None):
            wakeup_s = self.core.next_wakeup_s()
            assert wakeup_s is not None
            assert wakeup_s <= self.now_s + self.policy.queue_timeout_s

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for request_id in [*self.waiting, *self.running]:
            self.core.cancel(request_id, self.now_s)
        figures = self.core.figures(POOL)
        assert figures is not None
        assert self.core.open_requests() == 0
        assert figures.waiting == figures.in_flight == figures.in_flight_tokens == (0, 0, 0)
        assert figures.tenants_active == 0
        assert figures.tenants_known <= 3 * len(TENANTS)
        for replica in self.core.replicas(POOL):
            assert (replica.own, replica.own_tokens, replica.own_present_tokens) == (0, 0, 0)
            assert replica.own_uncached_prompt_tokens == 0
        self.core.configure({}, self.now_s)
        assert self.core.next_wakeup_s() is None


TestFairController = FairMachine.TestCase
TestFairController.settings = examples(150, stateful_step_count=50)
