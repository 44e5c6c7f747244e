"""The policies together in the controller: worked examples, one situation each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.core.controller import Controller
from serve_app.core.policy import BreakerPolicy, FairnessPolicy, PoolPolicy
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

POOL, SMALL = PoolName("chat"), PoolName("small")
CRITICAL, STANDARD, SHEDDABLE = PriorityClass
KV_CAPACITY = 420_000


class Bench:
    """One controller, its snapshots and a growing request number."""

    def __init__(self, policy: PoolPolicy, replicas: int = 1) -> None:
        self.core = Controller()
        self.sequence = 0
        self.policy = policy
        self.names = [f"r{number}" for number in range(replicas)]
        self.core.configure({POOL: policy}, 0.0)
        for name in self.names:
            self.view(name, 0.0)

    def view(
        self,
        name: str,
        now_s: float,
        *,
        kv: float = 0.0,
        running: int = 0,
        preemptions: int = 0,
        pool: PoolName = POOL,
        draining: bool = False,
    ) -> list[Effect]:
        self.sequence += 1
        return self.core.observe(
            ReplicaView(
                ReplicaId(name),
                pool,
                self.sequence,
                256,
                running,
                0,
                kv,
                KV_CAPACITY,
                preemptions_total=preemptions,
                draining=draining,
            ),
            now_s,
        )

    def offer(
        self,
        name: str,
        now_s: float = 0.0,
        *,
        tenant: str = "t",
        priority_class: PriorityClass = STANDARD,
        prompt: int = 100,
        output: int = 100,
        weight: float = 1.0,
    ) -> list[Effect]:
        ticket = Ticket(
            RequestId(name),
            POOL,
            TenantId(tenant),
            KeyId(tenant),
            priority_class,
            prompt,
            output,
            weight=weight,
        )
        return self.core.offer(ticket, now_s)

    def finish(self, name: str, now_s: float, prompt: int = 100, output: int = 100) -> list[Effect]:
        return self.core.finish(RequestId(name), Usage(prompt, 0, output), Outcome.COMPLETED, now_s)

    def first_token(self, name: str, now_s: float, replica: str = "r0") -> list[Effect]:
        return self.core.progress(ReplicaId(replica), [(RequestId(name), 1)], now_s)


def dispatched(effects: list[Effect]) -> list[str]:
    return [effect.request_id for effect in effects if isinstance(effect, Dispatch)]


def reasons(effects: list[Effect]) -> list[RejectReason]:
    return [effect.reason for effect in effects if isinstance(effect, Reject)]


def one_slot(**changes: object) -> PoolPolicy:
    """A replica that runs one request at a time, and no deadline in the way."""
    policy = PoolPolicy(
        max_concurrency_per_replica=1, early_rejection=False, stale_after_s=60.0, queue_capacity=64
    )
    return replace(policy, **changes)


def test_two_tenant_dequeue_order() -> None:
    """The playbook's A (weight 2, 500 in / 300 out) and B (weight 1, 8000 in / 400 out)."""
    fairness = FairnessPolicy(request_cost=0.0)
    bench = Bench(one_slot(fairness=fairness, expected_output_tokens=400))
    bench.offer("running", tenant="z")
    for number in range(2):
        bench.offer(f"b{number}", tenant="b", prompt=8000, output=400)
    for number in range(4):
        bench.offer(f"a{number}", tenant="a", prompt=500, output=300, weight=2.0)
    order, current = [], "running"
    for second in range(1, 7):
        prompt, output = (500, 300) if current.startswith("a") else (8000, 400)
        [current] = dispatched(bench.finish(current, float(second), prompt, output))
        order.append(current)
    assert order == ["b0", "a0", "a1", "a2", "a3", "b1"]


