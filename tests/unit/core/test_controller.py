"""What the controller does with single requests, replicas and pools."""

from __future__ import annotations

import pytest

from serve_app.core.controller import Controller
from serve_app.core.policy import BreakerPolicy, PoolPolicy
from serve_app.core.types import (
    Dispatch,
    Effect,
    Failure,
    KeyId,
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

POOL = PoolName("chat")


def ticket(name: str, *, pool: str = "chat", expires_at_s: float | None = None) -> Ticket:
    return Ticket(
        request_id=RequestId(name),
        pool=PoolName(pool),
        tenant=TenantId("t"),
        key=KeyId("k"),
        priority_class=PriorityClass.STANDARD,
        prompt_tokens=100,
        max_tokens=50,
        expires_at_s=expires_at_s,
    )


def view(
    name: str, sequence: int, *, running: int = 0, slots: int = 256, draining: bool = False
) -> ReplicaView:
    return ReplicaView(
        replica=ReplicaId(name),
        pool=POOL,
        sequence=sequence,
        slots=slots,
        running=running,
        waiting=0,
        kv_usage_ratio=0.0,
        kv_tokens_capacity=400_000,
        draining=draining,
    )


def controller(policy: PoolPolicy, *replicas: str) -> Controller:
    made = Controller()
    made.configure({POOL: policy}, 0.0)
    for name in replicas:
        made.observe(view(name, 1), 0.0)
    return made


def dispatched(effects: list[Effect]) -> list[str]:
    return [effect.request_id for effect in effects if isinstance(effect, Dispatch)]


def rejected(effects: list[Effect]) -> list[tuple[str, RejectReason]]:
    return [(e.request_id, e.reason) for e in effects if isinstance(e, Reject)]


def test_offer_goes_to_the_least_loaded_replica_with_the_others_as_fallbacks() -> None:
    core = controller(PoolPolicy(), "r1", "r2")
    core.offer(ticket("a"), 0.0)
    [effect] = core.offer(ticket("b"), 0.1)
    assert isinstance(effect, Dispatch)
    assert effect.replicas == ("r2", "r1")
    assert effect.queued_s == 0.0


def test_full_replica_makes_requests_wait_and_a_finish_dispatches_the_oldest() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1")
    assert dispatched(core.offer(ticket("a"), 0.0)) == ["a"]
    assert core.offer(ticket("b"), 0.1) == []
    assert core.offer(ticket("c"), 0.2) == []
    [effect] = core.finish(RequestId("a"), Usage(), Outcome.COMPLETED, 0.25)
    assert isinstance(effect, Dispatch)
    assert (effect.request_id, effect.queued_s) == ("b", pytest.approx(0.15))
    assert core.queue_depth(POOL) == 1
    assert core.in_flight(POOL) == 1


def test_full_queue_refuses_with_advice_from_the_drain_rate() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1, queue_capacity=1), "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 0.0)
    [effect] = core.offer(ticket("c"), 0.0)
    assert isinstance(effect, Reject)
    assert effect.reason is RejectReason.QUEUE_FULL
    assert effect.retry_after_s is not None
    assert 1.0 <= effect.retry_after_s <= 1.25


def test_retry_advice_is_the_time_the_queue_takes_to_drain() -> None:
    policy = PoolPolicy(max_concurrency_per_replica=1, queue_capacity=2, early_rejection=False)
    core = controller(policy, "r1")
    for number in range(3):
        core.offer(ticket(f"q{number}"), 0.0)
    core.observe(view("r1", 2), 8.0)
    core.finish(RequestId("q0"), Usage(), Outcome.COMPLETED, 8.0)
    core.offer(ticket("more"), 8.0)
    [effect] = core.offer(ticket("refused"), 8.0)
    assert isinstance(effect, Reject)
    assert effect.retry_after_s is not None
    assert 16.0 <= effect.retry_after_s <= 16.0 * 1.25


