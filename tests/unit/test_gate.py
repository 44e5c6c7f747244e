"""The shell around the core: waiting, holding, moving and ending, on a real controller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from serve_app.core.controller import Controller, RoutingPolicy, least_loaded
from serve_app.core.policy import PoolPolicy, arrival_order
from serve_app.core.routing import RoutingSettings
from serve_app.core.types import (
    KeyId,
    Notice,
    Outcome,
    PoolName,
    PriorityClass,
    RejectReason,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)
from serve_app.gate import Gate, Lease, Refused

POOL = PoolName("chat")


class Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Place:
    """One request in a task of its own, holding its place until ``leave`` is called."""

    def __init__(self, gate: Gate, name: str) -> None:
        self._gate = gate
        self._name = name
        self._done = asyncio.Event()
        self.lease: Lease | None = None
        self.refused: Refused | None = None
        self.task = asyncio.create_task(self._hold())

    async def _hold(self) -> None:
        try:
            async with self._gate.place(ticket(self._name)) as lease:
                self.lease = lease
                await self._done.wait()
                lease.settle(Usage(10, 0, 5))
        except Refused as refused:
            self.refused = refused

    async def leave(self) -> None:
        self._done.set()
        await self.task

    async def abandon(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


def ticket(name: str, pool: PoolName = POOL) -> Ticket:
    return Ticket(
        request_id=RequestId(name),
        pool=pool,
        tenant=TenantId("t"),
        key=KeyId("k"),
        priority_class=PriorityClass.CRITICAL,
        prompt_tokens=100,
        max_tokens=50,
    )


def view(name: str, sequence: int = 1) -> ReplicaView:
    return ReplicaView(
        replica=ReplicaId(name),
        pool=POOL,
        sequence=sequence,
        slots=256,
        running=0,
        waiting=0,
        kv_usage_ratio=0.0,
        kv_tokens_capacity=400_000,
    )


def gate(
    *replicas: str,
    clock: Callable[[], float] | None = None,
    notices: list[Notice] | None = None,
    concurrency: int = 1,
    queue_capacity: int = 8,
    **policy: float,
) -> Gate:
    """Return a gate to a pool that serves in order of arrival: nothing else decides here."""
    seen: list[Notice] = [] if notices is None else notices
    made = Gate(Controller(), clock or asyncio.get_running_loop().time, seen.append)
    settings = PoolPolicy(
        max_concurrency_per_replica=concurrency,
        queue_capacity=queue_capacity,
        stale_after_s=50.0,
        **policy,  # type: ignore[arg-type]
    )
    made.configure({POOL: arrival_order(settings)})
    for name in replicas:
        made.observe(view(name))
    return made


async def settled() -> None:
    """Let every task run until it waits for something that is not ready."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_request_gets_a_place_and_leaves_none_behind() -> None:
    made = gate("r1")
    async with made.place(ticket("a")) as lease:
        assert lease.replica == "r1"
        assert (made.in_flight(POOL), made.open_requests()) == (1, 1)
        lease.settle(Usage(10, 0, 5))
    assert lease.outcome is Outcome.COMPLETED
    assert (made.in_flight(POOL), made.open_requests()) == (0, 0)


async def test_a_waiting_request_is_placed_when_another_ends() -> None:
    made = gate("r1")
    first, second = Place(made, "a"), Place(made, "b")
    await settled()
    assert first.lease is not None
    assert second.lease is None
    assert made.queue_depth(POOL) == 1
    await first.leave()
    await settled()
    assert second.lease is not None
    await second.leave()
    assert made.open_requests() == 0


async def test_only_a_wait_is_surrounded_and_no_longer_than_it_lasts() -> None:
    made = gate("r1")
    said: list[str] = []

    @asynccontextmanager
    async def waiting() -> AsyncIterator[None]:
        said.append("begins")
        try:
            yield
        finally:
            said.append("ends")

    async def ask(name: str) -> None:
        async with made.place(ticket(name), waiting):
            said.append(f"{name} has its place")

    async with made.place(ticket("a"), waiting):
        assert said == [], "the place was there at once"
        asked = asyncio.create_task(ask("b"))
        await settled()
        assert said == ["begins"]
    await asked
    assert said == ["begins", "ends", "b has its place"]
    assert made.open_requests() == 0