def test_128k_sheddable_at_kv_088_is_refused_before_it_evicts_anybody() -> None:
    policy = PoolPolicy()
    calm = replace(policy, brownout=replace(policy.brownout, shed_sheddable=False))
    for setting, reason in ((policy, RejectReason.SHED), (calm, RejectReason.KV_BUDGET)):
        bench = Bench(setting, replicas=2)
        bench.view("r0", 0.02, kv=0.88, running=20)
        bench.view("r1", 0.12, kv=0.88, running=20)
        effects = bench.offer("long", 0.15, priority_class=SHEDDABLE, prompt=128_000, output=1000)
        assert reasons(effects) == [reason]
        short = bench.offer("short", 0.15, prompt=500)
        assert dispatched(short) == ["short"]


def test_128k_standard_at_kv_088_is_held_and_goes_when_there_is_room() -> None:
    bench = Bench(PoolPolicy())
    bench.view("r0", 0.1, kv=0.88, running=20)
    assert bench.offer("long", 0.15, prompt=128_000) == []
    assert dispatched(bench.offer("short", 0.16, tenant="other", prompt=500)) == ["short"]
    assert bench.first_token("short", 0.18) == []
    assert dispatched(bench.view("r0", 0.2, kv=0.5, running=10)) == ["long"]


def test_kv_is_predicted_from_expected_output_not_only_read() -> None:
    bench = Bench(PoolPolicy(expected_output_tokens=4000, max_concurrency_per_replica=256))
    count = 0
    while dispatched(bench.offer(f"q{count}", 0.0, tenant=f"t{count % 9}", prompt=1, output=8000)):
        bench.first_token(f"q{count}", 0.0)
        count += 1
    assert 60 < count < 0.97 * KV_CAPACITY / 4001


def test_request_must_fit_with_its_whole_expected_output() -> None:
    for output, goes in ((100, True), (6000, False)):
        bench = Bench(PoolPolicy(expected_output_tokens=6000))
        bench.view("r0", 0.1, kv=0.85, running=20)
        free = int(0.92 * KV_CAPACITY) - int(0.85 * KV_CAPACITY)
        effects = bench.offer("q", 0.2, prompt=free - 5000, output=output)
        assert bool(dispatched(effects)) is goes


def test_prompt_larger_than_any_cache_is_refused_for_good() -> None:
    bench = Bench(PoolPolicy())
    [effect] = bench.offer("huge", prompt=KV_CAPACITY)
    assert isinstance(effect, Reject)
    assert (effect.reason, effect.retry_after_s) == (RejectReason.KV_BUDGET, None)


def test_answer_longer_than_expected_is_accounted_as_it_grows() -> None:
    bench = Bench(PoolPolicy(expected_output_tokens=10))
    bench.offer("q", output=10_000)
    [replica] = bench.core.replicas(POOL)
    assert replica.own_tokens == 110
    bench.core.progress(ReplicaId("r0"), [(RequestId("q"), 1000)], 0.1)
    assert replica.own_tokens == 100 + 1500
    bench.finish("q", 0.2, output=1000)
    assert replica.own_tokens == replica.own_present_tokens == 0


def test_critical_finds_room_that_standard_and_sheddable_may_not_take() -> None:
    bench = Bench(PoolPolicy(max_concurrency_per_replica=10, sparse_headroom_ratio=0.0))
    for number in range(10):
        bench.offer(f"h{number}", priority_class=SHEDDABLE)
        bench.first_token(f"h{number}", 0.0)
    for number in range(10):
        bench.offer(f"s{number}")
        bench.first_token(f"s{number}", 0.0)
    figures = bench.core.figures(POOL)
    assert figures is not None
    assert figures.in_flight == (0, 5, 2)
    for number in range(3):
        assert dispatched(bench.offer(f"c{number}", priority_class=CRITICAL))
        bench.first_token(f"c{number}", 0.0)
    assert bench.offer("c3", priority_class=CRITICAL) == []


