"""The fair queue: whose turn it is, what it costs, and what idling or splitting earns."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.entry import Entry
from serve_app.core.fair_queue import FairQueue, usable_weight
from serve_app.core.policy import FairnessPolicy
from serve_app.core.types import (
    KeyId,
    PoolName,
    PriorityClass,
    RequestId,
    TenantId,
    Ticket,
)
from tests.properties import examples

POOL = PoolName("chat")


class Orders:
    """Makes entries with growing order."""

    def __init__(self) -> None:
        self.count = 0

    def entry(self, tenant: str, cost: float, weight: float = 1.0) -> Entry:
        self.count += 1
        ticket = Ticket(
            RequestId(f"{tenant}{self.count}"),
            POOL,
            TenantId(tenant),
            KeyId("k"),
            PriorityClass.STANDARD,
            1,
            1,
            weight=weight,
        )
        entry = Entry(ticket, POOL, 1, TenantId(tenant), self.count)
        entry.cost = entry.charged = cost
        return entry


def serve(queue: FairQueue, now_s: float = 0.0) -> Entry:
    entry = queue.head()
    assert entry is not None
    queue.take(entry, now_s)
    return entry


def served_order(queue: FairQueue) -> list[str]:
    order = []
    while len(queue):
        order.append(str(serve(queue).flow))
    return order


def test_heavier_tenants_small_requests_all_run_before_the_second_large_one() -> None:
    """A (weight 2, 500 in, 300 out) against B (weight 1, 8000 in, 400 out), w_out = 2."""
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    for _ in range(2):
        queue.push(orders.entry("b", 8000 + 2 * 400), 0.0)
    for _ in range(4):
        queue.push(orders.entry("a", 500 + 2 * 300, weight=2.0), 0.0)
    assert served_order(queue) == ["b", "a", "a", "a", "a", "b"]


def test_one_tenants_requests_keep_their_order() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    entries = [orders.entry("a", cost) for cost in (5.0, 1.0, 9.0)]
    for entry in entries:
        queue.push(entry, 0.0)
    assert [serve(queue) for _ in entries] == entries


def test_returning_tenant_cannot_cash_in_idle_time() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    for _ in range(20):
        queue.push(orders.entry("busy", 100.0), 0.0)
    for _ in range(10):
        serve(queue)
    for _ in range(10):
        queue.push(orders.entry("late", 100.0), 60.0)
    order = served_order(queue)
    assert abs(order[:10].count("late") - 5) <= 1


def test_idle_pool_leaves_no_credit_to_whoever_comes_next() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    for _ in range(50):
        queue.serve_at_once(orders.entry("early", 100.0), 0.0)
    for _ in range(6):
        queue.push(orders.entry("new", 100.0), 0.0)
        queue.push(orders.entry("early", 100.0), 0.0)
    order = served_order(queue)
    assert order[:8].count("new") <= 5


def test_debt_is_remembered_while_away_and_halves_per_half_life() -> None:
    queue, orders = FairQueue(FairnessPolicy(debt_half_life_s=60.0)), Orders()
    queue.serve_at_once(orders.entry("a", 8000.0), 0.0)
    assert queue.debt(TenantId("a"), 0.0) == pytest.approx(8000.0)
    assert queue.debt(TenantId("a"), 60.0) == pytest.approx(4000.0)
    assert queue.debt(TenantId("a"), 180.0) == pytest.approx(1000.0)


def test_tenant_that_comes_back_in_debt_waits_until_others_caught_up() -> None:
    queue, orders = FairQueue(FairnessPolicy(debt_half_life_s=60.0)), Orders()
    queue.serve_at_once(orders.entry("a", 40.0), 0.0)
    for _ in range(6):
        queue.push(orders.entry("b", 10.0), 0.0)
        queue.push(orders.entry("a", 10.0), 0.0)
    assert served_order(queue)[:4] == ["b", "b", "b", "b"]


def test_reconciling_upwards_delays_the_tenant() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    for _ in range(3):
        queue.push(orders.entry("a", 10.0), 0.0)
        queue.push(orders.entry("b", 10.0), 0.0)
    underestimated = serve(queue)
    assert underestimated.flow == "a"
    queue.charge(underestimated, 15.0, 1.0)
    assert served_order(queue) == ["b", "b", "b", "a", "a"]


def test_refund_to_a_tenant_that_is_away_is_no_credit() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    entry = orders.entry("a", 100.0)
    queue.serve_at_once(entry, 0.0)
    queue.charge(entry, -1000.0, 0.0)
    assert queue.debt(TenantId("a"), 0.0) == 0.0
    for _ in range(4):
        queue.push(orders.entry("a", 10.0), 0.0)
        queue.push(orders.entry("b", 10.0), 0.0)
    assert served_order(queue)[:4].count("a") == 2


def test_splitting_a_request_gains_nothing() -> None:
    fixed = FairnessPolicy().request_cost
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    queue.push(orders.entry("whole", fixed + 10_000.0), 0.0)
    queue.push(orders.entry("whole", fixed + 10_000.0), 0.0)
    for _ in range(100):
        queue.push(orders.entry("split", fixed + 100.0), 0.0)
    order = served_order(queue)
    assert order.index("whole", 1) <= 100
    assert order[-1] == "split"


def test_capped_tenant_does_not_save_up_turns() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    capped = orders.entry("capped", 10.0)
    queue.push(capped, 0.0)
    for _ in range(5):
        queue.push(orders.entry("capped", 10.0), 0.0)
    for _ in range(20):
        queue.push(orders.entry("other", 10.0), 0.0)
    for _ in range(10):
        other = next(each for each in queue.heads(2) if each.flow == "other")
        queue.take(other, 0.0)
        queue.forfeit(capped)
    assert served_order(queue)[:6].count("capped") <= 4


def test_cancelling_leaves_counters_and_others_alone() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    gone = orders.entry("a", 10.0)
    queue.push(gone, 0.0)
    kept = orders.entry("b", 10.0)
    queue.push(kept, 0.0)
    queue.discard(gone, 0.0)
    assert len(queue) == 1
    assert queue.backlog == pytest.approx(10.0)
    assert serve(queue) is kept
    assert queue.debt(TenantId("a"), 0.0) == 0.0


@pytest.mark.parametrize("weight", [0.0, -3.0, math.nan, -math.inf])
def test_unusable_weights_are_served_last_but_served(weight: float) -> None:
    assert usable_weight(weight) == 0.001
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    for _ in range(3):
        queue.push(orders.entry("odd", 10.0, weight=weight), 0.0)
        queue.push(orders.entry("even", 10.0), 0.0)
    assert served_order(queue) == ["odd", "even", "even", "even", "odd", "odd"]


def test_ten_thousand_passing_tenants_leave_bounded_tables() -> None:
    queue, orders = FairQueue(FairnessPolicy(tenants_max=100)), Orders()
    for number in range(10_000):
        queue.serve_at_once(orders.entry(f"t{number}", 1000.0), number * 0.006)
        assert queue.tenants <= 101
    for number in range(500):
        queue.push(orders.entry(f"u{number}", 1000.0), 60.0)
    while len(queue):
        serve(queue, 61.0)
    assert queue.tenants <= 101


def test_wait_of_a_small_tenant_does_not_count_the_flooders_backlog() -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    for _ in range(100):
        queue.push(orders.entry("flood", 1000.0), 0.0)
    assert queue.wait_s(TenantId("flood"), 1.0, 1000.0, 0.0) == pytest.approx(100.0)
    assert queue.wait_s(TenantId("small"), 1.0, 1000.0, 0.0) < 2.0


def test_sparse_is_who_has_little_waiting_and_owes_little() -> None:
    queue, orders = FairQueue(FairnessPolicy(sparse_cost=100.0)), Orders()
    assert queue.is_sparse(TenantId("new"), 0.0)
    queue.push(orders.entry("a", 60.0), 0.0)
    assert queue.is_sparse(TenantId("a"), 0.0)
    queue.push(orders.entry("a", 60.0), 0.0)
    assert not queue.is_sparse(TenantId("a"), 0.0)
    queue.serve_at_once(orders.entry("b", 500.0), 0.0)
    assert not queue.is_sparse(TenantId("b"), 0.0)


costs = st.floats(1.0, 1000.0)


@examples(200)
@given(
    backlogs=st.dictionaries(
        st.sampled_from("abcde"),
        st.tuples(st.floats(0.1, 10.0), st.lists(costs, min_size=1, max_size=20)),
        min_size=2,
    )
)
def test_service_gap_between_waiting_tenants_is_bounded(
    backlogs: dict[str, tuple[float, list[float]]],
) -> None:
    """While two tenants both wait, service over weight differs by the largest cost at most."""
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    for tenant, (weight, requests) in backlogs.items():
        for cost in requests:
            queue.push(orders.entry(tenant, cost, weight=weight), 0.0)
    largest = max(max(requests) / weight for weight, requests in backlogs.values())
    served = dict.fromkeys(backlogs, 0.0)
    while len(queue):
        entry = serve(queue)
        served[entry.flow] += entry.cost / backlogs[entry.flow][0]
        waiting = [name for name in backlogs if queue.waiting_of(TenantId(name))]
        if len(waiting) > 1:
            levels = [served[name] for name in waiting]
            assert max(levels) - min(levels) <= largest + 1e-6


@examples(150)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["push", "serve", "cancel", "charge", "direct"]),
            st.sampled_from("abc"),
            costs,
        ),
        max_size=80,
    )
)
def test_backlog_and_length_always_agree_with_what_waits(
    steps: list[tuple[str, str, float]],
) -> None:
    queue, orders = FairQueue(FairnessPolicy()), Orders()
    waiting: list[Entry] = []
    served: list[Entry] = []
    for now_s, (action, tenant, cost) in enumerate(steps):
        if action == "push":
            waiting.append(orders.entry(tenant, cost))
            queue.push(waiting[-1], now_s)
        elif action == "serve" and waiting:
            served.append(serve(queue, now_s))
            waiting.remove(served[-1])
        elif action == "cancel" and waiting:
            queue.discard(waiting.pop(len(waiting) // 2), now_s)
        elif action == "charge" and served:
            queue.charge(served.pop(), cost - 500.0, now_s)
        elif action == "direct" and not queue.waiting_of(TenantId(tenant)):
            served.append(orders.entry(tenant, cost))
            queue.serve_at_once(served[-1], now_s)
        assert len(queue) == len(waiting)
        assert queue.backlog == pytest.approx(sum(entry.cost for entry in waiting), abs=1e-6)
        assert (queue.head() is None) == (not waiting)
        assert {entry.flow for entry in queue.heads(9)} == {entry.flow for entry in waiting}