def test_a_waiting_request_is_refused_at_its_deadline_and_not_before() -> None:
    policy = PoolPolicy(max_concurrency_per_replica=1, queue_timeout_s=2.0)
    core = controller(policy, "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 1.0)
    assert core.next_wakeup_s() == 3.0
    assert core.advance(2.99) == []
    assert rejected(core.advance(3.0)) == [("b", RejectReason.QUEUE_TIMEOUT)]
    assert core.next_wakeup_s() is None
    assert core.open_requests() == 1


def test_the_clients_own_deadline_comes_first() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b", expires_at_s=0.5), 0.0)
    assert core.next_wakeup_s() == 0.5
    assert rejected(core.offer(ticket("late", expires_at_s=0.4), 0.45)) == [
        ("late", RejectReason.QUEUE_TIMEOUT)
    ]


def test_an_expired_request_is_never_dispatched_even_if_advance_came_late() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1, queue_timeout_s=1.0), "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 0.0)
    effects = core.finish(RequestId("a"), Usage(), Outcome.COMPLETED, 5.0)
    assert dispatched(effects) == []
    assert rejected(effects) == [("b", RejectReason.QUEUE_TIMEOUT)]


def test_a_silent_replica_takes_nothing_until_it_is_heard_of_again() -> None:
    core = controller(PoolPolicy(stale_after_s=0.3), "r1")
    assert core.offer(ticket("a"), 0.3) == []
    assert dispatched(core.observe(view("r1", 2), 0.4)) == ["a"]


def test_an_old_snapshot_changes_nothing() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1")
    core.observe(view("r1", 5, running=1), 0.1)
    core.observe(view("r1", 4, running=0), 0.11)
    assert core.offer(ticket("a"), 0.12) == []


def test_work_of_other_routers_counts_until_a_snapshot_says_it_ended() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=3), "r1")
    core.offer(ticket("a"), 0.0)
    core.observe(view("r1", 2, running=2), 0.1)
    assert dispatched(core.offer(ticket("b"), 0.1)) == ["b"]
    assert core.offer(ticket("c"), 0.1) == []
    assert dispatched(core.observe(view("r1", 3, running=2), 0.2)) == ["c"]


def test_a_draining_replica_gets_no_new_work() -> None:
    core = controller(PoolPolicy(), "r1")
    core.observe(view("r1", 2, draining=True), 0.1)
    assert core.offer(ticket("a"), 0.1) == []


def test_an_engine_with_fewer_slots_than_the_policy_allows_is_not_overfilled() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=8))
    core.observe(view("r1", 1, slots=1), 0.0)
    core.offer(ticket("a"), 0.0)
    assert core.offer(ticket("b"), 0.0) == []


def test_a_failed_request_moves_to_another_replica_and_never_back() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1", "r2")
    [first] = core.offer(ticket("a"), 0.0)
    assert isinstance(first, Dispatch)
    [second] = core.fail(RequestId("a"), first.replicas[0], 0.1)
    assert isinstance(second, Dispatch)
    assert second.replicas == ("r2",)
    [third] = core.fail(RequestId("a"), ReplicaId("r2"), 0.2)
    assert isinstance(third, Reject)
    assert third.reason is RejectReason.NO_REPLICA
    assert third.retry_after_s is not None
    assert core.open_requests() == 0
    assert core.in_flight() == 0


def test_a_request_cut_after_tokens_goes_on_past_queue_and_retry_budget() -> None:
    """It was admitted once; a replica's streams are all cut together, more than any reserve."""
    policy = PoolPolicy(max_concurrency_per_replica=1, breaker=BreakerPolicy(retry_reserve=0.0))
    core = controller(policy, "r1", "r2")
    [first], [second] = (core.offer(ticket(name), 0.0) for name in "ab")
    assert isinstance(first, Dispatch)
    assert isinstance(second, Dispatch)
    assert core.offer(ticket("waits"), 0.0) == []
    lost, other = first.replicas[0], second.replicas[0]
    core.progress(lost, [(RequestId("a"), 40)], 0.1)
    core.forget(lost, 0.2)
    [moved] = core.fail(RequestId("a"), lost, 0.2)
    assert isinstance(moved, Dispatch)
    assert (moved.request_id, moved.replicas) == ("a", (other,))
    # Prompt and delivered tokens are computed again before the next one comes.
    [replica] = core.replicas(POOL)
    assert (replica.own, replica.own_uncached_prompt_tokens) == (2, 100 + 100 + 40)
    core.progress(other, [(RequestId("a"), 1)], 0.3)
    assert replica.own_uncached_prompt_tokens == 100
    core.finish(RequestId("a"), Usage(100, 0, 50), Outcome.COMPLETED, 0.4)
    core.finish(RequestId("b"), Usage(100, 0, 50), Outcome.COMPLETED, 0.4)
    core.cancel(RequestId("waits"), 0.5)
    assert (replica.own, replica.own_uncached_prompt_tokens, replica.own_present_tokens) == (
        0,
        0,
        0,
    )
    assert (replica.own_prompt_tokens, core.open_requests()) == (0, 0)