def test_waiting_critical_goes_before_older_standard_and_sheddable() -> None:
    bench = Bench(one_slot())
    bench.offer("running")
    bench.offer("h", 0.1, priority_class=SHEDDABLE)
    bench.offer("s", 0.2)
    bench.offer("c", 0.3, priority_class=CRITICAL)
    assert dispatched(bench.finish("running", 1.0)) == ["c"]
    assert dispatched(bench.finish("c", 2.0)) == ["s"]
    assert dispatched(bench.finish("s", 3.0)) == ["h"]


def test_standard_is_not_starved_by_a_flood_of_critical() -> None:
    bench = Bench(one_slot())
    bench.offer("running", priority_class=CRITICAL)
    for number in range(60):
        bench.offer(f"c{number}", priority_class=CRITICAL, tenant=f"t{number}")
        if number < 6:
            bench.offer(f"s{number}")
    order, current = [], "running"
    for step in range(60):
        [current] = dispatched(bench.finish(current, 0.01 * step))
        order.append(current)
    turns = [place for place, name in enumerate(order) if name.startswith("s")]
    assert len(turns) >= 5
    assert turns[0] <= 11


def test_one_tenants_burst_does_not_delay_another() -> None:
    bench = Bench(one_slot())
    bench.offer("running", tenant="noisy")
    for number in range(40):
        bench.offer(f"n{number}", tenant="noisy")
    bench.offer("quiet", 0.1, tenant="quiet")
    first = dispatched(bench.finish("running", 1.0))
    assert [*first, *dispatched(bench.finish(first[0], 2.0))] == ["n0", "quiet"]


def test_full_queue_is_full_for_the_tenant_that_filled_it_only() -> None:
    bench = Bench(one_slot(queue_capacity=20, client_throttle=False))
    bench.offer("running")
    effects = [bench.offer(f"n{number}", tenant="noisy") for number in range(30)]
    refused = [reason for each in effects for reason in reasons(each)]
    assert set(refused) == {RejectReason.TENANT_CONCURRENCY}
    assert bench.core.queue_depth(POOL) == 16
    assert bench.offer("quiet", tenant="quiet") == []


def test_tenant_kv_share_binds_only_while_others_are_active() -> None:
    policy = PoolPolicy(
        max_concurrency_per_replica=100, prefill_knee_tokens=10**6, critical_reserve_ratio=0.0
    )
    alone = Bench(policy)
    for number in range(3):
        assert dispatched(alone.offer(f"q{number}", prompt=100_000, tenant="big"))
    shared = Bench(policy)
    shared.offer("other", tenant="other")
    for number in range(2):
        assert dispatched(shared.offer(f"q{number}", prompt=100_000, tenant="big"))
    assert shared.offer("q2", prompt=100_000, tenant="big") == []
    assert dispatched(shared.finish("other", 0.1)) == ["q2"]


def test_replicas_count_what_was_sent_since_their_snapshot() -> None:
    bench = Bench(PoolPolicy(max_concurrency_per_replica=3, critical_reserve_ratio=0.0))
    sent = [bench.offer(f"q{number}", prompt=1) for number in range(5)]
    assert len([each for each in sent if dispatched(each)]) == 3


def train(bench: Bench, ttft_s: float, now_s: float) -> float:
    """Let requests come, wait and end, so that the predictors have something to go by."""
    for number in range(40):
        bench.offer(f"train{number}", now_s)
        bench.offer(f"wait{number}", now_s)
        bench.first_token(f"train{number}", now_s + ttft_s)
        now_s += 1.0
        bench.view("r0", now_s)
        bench.finish(f"train{number}", now_s)
        bench.first_token(f"wait{number}", now_s + ttft_s)
        now_s += 1.0
        bench.view("r0", now_s)
        bench.finish(f"wait{number}", now_s)
    return now_s


