"""Following the replicas of pools: who is watched, what the gate is told, what is forgotten."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from serve_app import fleet as fleet_module
from serve_app.core.types import PoolName, ReplicaId, ReplicaView
from serve_app.engine.api import EngineDead, WatchCall
from serve_app.engine.replica_directory import ReplicaDirectory
from serve_app.fleet import Fleet

POOL = PoolName("chat")
R1, R2 = ReplicaId("r1"), ReplicaId("r2")


def view(replica: str, sequence: int) -> ReplicaView:
    return ReplicaView(
        replica=ReplicaId(replica),
        pool=POOL,
        sequence=sequence,
        slots=8,
        running=0,
        waiting=0,
        kv_usage_ratio=0.0,
        kv_tokens_capacity=1000,
    )


class Ear:
    """The gate, as the fleet uses it: remembers what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self._changed = asyncio.Event()

    def observe(self, seen: ReplicaView) -> None:
        self._note("observe", seen.replica)

    def forget(self, replica: ReplicaId) -> None:
        self._note("forget", replica)

    def _note(self, kind: str, replica: str) -> None:
        self.heard.append((kind, replica))
        self._changed.set()

    async def until(self, *wanted: tuple[str, str], times: int = 1) -> None:
        """Return once each of these was heard so many times."""
        async with asyncio.timeout(120):
            while any(self.heard.count(each) < times for each in wanted):
                self._changed.clear()
                await self._changed.wait()


class Engines:
    """A transport whose replicas report what a test puts into their queues."""

    def __init__(self) -> None:
        self.reports: dict[str, asyncio.Queue[ReplicaView | None]] = {}
        self.watched: list[WatchCall] = []
        self.open = 0

    def report(self, replica: str, seen: ReplicaView | None) -> None:
        """Let a replica report; None breaks its stream."""
        self.reports.setdefault(replica, asyncio.Queue()).put_nowait(seen)

    async def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        self.watched.append(call)
        self.open += 1
        try:
            queue = self.reports.setdefault(call.target, asyncio.Queue())
            while True:
                seen = await queue.get()
                if seen is None:
                    raise EngineDead("lost")
                yield seen
        finally:
            self.open -= 1

    def generate(self, call: Any) -> Any:
        raise AssertionError("a fleet generates nothing")


class Case:
    def __init__(self) -> None:
        self.ear = Ear()
        self.engines = Engines()
        self.directory = ReplicaDirectory()
        self.connected: list[PoolName] = []
        self.fleet = Fleet(self.ear, self._connect, self.directory)  # type: ignore[arg-type]

    def _connect(self, pool: PoolName) -> Engines:
        self.connected.append(pool)
        return self.engines

    def publish(self, *replicas: ReplicaId) -> None:
        self.directory.publish(POOL, frozenset(replicas))


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(fleet_module, "REWATCH_S", 0.0)
    return Case()


async def test_every_replica_is_watched_once_and_its_load_reaches_the_gate(case: Case) -> None:
    case.fleet.connect([POOL])
    case.fleet.start()
    case.publish(R1)
    case.publish(R1, R2)
    for replica in ("r1", "r2"):
        case.engines.report(replica, view(replica, 1))
    await case.ear.until(("observe", "r1"), ("observe", "r2"))
    targets = sorted(call.target for call in case.engines.watched)
    assert targets == ["r1", "r2"]
    await case.fleet.stop()


async def test_replicas_known_before_the_start_are_watched_too(case: Case) -> None:
    case.publish(R1)
    case.fleet.connect([POOL])
    case.fleet.start()
    case.engines.report("r1", view("r1", 1))
    await case.ear.until(("observe", "r1"))
    await case.fleet.stop()


async def test_a_replica_that_left_is_forgotten_and_its_watch_closed(case: Case) -> None:
    case.fleet.connect([POOL])
    case.fleet.start()
    case.publish(R1, R2)
    for replica in ("r1", "r2"):
        case.engines.report(replica, view(replica, 1))
    await case.ear.until(("observe", "r1"), ("observe", "r2"))
    case.publish(R2)
    await case.ear.until(("forget", "r1"))
    assert ("forget", "r2") not in case.ear.heard
    case.engines.report("r2", view("r2", 2))
    await case.ear.until(("observe", "r2"), times=2)
    assert case.engines.open == 1
    await case.fleet.stop()


async def test_a_broken_watch_forgets_at_once_and_is_tried_again(case: Case) -> None:
    case.fleet.connect([POOL])
    case.fleet.start()
    case.publish(R1)
    case.engines.report("r1", view("r1", 1))
    case.engines.report("r1", None)
    await case.ear.until(("forget", "r1"))
    case.engines.report("r1", view("r1", 1))
    await case.ear.until(("observe", "r1"), times=2)
    assert case.ear.heard == [("observe", "r1"), ("forget", "r1"), ("observe", "r1")]
    await case.fleet.stop()


async def test_another_pools_set_does_not_touch_this_one(case: Case) -> None:
    case.fleet.connect([POOL])
    case.fleet.start()
    case.publish(R1)
    case.engines.report("r1", view("r1", 1))
    await case.ear.until(("observe", "r1"))
    case.directory.publish(PoolName("other"), frozenset())
    case.engines.report("r1", view("r1", 2))
    await case.ear.until(("observe", "r1"), times=2)
    assert ("forget", "r1") not in case.ear.heard
    await case.fleet.stop()


async def test_a_fault_in_the_gate_does_not_end_the_watch(case: Case) -> None:
    observe = case.ear.observe

    def stumble(_view: ReplicaView) -> None:
        case.ear.observe = observe  # type: ignore[method-assign]
        raise AssertionError("a bug")

    case.ear.observe = stumble  # type: ignore[method-assign]
    case.fleet.connect([POOL])
    case.fleet.start()
    case.publish(R1)
    case.engines.report("r1", view("r1", 1))
    case.engines.report("r1", view("r1", 2))
    await case.ear.until(("observe", "r1"))
    await case.fleet.stop()


async def test_the_directory_may_publish_from_another_thread(case: Case) -> None:
    case.fleet.connect([POOL])
    case.fleet.start()
    publisher = threading.Thread(target=case.publish, args=(R1,))
    publisher.start()
    case.engines.report("r1", view("r1", 1))
    await case.ear.until(("observe", "r1"))
    publisher.join(120)
    await case.fleet.stop()


async def test_stopping_closes_every_watch(case: Case) -> None:
    case.fleet.connect([POOL])
    case.fleet.start()
    case.publish(R1, R2)
    for replica in ("r1", "r2"):
        case.engines.report(replica, view(replica, 1))
    await case.ear.until(("observe", "r1"), ("observe", "r2"))
    await case.fleet.stop()
    assert case.engines.open == 0


async def test_a_pool_is_connected_once(case: Case) -> None:
    case.fleet.connect([POOL])
    case.fleet.connect([POOL, PoolName("other")])
    assert case.connected == [POOL, "other"]
    assert case.fleet.transport(POOL) is case.engines