async def test_a_wait_that_is_given_up_leaves_nothing_behind() -> None:
    made = gate("r1")

    @asynccontextmanager
    async def waiting() -> AsyncIterator[None]:
        async with asyncio.timeout(0):
            yield

    held = Place(made, "a")
    await settled()
    with pytest.raises(TimeoutError):
        async with made.place(ticket("b"), waiting):
            pytest.fail("there is no room")
    assert made.open_requests() == 1
    await held.leave()


async def test_a_full_queue_refuses() -> None:
    made = gate("r1", queue_capacity=1)
    held = [Place(made, name) for name in "ab"]
    await settled()
    with pytest.raises(Refused) as caught:
        async with made.place(ticket("c")):
            pytest.fail("there is no room")
    assert caught.value.reject.reason is RejectReason.QUEUE_FULL
    assert made.open_requests() == 2
    for place in held:
        await place.leave()
    assert made.open_requests() == 0


async def test_an_unknown_pool_is_refused() -> None:
    made = gate("r1")
    with pytest.raises(Refused) as caught:
        async with made.place(ticket("a", PoolName("other"))):
            pytest.fail("there is no such pool")
    assert caught.value.reject.reason is RejectReason.UNKNOWN_POOL
    assert made.open_requests() == 0


async def test_a_client_that_leaves_while_waiting_gives_its_place_up() -> None:
    made = gate("r1")
    first, second, third = (Place(made, name) for name in "abc")
    await settled()
    await second.abandon()
    assert made.queue_depth(POOL) == 1
    await first.leave()
    await settled()
    assert third.lease is not None
    await third.leave()
    assert made.open_requests() == 0


async def test_a_client_that_leaves_while_served_frees_its_slot_at_once() -> None:
    made = gate("r1")
    first, second = Place(made, "a"), Place(made, "b")
    await settled()
    await first.abandon()
    assert first.lease is not None
    assert first.lease.outcome is Outcome.CANCELLED
    await settled()
    assert second.lease is not None
    await second.leave()
    assert made.open_requests() == 0


async def test_a_completed_request_stays_completed_if_its_client_leaves_afterwards() -> None:
    made = gate("r1")
    with pytest.raises(asyncio.CancelledError):  # noqa: PT012  # leaving the block is what raises
        async with made.place(ticket("a")) as lease:
            lease.settle(Usage(10, 0, 5))
            raise asyncio.CancelledError
    assert lease.outcome is Outcome.COMPLETED
    assert made.open_requests() == 0


async def test_an_exception_in_the_block_is_no_fault_of_the_replica_and_frees_its_slot() -> None:
    made = gate("r1")
    with pytest.raises(KeyError):
        async with made.place(ticket("a")) as lease:
            raise KeyError
    assert lease.outcome is Outcome.CANCELLED
    assert made.open_requests() == 0


async def test_a_client_that_leaves_in_the_moment_of_its_dispatch_leaks_nothing() -> None:
    made = gate("r1")
    async with made.place(ticket("a")) as lease:
        second = Place(made, "b")
        await settled()
        lease.settle(Usage())
    # Leaving the block dispatched the second, whose task has not run since.
    assert made.in_flight(POOL) == 1
    await second.abandon()
    assert second.lease is None
    assert made.open_requests() == 0


async def test_a_failed_replica_is_left_for_another() -> None:
    made = gate("r1", "r2", concurrency=4)
    async with made.place(ticket("a")) as lease:
        first = lease.replica
        lease.move()
        assert {first, lease.replica} == {"r1", "r2"}
        lease.settle(Usage())
    assert made.open_requests() == 0


async def test_moving_without_another_replica_refuses_and_ends_the_request() -> None:
    made = gate("r1")
    with pytest.raises(Refused) as caught:
        async with made.place(ticket("a")) as lease:
            lease.move()
    assert caught.value.reject.reason is RejectReason.NO_REPLICA
    assert made.open_requests() == 0