def test_request_that_cannot_make_its_ttft_is_refused_at_once_with_advice() -> None:
    policy = one_slot(early_rejection=True, client_throttle=False)
    bench = Bench(replace(policy, standard=replace(policy.standard, ttft_slo_s=3.0)))
    now_s = train(bench, 0.1, 0.0)
    bench.offer("running", now_s)
    answers = [bench.offer(f"q{number}", now_s, tenant="burst") for number in range(8)]
    refused = [each[0] for each in answers if each]
    assert 3 <= len(refused) <= 6
    for effect in refused:
        assert isinstance(effect, Reject)
        assert effect.reason is RejectReason.TTFT_UNREACHABLE
        assert effect.retry_after_s is not None
    assert bench.offer("elsewhere", now_s, tenant="other") == []


def test_nobody_is_refused_on_a_prediction_without_evidence() -> None:
    bench = Bench(one_slot(early_rejection=True))
    bench.offer("running")
    assert all(bench.offer(f"q{number}") == [] for number in range(30))


def test_long_prompt_is_not_refused_for_its_own_length() -> None:
    bench = Bench(one_slot(early_rejection=True))
    now_s = train(bench, 0.5, 0.0)
    assert dispatched(bench.offer("long", now_s, prompt=100_000)) == ["long"]


def test_client_that_ignores_the_advice_is_throttled_and_a_patient_one_is_not() -> None:
    bench = Bench(one_slot(queue_capacity=0))
    bench.offer("running", tenant="busy")
    rude = [
        reasons(bench.offer(f"r{number}", 0.01 * number, tenant="rude")) for number in range(50)
    ]
    assert rude[0] == [RejectReason.QUEUE_FULL]
    assert rude.count([RejectReason.CLIENT_THROTTLED]) > 30
    for number in range(20):
        assert reasons(bench.offer(f"p{number}", 100.0 * number, tenant="polite")) == [
            RejectReason.QUEUE_FULL
        ]


def test_brownout_sheds_sheddable_waiting_and_coming_and_says_so() -> None:
    bench = Bench(one_slot())
    bench.offer("running")
    bench.offer("waiting", tenant="patient", priority_class=SHEDDABLE)
    effects = bench.view("r0", 0.2, kv=0.86, running=1)
    [notice] = [effect for effect in effects if isinstance(effect, Notice)]
    assert (notice.kind, notice.detail["rung"]) == ("brownout", 1)
    assert reasons(effects) == [RejectReason.SHED]
    assert reasons(bench.offer("new", 0.3, priority_class=SHEDDABLE)) == [RejectReason.SHED]
    assert reasons(bench.offer("std", 0.3)) == []


def test_second_rung_caps_answers_of_all_but_critical() -> None:
    bench = Bench(PoolPolicy())
    bench.view("r0", 0.1, kv=0.90)
    [standard] = bench.offer("s", 0.1, output=5000)
    [critical] = bench.offer("c", 0.1, output=5000, priority_class=CRITICAL)
    [short] = bench.offer("k", 0.1, output=100)
    assert isinstance(standard, Dispatch)
    assert isinstance(critical, Dispatch)
    assert isinstance(short, Dispatch)
    assert (standard.max_tokens, standard.degraded) == (512, "max_tokens")
    assert (critical.max_tokens, critical.degraded) == (None, None)
    assert (short.max_tokens, short.degraded) == (None, None)


def test_third_rung_sends_standard_to_the_fallback_pool() -> None:
    policy = PoolPolicy()
    policy = replace(policy, brownout=replace(policy.brownout, fallback_pool=SMALL))
    bench = Bench(policy)
    bench.core.configure({POOL: policy, SMALL: PoolPolicy()}, 0.0)
    bench.view("r0", 0.1, kv=0.955)
    assert bench.offer("early", 0.1, prompt=50_000) == []
    bench.view("s0", 0.1, pool=SMALL)
    [effect] = bench.offer("s", 0.1)
    assert isinstance(effect, Dispatch)
    assert (effect.pool, effect.replicas, effect.degraded) == (SMALL, ("s0",), "fallback_model")
    [critical] = bench.offer("c", 0.1, priority_class=CRITICAL)
    assert isinstance(critical, Dispatch)
    assert critical.pool == POOL
    assert bench.core.in_flight(SMALL) == 1
    bench.finish("s", 0.2)
    assert bench.core.in_flight(SMALL) == 0


