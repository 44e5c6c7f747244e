"""Several routers over the same replicas: what they tell each other, and what that prevents."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.controller import Controller
from serve_app.core.exchange import (
    ALONE,
    EVEN_RATIO,
    EXCHANGE_PERIOD_S,
    PEER_LOST_S,
    Digest,
    Part,
    Peers,
    PoolDigest,
    RouterId,
    TenantWaiting,
    divided,
    over_admission_most,
)
from serve_app.core.policy import PoolPolicy
from serve_app.core.types import (
    Dispatch,
    Effect,
    KeyId,
    Outcome,
    PoolName,
    PriorityClass,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)
from tests.properties import examples

POOL = PoolName("chat")
CRITICAL, STANDARD, SHEDDABLE = PriorityClass
ROUTERS = [RouterId(name) for name in ("a", "b", "c")]


class Fleet:
    """Routers that share replicas, and what each replica really has in flight."""

    def __init__(self, policy: PoolPolicy, routers: int = 2, replicas: int = 1) -> None:
        self.cores = [Controller(router=RouterId(f"router-{place}")) for place in range(routers)]
        self.replicas = [ReplicaId(f"r{place}") for place in range(replicas)]
        self.running: dict[RequestId, tuple[int, ReplicaId]] = {}
        self.sequence = 0
        self.number = 0
        for core in self.cores:
            core.configure({POOL: policy}, 0.0)
        self.exchange(0.0)
        self.snapshot(0.0)

    def take(self, router: int, effects: list[Effect]) -> list[str]:
        sent = [each for each in effects if isinstance(each, Dispatch)]
        for each in sent:
            self.running[each.request_id] = (router, each.replicas[0])
        return [each.request_id for each in sent]

    def offer(
        self,
        router: int,
        now_s: float,
        *,
        tenant: str = "t",
        priority_class: PriorityClass = STANDARD,
        prompt: int = 10,
        output: int = 10,
    ) -> RequestId:
        self.number += 1
        name = RequestId(f"{self.number}")
        ticket = Ticket(name, POOL, TenantId(tenant), KeyId(tenant), priority_class, prompt, output)
        self.take(router, self.cores[router].offer(ticket, now_s))
        return name

    def finish(self, name: RequestId, now_s: float, output: int = 10) -> list[str]:
        router, _ = self.running.pop(name)
        usage = Usage(10, 0, output)
        return self.take(router, self.cores[router].finish(name, usage, Outcome.COMPLETED, now_s))

    def snapshot(self, now_s: float) -> list[str]:
        sent = []
        self.sequence += 1
        for replica in self.replicas:
            running = sum(at == replica for _, at in self.running.values())
            view = ReplicaView(replica, POOL, self.sequence, 256, running, 0, 0.0, 400_000)
            for place, core in enumerate(self.cores):
                sent += self.take(place, core.observe(view, now_s))
        return sent

    def exchange(self, now_s: float) -> list[str]:
        sent = []
        digests = [core.digest(now_s) for core in self.cores]
        for place, core in enumerate(self.cores):
            for other, digest in enumerate(digests):
                if other != place:
                    sent += self.take(place, core.hear(digest, now_s))
        return sent

    def held(self, replica: int = 0) -> int:
        return sum(at == self.replicas[replica] for _, at in self.running.values())


def patient(slots: int, **changes: object) -> PoolPolicy:
    policy = PoolPolicy(
        max_concurrency_per_replica=slots,
        critical_reserve_ratio=0.0,
        sheddable_share_ratio=1.0,
        sparse_headroom_ratio=0.0,
        early_rejection=False,
        stale_after_s=60.0,
    )
    return replace(policy, **changes)


def waiting(tenant: str, backlog: float, weight: float = 1.0) -> PoolDigest:
    told = TenantWaiting(TenantId(tenant), weight, backlog)
    return PoolDigest(waiting=((), (told,), ()))


@given(
    st.integers(-500, 500),
    st.lists(st.floats(0.01, 1.0), min_size=2, max_size=6),
    st.integers(0, 10_000),
)
def test_parts_of_free_places_add_up_to_all_of_them(
    free: int, widths: list[float], sequence: int
) -> None:
    bounds = [0.0]
    for width in widths:
        bounds.append(bounds[-1] + width / sum(widths))
    bounds[-1] = 1.0
    parts = [Part(low, high) for low, high in pairwise(bounds)]
    places = [divided(free, part, ReplicaId("r0"), sequence) for part in parts]
    assert sum(places) == free
    for part, place in zip(parts, places, strict=True):
        assert abs(place - free * part.width) < 2


def test_single_places_go_round_between_routers() -> None:
    parts = [Part(0.0, 0.5), Part(0.5, 1.0)]
    turns = [
        [divided(1, part, ReplicaId("r0"), sequence) for part in parts] for sequence in range(200)
    ]
    assert 70 < sum(turn[0] for turn in turns) < 130
    assert all(sum(turn) == 1 for turn in turns)


def test_parts_follow_the_weight_of_who_waits_and_leave_newcomers_room() -> None:
    digests = {
        ROUTERS[0]: waiting("ann", 100.0, weight=3.0),
        ROUTERS[1]: waiting("bob", 9_000.0),
        ROUTERS[2]: PoolDigest(),
    }
    widths = []
    for router in ROUTERS:
        peers = Peers(router)
        for other, digest in digests.items():
            if other != router:
                peers.hear(other, digest, 0.0)
        peers.told(digests[router])
        widths.append(peers.part.width)
    even = EVEN_RATIO / 3
    assert widths == pytest.approx([even + 0.75 * 0.75, even + 0.75 * 0.25, even])


def test_a_tenant_that_waits_at_two_routers_counts_once() -> None:
    peers = Peers(ROUTERS[0])
    peers.told(waiting("ann", 300.0))
    peers.hear(ROUTERS[1], waiting("ann", 100.0), 0.0)
    assert peers.part.width == pytest.approx(EVEN_RATIO / 2 + (1 - EVEN_RATIO) * 0.75)


def test_parts_go_by_the_most_important_class_that_waits() -> None:
    peers = Peers(ROUTERS[0])
    peers.told(PoolDigest(waiting=((TenantWaiting(TenantId("ann"), 1.0, 1.0),), (), ())))
    peers.hear(ROUTERS[1], waiting("bob", 1e6), 0.0)
    assert peers.part.width == pytest.approx(EVEN_RATIO / 2 + (1 - EVEN_RATIO))


def test_a_silent_router_is_taken_for_dead_and_its_part_shared_out() -> None:
    peers = Peers(ROUTERS[0])
    peers.hear(ROUTERS[1], PoolDigest(requests=(0, 5, 0)), 1.0)
    assert peers.part.width == pytest.approx(0.5)
    assert not peers.expire(1.0 + PEER_LOST_S - 0.01)
    assert peers.expire(1.0 + PEER_LOST_S)
    assert peers.part is ALONE
    assert peers.held().requests == (0, 0, 0)


def test_a_router_that_stood_still_takes_nobody_for_dead() -> None:
    """Busy for two seconds it would find itself alone, and take what all others hold."""
    fleet = Fleet(patient(9), routers=3)
    first, second, _ = fleet.cores
    peers = first._pools[POOL].peers
    fleet.exchange(0.25)
    first.advance(2.25)
    assert peers.part.width == pytest.approx(1 / 3)
    for at_s in (2.5, 2.75):
        first.hear(second.digest(at_s), at_s)
        first.advance(at_s)
        assert peers.part.width == pytest.approx(1 / 3)
    first.hear(second.digest(3.0), 3.0)
    first.advance(0.25 + 2.0 + PEER_LOST_S)
    assert peers.part.width == pytest.approx(1 / 2), "the third has been silent, asleep or not"


def test_routers_on_the_same_digests_never_overfill_a_replica() -> None:
    fleet = Fleet(patient(10), routers=3)
    for number in range(60):
        fleet.offer(number % 3, 0.0)
    assert fleet.held() == 10
    for turn in range(1, 40):
        now_s = turn * 0.1
        for name in list(fleet.running)[:3]:
            fleet.finish(name, now_s)
        fleet.snapshot(now_s)
        assert fleet.held() <= 10
        for number in range(3):
            fleet.offer(number, now_s)
        assert fleet.held() <= 10
    assert fleet.held() == 10


OPERATION = st.sampled_from(["offer", "offer", "offer", "finish", "cancel", "snapshot", "exchange"])


@examples(60)
@given(st.lists(st.tuples(OPERATION, st.integers(0, 2), st.integers(0, 2)), max_size=120))
def test_whatever_happens_routers_together_stay_within_the_caps_and_lose_nothing(
    operations: list[tuple[str, int, int]],
) -> None:
    fleet = Fleet(patient(3, queue_timeout_s=1e6), routers=3, replicas=2)
    offered = 0
    for turn, (operation, router, choice) in enumerate(operations):
        now_s = turn * 0.01
        if operation == "offer":
            fleet.offer(router, now_s, tenant=f"t{choice}", priority_class=PriorityClass(choice))
            offered += 1
        elif operation == "finish" and fleet.running:
            fleet.finish(list(fleet.running)[choice % len(fleet.running)], now_s)
            offered -= 1
        elif operation == "cancel" and fleet.running:
            name = list(fleet.running)[choice % len(fleet.running)]
            at, _ = fleet.running.pop(name)
            fleet.take(at, fleet.cores[at].cancel(name, now_s))
            offered -= 1
        elif operation == "snapshot":
            fleet.snapshot(now_s)
        elif operation == "exchange":
            fleet.exchange(now_s)
        assert all(fleet.held(place) <= 3 for place in range(2))
        assert sum(core.open_requests() for core in fleet.cores) == offered
        assert sum(core.in_flight() for core in fleet.cores) == len(fleet.running)
    # Nobody waits for ever: once routers hear of each other, all places fill again.
    end_s = len(operations) * 0.01
    for round_ in range(40):
        fleet.exchange(end_s + round_ * 0.01)
        fleet.snapshot(end_s + round_ * 0.01)
    assert len(fleet.running) == min(6, offered)


def test_a_replica_shown_full_is_never_overfilled_by_routers_that_disagree() -> None:
    fleet = Fleet(patient(4), routers=2)
    for _ in range(4):
        fleet.offer(0, 0.0)
    fleet.snapshot(0.1)
    # Router 1 hears that router 0 died; the replica's snapshot still shows what it holds.
    for at_s in (0.25, 0.5, PEER_LOST_S):
        fleet.cores[1].advance(at_s)
    for _ in range(8):
        fleet.offer(1, PEER_LOST_S)
    assert fleet.held() == 4


def test_the_bound_on_over_admission_is_nothing_on_a_full_replica_but_rounding() -> None:
    assert over_admission_most(0, 3) == 3
    assert over_admission_most(40, 1) == 1
    assert over_admission_most(40, 3) == (1 - EVEN_RATIO) * 2 * 40 + 3


def test_what_others_hold_counts_against_the_reserve() -> None:
    fleet = Fleet(patient(10, critical_reserve_ratio=0.5), routers=2)
    for _ in range(6):
        fleet.offer(0, 0.0)
    assert fleet.held() == 5
    fleet.exchange(EXCHANGE_PERIOD_S)
    fleet.snapshot(EXCHANGE_PERIOD_S)
    fleet.offer(1, 0.3)
    assert fleet.held() == 5
    fleet.offer(1, 0.3, priority_class=CRITICAL)
    assert fleet.held() == 6


def test_sheddable_waits_while_critical_waits_at_another_router() -> None:
    fleet = Fleet(patient(2, queue_timeout_s=60.0), routers=2)
    first = fleet.offer(0, 0.0)
    second = fleet.offer(1, 0.0)
    fleet.snapshot(0.01)
    critical = fleet.offer(0, 0.02, priority_class=CRITICAL)
    sheddable = fleet.offer(1, 0.02, priority_class=SHEDDABLE)
    assert len(fleet.running) == 2
    fleet.exchange(EXCHANGE_PERIOD_S)
    # Router 1's own place comes free and stays so, for router 0 to take at a snapshot.
    assert fleet.finish(second, 0.26) == []
    assert critical in [*fleet.snapshot(0.27), *fleet.snapshot(0.28), *fleet.snapshot(0.29)]
    assert fleet.finish(first, 0.3) == []
    sent = fleet.exchange(2 * EXCHANGE_PERIOD_S)
    for turn in range(8):
        sent += fleet.snapshot(0.51 + turn / 100)
    assert sheddable in sent


def test_critical_kept_by_its_own_tenants_cap_does_not_hold_others_up() -> None:
    fleet = Fleet(patient(4, tenant_concurrency_ratio=0.25), routers=2)
    fleet.offer(0, 0.0, tenant="ann", priority_class=CRITICAL)
    fleet.offer(0, 0.0, tenant="bob")
    fleet.offer(0, 0.0, tenant="ann", priority_class=CRITICAL)
    fleet.exchange(EXCHANGE_PERIOD_S)
    name = fleet.offer(1, 0.3, tenant="cyd", priority_class=SHEDDABLE)
    assert name in fleet.running


def test_service_elsewhere_counts_for_a_tenants_turn() -> None:
    fleet = Fleet(patient(1, queue_timeout_s=60.0), routers=2)
    running = fleet.offer(0, 0.0, tenant="cyd")
    ann = fleet.offer(0, 0.0, tenant="ann")
    bob = fleet.offer(0, 0.0, tenant="bob")
    # Ann, first in line here, is served at a third router meanwhile.
    served = PoolDigest(served=((), ((TenantId("ann"), 5_000.0),), ()))
    fleet.cores[0].hear(Digest(RouterId("third"), 1, {POOL: served}), 0.1)
    assert fleet.finish(running, 0.3) == [bob]
    assert fleet.finish(bob, 0.4) == [ann]


def test_a_tenants_share_is_of_what_it_holds_everywhere() -> None:
    policy = patient(8, tenant_concurrency_ratio=0.5)
    fleet = Fleet(policy, routers=2)
    for _ in range(4):
        fleet.offer(0, 0.0, tenant="ann")
    fleet.offer(1, 0.0, tenant="bob")
    fleet.exchange(EXCHANGE_PERIOD_S)
    fleet.snapshot(0.26)
    names = [fleet.offer(1, 0.3, tenant="ann") for _ in range(2)]
    assert names[0] in fleet.running  # one is always allowed
    assert names[1] not in fleet.running


def test_old_and_own_digests_change_nothing() -> None:
    fleet = Fleet(patient(2), routers=2)
    first = fleet.cores[0].digest(1.0)
    fleet.offer(0, 1.0, priority_class=CRITICAL)
    second = fleet.cores[0].digest(1.1)
    fleet.cores[1].hear(second, 1.1)
    fleet.cores[1].hear(first, 1.2)
    assert fleet.cores[0].hear(second, 1.2) == []
    (known,) = fleet.cores[1]._pools[POOL].peers._digests.values()
    assert known.requests == (1, 0, 0)


def test_sheddable_held_for_a_router_that_died_wakes_up() -> None:
    fleet = Fleet(patient(1, queue_timeout_s=60.0), routers=2)
    fleet.offer(0, 0.0)
    fleet.offer(0, 0.0, priority_class=CRITICAL)
    sheddable = fleet.offer(1, 0.0, priority_class=SHEDDABLE)
    fleet.exchange(EXCHANGE_PERIOD_S)
    # Router 0 dies, and the engine drops what it ran.
    fleet.running.clear()
    fleet.snapshot(0.3)
    assert sheddable not in fleet.running
    due_s = fleet.cores[1].next_wakeup_s()
    assert due_s == pytest.approx(EXCHANGE_PERIOD_S + PEER_LOST_S)
    for at_s in (0.5, 0.75, due_s):
        fleet.take(1, fleet.cores[1].advance(at_s))
    fleet.snapshot(due_s + 0.01)
    assert sheddable in fleet.running


def test_what_is_told_of_tenants_is_bounded() -> None:
    fleet = Fleet(patient(256), routers=2)
    fleet.cores[0].digest(0.0)
    for number in range(3_000):
        name = fleet.offer(0, 0.01, tenant=f"tenant-{number}")
        if name in fleet.running:
            fleet.finish(name, 0.01)
    (digest,) = fleet.cores[0].digest(0.2).pools.values()
    assert all(len(served) <= 1024 for served in digest.served)
    assert all(len(told) <= 1024 for told in digest.waiting)
    assert fleet.cores[0].digest(0.3).pools[POOL].served == ((), (), ())
