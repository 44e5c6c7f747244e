"""The request router that obeys the core's ranking; Serve's part of it is not started."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.ray


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


def pending(*wanted: str) -> Any:
    from serve_app.core.types import ReplicaId
    from serve_app.engine.api import WatchCall

    first, *others = (ReplicaId(name) for name in wanted)
    return SimpleNamespace(
        args=(WatchCall(first, tuple(others)),),
        future=asyncio.get_running_loop().create_future(),
        routing_context=SimpleNamespace(should_backoff=False),
    )


def router() -> Any:
    from serve_app.engine.placement import PlacementRouter

    made = object.__new__(PlacementRouter)
    made._remove_pending_request_from_indices = lambda _: None
    return made


async def test_the_wanted_replicas_come_in_their_order_each_a_rank() -> None:
    a, b, c = (replica(name) for name in "abc")
    assert await router().choose_replicas([a, b, c], pending("c", "a")) == [[c], [a]]


async def test_a_replica_that_left_is_passed_over() -> None:
    a, b = replica("a"), replica("b")
    call = pending("gone", "b")
    assert await router().choose_replicas([a, b], call) == [[b]]
    assert not call.future.done()


async def test_a_call_whose_replicas_all_left_fails_and_lets_its_routing_task_see_it() -> None:
    """With nothing offered, Serve's task would ask for ever, and keep later calls waiting."""
    from serve_app.engine.api import EngineDead

    a, call = replica("a"), pending("gone")
    assert await router().choose_replicas([a], call) == [[a]]
    assert isinstance(call.future.exception(), EngineDead)
    assert await router().choose_replicas([a], call) == [[a]], "asked again, it is still over"


async def test_back_off_is_asked_for() -> None:
    call = pending("a")
    await router().choose_replicas([replica("a")], call)
    assert call.routing_context.should_backoff