def test_a_client_whose_stream_was_cut_has_ignored_no_advice() -> None:
    """It was told by an event in its stream, which says nothing of when to come again."""
    core = controller(PoolPolicy(hold_without_replica_s=60.0), "r1")
    core.offer(ticket("cut"), 0.0)
    core.progress(ReplicaId("r1"), [(RequestId("cut"), 40)], 0.1)
    core.forget(ReplicaId("r1"), 0.2)
    effects = core.fail(RequestId("cut"), ReplicaId("r1"), 0.2)
    assert rejected(effects) == [("cut", RejectReason.NO_REPLICA)]
    again = [core.offer(ticket(f"again-{number}"), 0.4) for number in range(20)]
    assert [rejected(effects) for effects in again] == [[]] * 20, "they wait for a replica"


def test_all_that_a_lost_replica_held_goes_on_elsewhere_however_much_it_was() -> None:
    """Without a token too: answers that are not streamed have none before their end."""
    policy = PoolPolicy(max_concurrency_per_replica=200, prefill_knee_tokens=10**6)
    core = controller(policy, "r1", "r2")
    held: dict[str, str] = {}
    for number in range(200):
        for effect in core.offer(ticket(f"q{number}"), 0.0):
            if isinstance(effect, Dispatch):
                held[effect.request_id] = effect.replicas[0]
    lost = [name for name, replica in held.items() if replica == "r1"]
    assert len(lost) > 2 * policy.breaker.retry_reserve
    for name in lost:
        [moved] = core.fail(RequestId(name), ReplicaId("r1"), 0.1)[-1:]
        assert isinstance(moved, Dispatch)
        assert (moved.request_id, moved.replicas) == (name, ("r2",))
    assert core.open_requests() == len(held)


def test_a_request_that_failed_by_itself_takes_from_the_retry_budget() -> None:
    policy = PoolPolicy(breaker=BreakerPolicy(retry_reserve=0.0))
    core = controller(policy, "r1", "r2")
    [first] = core.offer(ticket("a"), 0.0)
    assert isinstance(first, Dispatch)
    effects = core.fail(RequestId("a"), first.replicas[0], 0.1, Failure.REQUEST)
    assert rejected(effects) == [("a", RejectReason.RETRY_BUDGET)]


def test_failing_a_request_that_filled_its_replica_lets_the_next_one_in() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 0.0)
    effects = core.fail(RequestId("a"), ReplicaId("r1"), 0.1)
    assert rejected(effects) == [("a", RejectReason.NO_REPLICA)]
    assert dispatched(effects) == ["b"]


def test_cancelling_a_dispatched_request_frees_its_slot_and_lets_the_next_one_in() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1")
    core.offer(ticket("a"), 0.0)
    assert core.offer(ticket("b"), 0.0) == []
    assert dispatched(core.cancel(RequestId("a"), 0.1)) == ["b"]
    assert core.cancel(RequestId("b"), 0.2) == []
    assert core.in_flight() == 0
    assert [each.in_flight for each in core.replicas(POOL)] == [0]


def test_a_slot_freed_beside_other_routers_work_lets_the_next_one_in() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=2), "r1")
    core.offer(ticket("a"), 0.0)
    core.observe(view("r1", 2, running=2), 0.1)
    assert core.offer(ticket("b"), 0.1) == []
    usage = Usage(100, 0, 50)
    assert dispatched(core.finish(RequestId("a"), usage, Outcome.COMPLETED, 0.2)) == ["b"]


def test_ending_an_unknown_request_has_no_effect() -> None:
    core = controller(PoolPolicy(), "r1")
    unknown = RequestId("nobody")
    assert core.finish(unknown, Usage(), Outcome.COMPLETED, 0.0) == []
    assert core.cancel(unknown, 0.0) == []
    assert core.fail(unknown, ReplicaId("r1"), 0.0) == []


def test_offering_an_open_id_again_is_a_bug_and_asserts() -> None:
    core = controller(PoolPolicy(), "r1")
    core.offer(ticket("a"), 0.0)
    with pytest.raises(AssertionError):
        core.offer(ticket("a"), 0.1)


