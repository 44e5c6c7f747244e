"""What clients see when something dies or leaves, and that nothing leaks afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml

from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

STEP_S = 0.02
SLOW_STEP_S = 0.5
OUTCOMES = ("completed", "cancelled", "failed", "rejected")


def document(**engine: Any) -> dict[str, Any]:
    """Two slow simulated engines and two routers: a token every 20 ms.

    Of 96 places each keeps 28 for Critical, so that a hundred Standard streams find room.
    """
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    _, pool, gateway = found["applications"]
    pool["args"]["engine"] |= {"weights_s": STEP_S, "max_num_seqs": 96, **engine}
    pool["args"]["replicas"] |= {"num_replicas": 2, "health_check_period_s": 1}
    gateway["args"]["replicas"] |= {"num_replicas": 2, "health_check_period_s": 1}
    # Nobody is turned away because a busy machine would serve late: that is not what is tested.
    gateway["deployments"][0]["user_config"]["pools"]["sim"] |= {
        "queue_timeout_s": 60,
        "stale_after_s": 5.0,
        **{name: {"ttft_slo_s": 60} for name in ("critical", "standard", "sheddable")},
    }
    for application in (pool, gateway):
        application["args"].setdefault("control", {})["metrics_period_s"] = 0.5
    return found


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(document()) as running:
        yield running


def is_idle(stack: Stack) -> bool:
    """Whether engines and routers hold no request at all, by their own latest report."""
    try:
        return (
            stack.metric("headrace_engine_running") == 0
            and stack.metric("headrace_engine_waiting") == 0
            and stack.metric("headrace_in_flight") == 0
            and stack.metric("headrace_queue_depth") == 0
        )
    except httpx.HTTPError:
        return False


def replicas_ready(stack: Stack) -> int:
    try:
        found: int = stack.http(key=None).get("/ready").json()["pools"]["sim"]["replicas"]
    except (httpx.HTTPError, KeyError, ValueError):
        return 0
    return found


def ask(stack: Stack, **options: Any) -> str:
    answer = stack.openai().chat.completions.create(
        model="sim", messages=[{"role": "user", "content": "hello"}], max_tokens=4, **options
    )
    return answer.choices[0].message.content or ""


def ended(stack: Stack, outcome: str) -> float:
    return stack.metric("headrace_requests_total", outcome=outcome)


def served_again(stack: Stack) -> bool:
    try:
        return bool(ask(stack))
    except openai.APIError:
        return False


async def leave_at_random(stack: Stack, clients: int, seed: int) -> int:
    """Open streams and plain requests and drop each after a random while; return how many."""
    chance = random.Random(seed)
    left = 0
    answered: list[str] = []

    async def one(stay_s: float, streamed: bool) -> None:
        nonlocal left
        body = {
            "model": "sim",
            "messages": [{"role": "user", "content": f"tell me a story {stay_s}"}],
            "max_tokens": 2000,
            "stream": streamed,
        }
        try:
            async with asyncio.timeout(stay_s):
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    text = b"".join([part async for part in answer.aiter_bytes()])
                    answered.append(f"{answer.status_code} {text[-200:]!r}")
        except TimeoutError:
            left += 1

    headers = {"authorization": f"Bearer {stack.key}"}
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(clients):
            group.create_task(one(chance.uniform(0.05, 3.0), chance.random() < 0.7))
    assert answered == [], "every client leaves before its answer ends"
    return left


def test_two_hundred_clients_that_leave_at_random_leak_no_slot(stack: Stack) -> None:
    before = {outcome: ended(stack, outcome) for outcome in OUTCOMES}
    wasted = stack.metric("headrace_engine_tokens_total", kind="wasted")
    assert asyncio.run(leave_at_random(stack, clients=200, seed=1)) == 200
    until(lambda: is_idle(stack), "engines and routers idle after all clients left")
    until(
        lambda: stack.metric("headrace_engine_tokens_total", kind="wasted") > wasted,
        "the generated tokens counted",
    )
    counted = {outcome: ended(stack, outcome) - before[outcome] for outcome in OUTCOMES}
    # A client may leave before its request has reached a router, and then nobody counts it.
    assert 150 <= counted["cancelled"] <= 200, counted
    assert counted["completed"] == counted["failed"] == 0, counted
    assert ask(stack)


def test_a_client_that_leaves_stops_the_generation_and_what_was_generated_is_counted(
    stack: Stack,
) -> None:
    wasted = stack.metric("headrace_engine_tokens_total", kind="wasted")
    stream = stack.openai().chat.completions.create(
        model="sim", messages=[{"role": "user", "content": "hi"}], max_tokens=5000, stream=True
    )
    for received, _ in enumerate(stream):
        if received == 20:
            break
    stream.close()
    until(lambda: is_idle(stack), "the engine idle")
    until(
        lambda: stack.metric("headrace_engine_tokens_total", kind="wasted") > wasted,
        "the generated tokens counted",
    )
    # 5000 tokens would take 100 s; what was generated after the close is a few steps.
    assert 20 <= stack.metric("headrace_engine_tokens_total", kind="wasted") - wasted < 500


def test_an_engine_killed_ends_its_streams_with_an_error_event_and_is_replaced(
    stack: Stack,
) -> None:
    until(lambda: replicas_ready(stack) == 2, "both engines there")

    def stream_to_the_end() -> tuple[int, Exception | None]:
        words: list[str] = []
        try:
            for chunk in stack.openai().chat.completions.create(
                model="sim",
                messages=[{"role": "user", "content": "go"}],
                max_tokens=400,
                stream=True,
            ):
                words += [choice.delta.content or "" for choice in chunk.choices]
        except openai.APIError as error:
            return len("".join(words).split()), error
        return len("".join(words).split()), None

    with ThreadPoolExecutor(8) as threads:
        streams = [threads.submit(stream_to_the_end) for _ in range(8)]
        until(lambda: stack.metric("headrace_engine_running") == 8, "eight streams running")
        victim = stack.processes("pool-sim", "Engine")[0]
        victim.send_signal(signal.SIGKILL)
        ended = [stream.result(timeout=120) for stream in streams]
    cut = [error for _, error in ended if error is not None]
    whole = [words for words, error in ended if error is None]
    assert cut, "the killed engine ran some of the eight streams"
    assert whole, "the other engine's streams went on"
    assert set(whole) == {400}, "no stream is cut silently"
    assert all(getattr(error, "code", None) == "engine_error" for error in cut)
    assert ask(stack), "the next request succeeds at once, on the other engine"
    until(lambda: replicas_ready(stack) == 2, "the engine replaced")
    until(lambda: is_idle(stack), "no slot leaked")


async def test_routers_killed_with_a_hundred_open_streams_leave_no_slot_held(
    stack: Stack,
) -> None:
    """The engines notice by themselves, and their own count of what they generated is kept."""
    routers = stack.processes("gateway", "Router")
    assert len(routers) == 2
    pids = {router.pid for router in routers}
    wasted = stack.metric("headrace_engine_tokens_total", kind="wasted")
    body = {
        "model": "sim",
        "messages": [{"role": "user", "content": "go"}],
        "max_tokens": 5000,
        "stream": True,
    }

    async def stream(client: httpx.AsyncClient) -> None:
        with suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    pass

    headers = {"authorization": f"Bearer {stack.key}"}
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=stack.url, headers=headers, timeout=60, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(100):
            group.create_task(stream(client))
        await asyncio.to_thread(
            until, lambda: stack.metric("headrace_engine_running") == 100, "all streams running"
        )
        for router in routers:
            router.send_signal(signal.SIGKILL)
        # 5,000 tokens take 100 s: whatever ends before was aborted.
        await asyncio.to_thread(until, lambda: served_again(stack), "routers serving again")
        await asyncio.to_thread(until, lambda: is_idle(stack), "the killed routers' slots free")
    assert {router.pid for router in stack.processes("gateway", "Router")}.isdisjoint(pids)
    until(
        lambda: stack.metric("headrace_engine_tokens_total", kind="wasted") > wasted,
        "what was generated for them counted",
    )


@pytest.mark.parametrize(
    "lasting_s",
    [pytest.param(30, id="30 s"), pytest.param(150, id="150 s", marks=pytest.mark.proof)],
)
def test_a_stream_survives_changes_of_the_router_count(lasting_s: float) -> None:
    """150 s is longer than an HAProxy that was replaced keeps its streams by default."""
    tokens = int(lasting_s / SLOW_STEP_S)
    with running_stack(slow(count=2)) as stack, ThreadPoolExecutor(1) as threads:

        def long_stream() -> list[str]:
            events = stack.openai(timeout=400).chat.completions.create(
                model="sim",
                messages=[{"role": "user", "content": "a long story"}],
                max_tokens=tokens,
                stream=True,
            )
            return [c.delta.content for e in events for c in e.choices if c.delta.content]

        started_at_s = time.monotonic()
        story = threads.submit(long_stream)
        until(lambda: stack.metric("headrace_engine_running") == 1, "the stream running")
        # The router that holds the stream lives on beside those that are wanted.
        for count, at_least, at_most in ((3, 3, 4), (1, 1, 2)):
            done = stack.deploy(slow(count=count))
            assert done.returncode == 0, done.stdout + done.stderr
            until(
                lambda least=at_least, most=at_most: least <= routers(stack) <= most,  # type: ignore[misc]
                f"a change to {count} routers",
            )
            assert ask(stack)
        assert len("".join(story.result(timeout=400)).split()) == tokens
        assert time.monotonic() - started_at_s > lasting_s, "it lasted as long as it should"
        until(lambda: is_idle(stack), "no slot leaked")


def slow(*, count: int) -> dict[str, Any]:
    """Return the configuration with slow steps and this many routers."""
    changed = document(weights_s=SLOW_STEP_S)
    changed["applications"][2]["args"]["replicas"]["num_replicas"] = count
    return changed


def routers(stack: Stack) -> int:
    """Return how many routers report to Control; -1 while the one that was asked is leaving."""
    try:
        return int(stack.metric("headrace_control_processes", role="router"))
    except httpx.HTTPError:
        return -1


def test_processes_of_a_stack_are_found(stack: Stack) -> None:
    """The other tests kill by these names: they must mean what they say."""
    assert all(isinstance(p, psutil.Process) for p in stack.processes("gateway", "Router"))
    assert stack.processes("control", "Control")