def test_fourth_rung_and_preemption_storm_serve_critical_only() -> None:
    for kv, preemptions in ((0.98, 0), (0.4, 500)):
        bench = Bench(PoolPolicy())
        bench.view("r0", 0.2, kv=kv, preemptions=preemptions)
        assert reasons(bench.offer("s", 0.2)) == [RejectReason.SHED]
        assert reasons(bench.offer("c", 0.2, priority_class=CRITICAL)) == []


def test_breaker_leaves_a_failing_replica_alone_and_probes_it() -> None:
    breaker = BreakerPolicy(failures=2, open_s=5.0, retry_reserve=100.0)
    bench = Bench(PoolPolicy(breaker=breaker, stale_after_s=60.0), replicas=2)
    notices = []
    for number in range(2):
        bench.offer(f"q{number}", 0.0)
        for effect in bench.core.fail(RequestId(f"q{number}"), ReplicaId("r0"), 0.0):
            notices += [effect.kind] if isinstance(effect, Notice) else []
    assert notices == ["breaker_open"]
    chosen = [bench.offer(f"p{number}", 1.0)[0] for number in range(6)]
    assert {each.replicas for each in chosen if isinstance(each, Dispatch)} == {("r1",)}
    [probe] = bench.offer("probe", 6.0)
    assert isinstance(probe, Dispatch)
    assert probe.replicas[0] == "r0"
    [second] = bench.offer("second", 6.0)
    assert isinstance(second, Dispatch)
    assert second.replicas == ("r1",)
    [closed] = bench.first_token("probe", 6.5)
    assert isinstance(closed, Notice)
    assert closed.kind == "breaker_closed"


def test_a_replica_that_had_no_place_for_what_was_moved_has_not_failed() -> None:
    """Where a replica is lost, its streams come to another one all at once."""
    breaker = BreakerPolicy(failures=2, open_s=5.0, retry_reserve=100.0)
    bench = Bench(PoolPolicy(breaker=breaker, stale_after_s=60.0), replicas=2)
    for number in range(6):
        bench.offer(f"q{number}", 0.0)
        effects = bench.core.fail(RequestId(f"q{number}"), ReplicaId("r0"), 0.0, Failure.BUSY)
        assert [type(effect) for effect in effects] == [Dispatch]
    chosen = [bench.offer(f"p{number}", 1.0)[0] for number in range(6)]
    assert "r0" in {each.replicas[0] for each in chosen if isinstance(each, Dispatch)}


def test_waiting_requests_wake_up_for_the_probe() -> None:
    policy = one_slot(breaker=BreakerPolicy(failures=1, open_s=5.0))
    bench = Bench(policy)
    bench.offer("q", 0.0)
    bench.core.fail(RequestId("q"), ReplicaId("r0"), 1.0)
    assert bench.offer("waits", 2.0) == []
    assert bench.core.next_wakeup_s() == 6.0
    assert dispatched(bench.core.advance(6.0)) == ["waits"]


def test_client_errors_of_the_engine_do_not_open_the_breaker() -> None:
    bench = Bench(PoolPolicy(breaker=BreakerPolicy(failures=2)))
    for number in range(10):
        bench.offer(f"q{number}", 0.0)
        bench.core.finish(RequestId(f"q{number}"), Usage(), Outcome.FAILED, 0.0)
    assert dispatched(bench.offer("next", 0.1)) == ["next"]


def test_retries_stop_at_the_budget() -> None:
    breaker = BreakerPolicy(failures=10**6, retry_ratio=0.0, retry_reserve=3.0)
    bench = Bench(PoolPolicy(breaker=breaker), replicas=4)
    outcomes = []
    for number in range(6):
        [first] = bench.offer(f"q{number}", 0.0)
        assert isinstance(first, Dispatch)
        [effect] = bench.core.fail(RequestId(f"q{number}"), first.replicas[0], 0.0, Failure.REQUEST)
        outcomes.append(effect.reason if isinstance(effect, Reject) else "moved")
    assert outcomes == ["moved"] * 3 + [RejectReason.RETRY_BUDGET] * 3
    assert bench.core.open_requests() == 3