async def test_a_move_that_ends_a_request_lets_others_into_its_slot() -> None:
    made = gate("r1")
    with pytest.raises(Refused):  # noqa: PT012  # the move is inside the block
        async with made.place(ticket("a")) as lease:
            second = Place(made, "b")
            await settled()
            assert second.lease is None
            lease.move()
    await settled()
    assert second.lease is not None
    await second.leave()
    assert made.open_requests() == 0


async def test_a_request_waits_for_the_first_replica() -> None:
    made = gate()
    place = Place(made, "a")
    await settled()
    assert place.lease is None
    made.observe(view("r1"))
    await settled()
    assert place.lease is not None
    await place.leave()


async def test_a_forgotten_replica_takes_nothing_more() -> None:
    made = gate("r1", hold_without_replica_s=5.0)
    assert made.replicas(POOL) == 1
    made.forget(ReplicaId("r1"))
    assert made.replicas(POOL) == 0
    place = Place(made, "a")
    await settled()
    assert place.lease is None
    await place.abandon()
    assert made.open_requests() == 0


async def test_the_timer_refuses_what_waited_too_long() -> None:
    """The loop's timer, not another event, ends the wait; the clock jumps past it."""
    clock = Clock()
    made = gate("r1", clock=clock, queue_timeout_s=0.01)
    first, second = Place(made, "a"), Place(made, "b")
    await settled()
    clock.now_s += 1.0
    async with asyncio.timeout(120):
        await second.task
    assert second.refused is not None
    assert second.refused.reject.reason is RejectReason.QUEUE_TIMEOUT
    await first.leave()
    assert made.open_requests() == 0


async def test_closing_stops_the_timer() -> None:
    made = gate("r1", queue_timeout_s=1000.0)
    first, second = Place(made, "a"), Place(made, "b")
    await settled()
    timer = made._timer
    assert timer is not None
    made.close()
    assert timer.cancelled()
    await first.leave()
    await second.leave()


async def test_a_removed_pool_serves_what_it_has_and_takes_nothing_new() -> None:
    made = gate("r1")
    first = Place(made, "a")
    await settled()
    made.configure({})
    with pytest.raises(Refused):
        async with made.place(ticket("b")):
            pytest.fail("the pool is gone")
    await first.leave()
    assert first.lease is not None
    assert first.lease.outcome is Outcome.COMPLETED
    assert made.open_requests() == 0


async def test_progress_of_a_request_that_has_ended_is_ignored() -> None:
    made = gate("r1")
    async with made.place(ticket("a")) as lease:
        lease.progress(3)
        lease.settle(Usage(10, 0, 3))
    made.progress(ReplicaId("r1"), RequestId("a"), 1, first=True)
    assert made.open_requests() == 0


async def test_two_hundred_clients_that_leave_at_random_moments_leak_nothing() -> None:
    made = gate("r1", "r2", concurrency=3, queue_capacity=400)
    places = [Place(made, f"q{number}") for number in range(200)]
    for number, place in enumerate(places):
        if number % 3 == 0:
            await place.abandon()
        elif number % 3 == 1:
            place._done.set()
            await asyncio.sleep(0)
    for place in places:
        place._done.set()
    await asyncio.gather(*(place.task for place in places), return_exceptions=True)
    assert (made.queue_depth(POOL), made.in_flight(POOL), made.open_requests()) == (0, 0, 0)


async def test_a_pool_takes_other_routing_numbers_at_once_and_keeps_what_it_learned_else() -> None:
    built: list[RoutingSettings | None] = []

    def build(policy: PoolPolicy) -> RoutingPolicy:
        built.append(policy.routing_settings)
        return least_loaded(policy)

    made = Gate(Controller(build), asyncio.get_running_loop().time, lambda notice: None)
    short, long = RoutingSettings(sticky_gap_s=0.1), RoutingSettings(sticky_gap_s=9.0)
    for settings in (short, RoutingSettings(sticky_gap_s=0.1), long):
        made.configure({POOL: PoolPolicy(routing_settings=settings)})

    assert built == [short, long]