def test_without_any_replica_requests_are_held_and_then_told_to_come_back() -> None:
    core = controller(PoolPolicy(hold_without_replica_s=5.0))
    assert core.offer(ticket("a"), 1.0) == []
    assert core.next_wakeup_s() == 6.0
    [effect] = core.advance(6.0)
    assert isinstance(effect, Reject)
    assert effect.reason is RejectReason.NO_REPLICA
    assert effect.retry_after_s is not None


def test_a_request_held_without_replica_goes_out_when_one_appears() -> None:
    core = controller(PoolPolicy())
    core.offer(ticket("a"), 1.0)
    assert dispatched(core.observe(view("r1", 1), 4.0)) == ["a"]


def test_losing_the_last_replica_starts_the_hold_and_keeps_what_runs() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1, early_rejection=False), "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 0.0)
    assert core.forget(ReplicaId("r1"), 2.0) == []
    assert core.next_wakeup_s() == 7.0
    assert core.in_flight(POOL) == 1
    core.finish(RequestId("a"), Usage(), Outcome.COMPLETED, 3.0)
    assert core.in_flight(POOL) == 0
    assert rejected(core.advance(7.0)) == [("b", RejectReason.NO_REPLICA)]


def test_a_replica_never_forgotten_but_long_silent_is_dropped() -> None:
    core = controller(PoolPolicy(lost_after_s=10.0, hold_without_replica_s=0.0), "r1")
    core.offer(ticket("a"), 9.0)
    assert rejected(core.advance(10.0)) == [("a", RejectReason.NO_REPLICA)]


def test_tokens_from_a_fallback_move_the_load_there() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1", "r2")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 0.0)
    core.finish(RequestId("b"), Usage(), Outcome.COMPLETED, 0.1)
    core.progress(ReplicaId("r2"), [(RequestId("a"), 1)], 0.1)
    [effect] = core.offer(ticket("c"), 0.1)
    assert isinstance(effect, Dispatch)
    assert effect.replicas == ("r1",)


def test_unknown_pool_is_refused_without_retry_advice() -> None:
    core = controller(PoolPolicy(), "r1")
    [effect] = core.offer(ticket("a", pool="nope"), 0.0)
    assert isinstance(effect, Reject)
    assert (effect.reason, effect.retry_after_s) == (RejectReason.UNKNOWN_POOL, None)


def test_a_removed_pool_drains_its_queue_and_takes_no_offers() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 0.0)
    assert core.configure({}, 0.1) == []
    assert rejected(core.offer(ticket("c"), 0.1)) == [("c", RejectReason.UNKNOWN_POOL)]
    assert dispatched(core.finish(RequestId("a"), Usage(), Outcome.COMPLETED, 0.2)) == ["b"]
    core.finish(RequestId("b"), Usage(), Outcome.COMPLETED, 0.25)
    assert core.open_requests() == 0
    assert core.observe(view("r1", 9), 0.3) == []


def test_a_smaller_queue_keeps_who_waits_and_refuses_who_comes() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1, queue_capacity=3), "r1")
    for name in "abcd":
        core.offer(ticket(name), 0.0)
    assert (
        core.configure({POOL: PoolPolicy(max_concurrency_per_replica=1, queue_capacity=1)}, 0.1)
        == []
    )
    assert core.queue_depth(POOL) == 3
    assert rejected(core.offer(ticket("e"), 0.1)) == [("e", RejectReason.QUEUE_FULL)]


def test_a_higher_cap_dispatches_at_once() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1), "r1")
    core.offer(ticket("a"), 0.0)
    core.offer(ticket("b"), 0.0)
    effects = core.configure({POOL: PoolPolicy(max_concurrency_per_replica=2)}, 0.1)
    assert dispatched(effects) == ["b"]


def test_time_running_backwards_neither_expires_nor_revives_anything() -> None:
    core = controller(PoolPolicy(max_concurrency_per_replica=1, queue_timeout_s=1.0), "r1")
    core.offer(ticket("a"), 0.2)
    core.offer(ticket("b"), 0.1)
    assert core.next_wakeup_s() == pytest.approx(1.2)
    assert core.advance(-50.0) == []
    assert rejected(core.advance(1e9)) == [("b", RejectReason.QUEUE_TIMEOUT)]