def test_refused_retry_costs_its_tenant_nothing() -> None:
    bench = Bench(PoolPolicy())
    bench.offer("q", 0.0, tenant="unlucky", prompt=5000)
    assert bench.core.fairness_debt(POOL, TenantId("unlucky")) > 0
    bench.core.fail(RequestId("q"), ReplicaId("r0"), 0.1)
    assert bench.core.fairness_debt(POOL, TenantId("unlucky")) == pytest.approx(0.0, abs=1.0)


def test_draining_replica_no_longer_counts_in_the_shares() -> None:
    policy = PoolPolicy(
        max_concurrency_per_replica=10, stale_after_s=60.0, sparse_headroom_ratio=0.0
    )
    bench = Bench(policy, replicas=2)
    for number in range(14):
        bench.offer(f"q{number}", tenant=f"t{number}")
    assert bench.offer("full") == []
    assert bench.core.in_flight() == 14
    effects = bench.view("r0", 0.1, draining=True, running=7)
    assert dispatched(effects) == []
    bench.core.cancel(RequestId("full"), 0.1)
    bench.finish("q1", 0.2)
    assert dispatched(bench.offer("fits", 0.2)) == ["fits"]


@pytest.mark.parametrize("leaves", ["drains", "is gone"])
def test_what_runs_on_a_leaving_replica_is_not_held_against_its_tenant(leaves: str) -> None:
    policy = PoolPolicy(
        max_concurrency_per_replica=2, stale_after_s=60.0, critical_reserve_ratio=0.0
    )
    bench = Bench(policy, replicas=3)
    bench.offer("other", tenant="other")
    for number in range(5):
        bench.offer(f"q{number}", tenant="mine")
    for name in ("r0", "r1"):
        if leaves == "drains":
            bench.view(name, 0.1, draining=True)
        else:
            bench.core.forget(ReplicaId(name), 0.1)
    # Two of the five are on the replica that stays and fill it; the others do not count.
    assert bench.offer("next", 0.2, tenant="mine") == []
    on_r2 = [each for each in ("q1", "q4") if dispatched(bench.finish(each, 0.3)) == ["next"]]
    assert on_r2
    bench.finish("next", 0.4)
    assert dispatched(bench.offer("again", 0.5, tenant="mine")) == ["again"]


def test_cached_prompt_tokens_cost_less() -> None:
    bench = Bench(PoolPolicy(stale_after_s=60.0))
    for tenant, cached in (("warm", 9000), ("cold", 0)):
        bench.offer(tenant, tenant=tenant, prompt=10_000)
        usage = Usage(10_000, cached, 100)
        bench.core.finish(RequestId(tenant), usage, Outcome.COMPLETED, 0.1)
    warm, cold = (bench.core.fairness_debt(POOL, TenantId(name)) for name in ("warm", "cold"))
    assert warm < 0.3 * cold


def test_a_request_split_into_a_hundred_is_served_no_more_than_a_whole_one() -> None:
    bench = Bench(one_slot(queue_capacity=512, queue_timeout_s=1e6))
    bench.offer("running", tenant="z")
    for number in range(2):
        bench.offer(f"whole{number}", tenant="whole", prompt=8000, output=1000)
    for number in range(100):
        bench.offer(f"part{number}", tenant="split", prompt=80, output=10)
    order, current = [], "running"
    for turn in range(1, 103):
        prompt, output = (80, 10) if current.startswith("part") else (8000, 1000)
        [current] = dispatched(bench.finish(current, turn / 10, prompt, output))
        order.append(current)
    served_between = order.index("whole1") - order.index("whole0") - 1
    # Each part pays the fixed cost of a request: 116 units where the whole's hundredth pays 100.
    assert served_between == 87
    assert order[-1].startswith("part")


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_clock_jumps_end_no_request_twice_and_lose_none(jump_s: float) -> None:
    bench = Bench(PoolPolicy(max_concurrency_per_replica=1))
    bench.offer("a", 100.0)
    bench.view("r0", 100.0)
    assert bench.offer("b", 100.0) == []
    effects = bench.core.advance(100.0 + jump_s)
    if jump_s < 0:
        assert effects == []
        bench.view("r0", 100.0)
        assert dispatched(bench.finish("a", 100.1)) == ["b"]
        effects = bench.finish("b", 100.2)
    else:
        assert reasons(effects) == [RejectReason.QUEUE_TIMEOUT]
        effects = bench.finish("a", 100.0 + jump_s)
    assert effects == []
    assert bench.core.open_requests() == 0
    # An hour later the fleet has been silent; the first snapshot makes it serve again.
    now_s = 100.2 + max(0.0, jump_s)
    bench.view("r0", now_s)
    assert dispatched(bench.offer("c", now_s, tenant="other")) == ["c"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"queue_capacity": 0}, RejectReason.QUEUE_FULL),
        ({"sheddable_share_ratio": 0.0}, None),
    ],
)
def test_limits_of_zero_mean_no_queue_and_no_share(
    change: dict[str, float], reason: RejectReason | None
) -> None:
    bench = Bench(PoolPolicy(max_concurrency_per_replica=1, **change))
    if reason is None:
        assert bench.offer("flex", priority_class=SHEDDABLE) == []
        assert bench.core.queue_depth(POOL) == 1
        assert dispatched(bench.offer("default")) == ["default"]
    else:
        assert dispatched(bench.offer("a")) == ["a"]
        assert reasons(bench.offer("b")) == [reason]


def test_ten_thousand_tenants_in_a_minute_leave_nothing_behind() -> None:
    policy = PoolPolicy(fairness=FairnessPolicy(tenants_max=500))
    bench = Bench(policy, replicas=4)
    for number in range(10_000):
        now_s = number * 0.006
        if number % 16 == 0:
            for name in bench.names:
                bench.view(name, now_s)
        if dispatched(bench.offer(f"q{number}", now_s, tenant=f"t{number}")):
            bench.finish(f"q{number}", now_s)
    figures = bench.core.figures(POOL)
    assert figures is not None
    assert figures.tenants_active == 0
    assert figures.tenants_known <= 501
    assert bench.core.open_requests() == 0


def test_fairness_by_engine_seconds_charges_what_was_measured_and_not_the_tokens() -> None:
    fairness = FairnessPolicy(by_engine_seconds=True)
    bench = Bench(PoolPolicy(fairness=fairness))
    debts = {}
    for number in range(50):
        for tenant, engine_s in (("slow", 0.3), ("fast", 0.1)):
            name = f"{tenant} {number}"
            bench.offer(name, 0.0, tenant=tenant)
            usage = Usage(100, 0, 100, engine_s)
            bench.core.finish(RequestId(name), usage, Outcome.COMPLETED, 0.0)
            debts[tenant] = bench.core.fairness_debt(POOL, TenantId(tenant))
    # The same tokens; of the engine's time one took three times the other's.
    assert debts["slow"] > debts["fast"]
    by_tokens = Bench(PoolPolicy())
    by_tokens.offer("a", 0.0, tenant="slow")
    by_tokens.core.finish(RequestId("a"), Usage(100, 0, 100, 0.3), Outcome.COMPLETED, 0.0)
    by_tokens.offer("b", 0.0, tenant="fast")
    by_tokens.core.finish(RequestId("b"), Usage(100, 0, 100, 0.1), Outcome.COMPLETED, 0.0)
    slow, fast = (by_tokens.core.fairness_debt(POOL, TenantId(name)) for name in ("slow", "fast"))
    assert slow == pytest.approx(fast)
