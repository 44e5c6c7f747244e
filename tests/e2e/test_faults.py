"""What clients see when something dies or leaves, and that nothing leaks afterwards."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.fleet import ENGINES, ROUTERS, SLOTS, STEP_S
from tests.e2e.keys import make_key
from tests.e2e.sim import replicas_ready
from tests.e2e.traffic import Load, wait_s
from tests.e2e.waiting import WAIT_S, is_idle, until
from tests.stack import Stack

# After a router's death no slot of its streams is held for longer.
FREED_WITHIN_S = 2.0
OUTCOMES = ("completed", "cancelled", "failed", "rejected")


@pytest.fixture(scope="module")
def stack(fleet_stack: Stack) -> Stack:
    return fleet_stack


def ask(stack: Stack, **options: Any) -> str:
    answer = stack.openai().chat.completions.create(
        model="wide", messages=[{"role": "user", "content": "hello"}], max_tokens=4, **options
    )
    return answer.choices[0].message.content or ""


def ended(stack: Stack, outcome: str) -> float:
    return stack.metric("headrace_requests_total", outcome=outcome)


def served_again(stack: Stack) -> bool:
    try:
        return bool(ask(stack))
    except openai.APIError:
        return False


async def leave_at_random(stack: Stack, clients: int, seed: int) -> tuple[int, int]:
    """Open streams and plain requests and drop each after a random while.

    Half of the streams are left some time after they began, all others after they were asked
    for. Returns how many were left, and how many of them had begun for sure.
    """
    chance = random.Random(seed)
    left = known = 0
    answered: list[str] = []

    async def one(stay_s: float, streamed: bool, begun: bool) -> None:
        nonlocal left, known
        body = {
            "model": "wide",
            "messages": [{"role": "user", "content": f"tell me a story {stay_s}"}],
            "max_tokens": 2000,
            "stream": streamed,
        }
        try:
            async with asyncio.timeout(None if begun else stay_s) as patience:
                async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                    if begun:
                        known += 1
                        patience.reschedule(asyncio.get_running_loop().time() + stay_s)
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
        for number in range(clients):
            streamed, begun = chance.random() < 0.7, number % 2 == 0
            group.create_task(one(chance.uniform(0.05, 3.0), streamed, streamed and begun))
    assert answered == [], "every client leaves before its answer ends"
    return left, known


def test_two_hundred_clients_that_leave_at_random_leak_no_slot(stack: Stack) -> None:
    before = {outcome: ended(stack, outcome) for outcome in OUTCOMES}
    wasted = stack.metric("headrace_engine_tokens_total", kind="wasted")
    left, begun = asyncio.run(leave_at_random(stack, clients=200, seed=1))
    assert left == 200
    assert begun > 50
    until(lambda: is_idle(stack), "engines and routers idle after all clients left")
    until(
        lambda: stack.metric("headrace_engine_tokens_total", kind="wasted") > wasted,
        "the generated tokens counted",
    )
    until(
        lambda: ended(stack, "cancelled") - before["cancelled"] >= begun,
        "every request that had begun counted",
    )
    counted = {outcome: ended(stack, outcome) - before[outcome] for outcome in OUTCOMES}
    # A client may leave before its request has reached a router, and then nobody counts it.
    assert counted["cancelled"] <= 200, counted
    assert counted["completed"] == counted["failed"] == 0, counted
    assert ask(stack)


def test_a_client_that_leaves_stops_the_generation_and_what_was_generated_is_counted(
    stack: Stack,
) -> None:
    wasted = stack.metric("headrace_engine_tokens_total", kind="wasted")
    stream = stack.openai().chat.completions.create(
        model="wide", messages=[{"role": "user", "content": "hi"}], max_tokens=5000, stream=True
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
    assert 20 <= stack.metric("headrace_engine_tokens_total", kind="wasted") - wasted < 2500


def test_an_engine_killed_at_load_cuts_no_stream_and_loses_no_request(stack: Stack) -> None:
    """Its streams go on elsewhere, token by token the same; what had no token begins there."""
    until(lambda: replicas_ready(stack, "wide") == ENGINES, "both engines there")
    continued = stack.metric("headrace_continuations_total", outcome="continued")
    counted = sum(ended(stack, outcome) for outcome in OUTCOMES)
    clients, tokens = 24, 600
    begun = threading.Semaphore(0)
    # A client takes a moment to make: the first stream must not end before the last begins.
    made = [stack.openai() for _ in range(clients)]

    def stream_to_the_end(number: int) -> tuple[str, list[str], Exception | None]:
        words: list[str] = []
        ids: set[str] = set()
        try:
            for chunk in made[number].chat.completions.create(
                model="wide",
                messages=[{"role": "user", "content": f"go {number % 8}"}],
                max_tokens=tokens,
                stream=True,
                temperature=0,
                stream_options={"include_usage": True},
            ):
                if not ids:
                    begun.release()
                ids.add(f"{chunk.id} {chunk.created}")
                words += [choice.delta.content or "" for choice in chunk.choices]
                if chunk.usage is not None:
                    assert chunk.usage.completion_tokens == tokens
        except openai.APIError as error:
            return "".join(words), sorted(ids), error
        return "".join(words), sorted(ids), None

    with ThreadPoolExecutor(clients + 1) as threads:
        streams = [threads.submit(stream_to_the_end, number) for number in range(clients)]
        assert all(begun.acquire(timeout=WAIT_S) for _ in range(clients)), "all streams running"
        victim = stack.processes("pool-wide", "Engine")[0]
        victim.send_signal(signal.SIGKILL)
        late = threads.submit(ask, stack)
        answers = [stream.result(timeout=120) for stream in streams]
    assert late.result(timeout=60), "a request of that moment is served, on the other engine"
    until(
        lambda: sum(ended(stack, outcome) for outcome in OUTCOMES) - counted > clients,
        "all requests counted, by both routers",
    )
    cut = stack.metric("headrace_continuations_total", outcome="continued") - continued
    assert cut >= clients // 4, "the killed engine ran its part of the streams"
    errors = [error for *_, error in answers if error is not None]
    assert len(errors) <= 0.05 * cut, errors
    assert all(getattr(error, "code", None) == "engine_error" for error in errors)
    texts = {number: {text for text, *_ in answers[number::8] if text} for number in range(8)}
    whole = [text for text, _, error in answers if error is None]
    assert {len(text.split()) for text in whole} == {tokens}, "no stream is cut silently"
    if not errors:
        assert all(len(same) == 1 for same in texts.values()), "each prompt has one answer"
    assert all(len(ids) == 1 for _, ids, error in answers if error is None), "one id, one time"
    until(lambda: replicas_ready(stack, "wide") == ENGINES, "the engine replaced")
    until(lambda: is_idle(stack), "no slot leaked")


def ended_at_s(stack: Stack, label: str) -> list[float]:
    """Return when the engines say in the ledger that the generations of a label ended."""
    file = f"file:{stack.folder}/.headrace/sim.db?mode=ro"
    question = (
        "SELECT ended_at_s FROM usage_event "
        "WHERE witness = 'engine' AND outcome = 'cancelled' AND client_label = ?"
    )
    with closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
        return [float(row[0]) for row in database.execute(question, [label])]


@pytest.mark.parametrize(
    "within_s",
    [
        pytest.param(None, id="some time"),
        pytest.param(FREED_WITHIN_S, id="2 s", marks=pytest.mark.proof),
    ],
)
async def test_routers_killed_with_a_hundred_open_streams_leave_no_slot_held(
    stack: Stack, within_s: float | None
) -> None:
    """The engines notice by themselves, and their own count of what they generated is kept.

    No timer of ours takes part (`test_transports.py`), so that the seconds are the machine's.
    """
    label = "routers-killed" if within_s is None else "routers-killed-proof"
    routers = stack.processes("gateway", "Router")
    assert len(routers) == ROUTERS
    pids = {router.pid for router in routers}
    wasted = stack.metric("headrace_engine_tokens_total", kind="wasted")
    body = {
        "model": "wide",
        "messages": [{"role": "user", "content": "go"}],
        "max_tokens": 5000,
        "stream": True,
    }

    async def stream(client: httpx.AsyncClient) -> None:
        with suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                async for _ in answer.aiter_bytes():
                    pass

    headers = {"authorization": f"Bearer {stack.key}", "x-request-id": label}
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
        killed_at_s = time.time()
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
    until(lambda: len(ended_at_s(stack, label)) == 100, "the engines' records in the ledger")
    last_s = max(ended_at_s(stack, label)) - killed_at_s
    print(f"100 streams: the engines idle {last_s:.3f} s after their routers were killed")
    assert within_s is None or last_s <= within_s


@pytest.mark.proof
async def test_all_that_an_engine_killed_at_three_quarters_load_held_goes_on(stack: Stack) -> None:
    """Half of it streams, half of it without a token before its end; Critical may have it all."""
    count, tokens = int(0.75 * ENGINES * 96), 400
    key = make_key(stack, tenant="heavy", priority_ceiling="critical")
    continued = stack.metric("headrace_continuations_total", outcome="continued")
    body = {
        "model": "wide",
        "messages": [{"role": "user", "content": "go"}],
        "max_tokens": tokens,
        "temperature": 0,
        "service_tier": "priority",
    }

    async def ask(client: httpx.AsyncClient, number: int) -> tuple[bool, str]:
        streamed = number % 2 == 0
        answer = await client.post("/v1/chat/completions", json={**body, "stream": streamed})
        whole = answer.status_code == 200
        if streamed:
            text = "".join(
                event["choices"][0]["delta"].get("content") or ""
                for line in answer.text.splitlines()
                if line.startswith("data: {") and (event := json.loads(line[6:])).get("choices")
            )
            whole = whole and answer.text.endswith("data: [DONE]\n\n")
        else:
            text = answer.json()["choices"][0]["message"]["content"] if whole else ""
        return whole and len(text.split()) == tokens, answer.text[-300:]

    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=stack.url, headers=headers, timeout=120, limits=limits
    ) as client:
        asked = [asyncio.create_task(ask(client, number)) for number in range(count)]
        await asyncio.to_thread(
            until, lambda: stack.metric("headrace_engine_running") == count, "all running"
        )
        stack.processes("pool-wide", "Engine")[0].send_signal(signal.SIGKILL)
        answers = await asyncio.gather(*asked)
    cut = stack.metric("headrace_continuations_total", outcome="continued") - continued
    print(f"{count} requests, half of them streams; {cut:.0f} streams went on elsewhere")
    assert [text for whole, text in answers if not whole] == []
    assert cut >= count // 8


@pytest.mark.proof
async def test_after_an_engines_death_at_three_quarters_load_goodput_comes_back(
    stack: Stack,
) -> None:
    """One engine of two cannot do it alone: what comes meanwhile waits, and nothing is lost."""
    words = 25
    load = Load(stack, "small", words, 0.75 * ENGINES * SLOTS / (words * STEP_S))
    async with load.running():
        await wait_s(3)
        killed_at_s = time.monotonic()
        stack.processes("pool-small", "Engine")[0].send_signal(signal.SIGKILL)
        await asyncio.to_thread(
            until, lambda: replicas_ready(stack, "small") < ENGINES, "it is missed"
        )
        await asyncio.to_thread(
            until, lambda: replicas_ready(stack, "small") == ENGINES, "another one"
        )
        ready_at_s = time.monotonic()
        await wait_s(10)
    assert load.failures() == []

    def ended_per_s(from_s: float) -> int:
        ends_s = [each.ended_at_s for each in load.answers if each.ended_at_s is not None]
        return sum(from_s <= at_s < from_s + 1 for at_s in ends_s)

    before = ended_per_s(killed_at_s - 1)
    steps_s = [killed_at_s + step / 4 for step in range(4 * 120)]
    lowest, lowest_at_s = min((ended_per_s(at_s), at_s) for at_s in steps_s if at_s < ready_at_s)
    back_at_s = next(
        at_s
        for at_s in steps_s
        if at_s > lowest_at_s and ended_per_s(at_s) >= 0.95 * load.rate_per_s
    )
    print(f"{before} answers/s before, {lowest} at least while it was away")
    print(f"another one {ready_at_s - killed_at_s:.1f} s after the death; ", end="")
    print(f"goodput is back {back_at_s - ready_at_s:+.2f} s from then")
    assert lowest < 0.9 * load.rate_per_s, "one alone cannot do it"


@pytest.mark.proof
async def test_a_killed_haproxy_is_replaced_and_leaves_no_slot_held(sim_stack: Stack) -> None:
    stack = sim_stack
    routers = {router.pid for router in stack.processes("gateway", "Router")}
    load = Load(stack, "sim", words=20, rate_per_s=4)
    async with load.running():
        await wait_s(2)
        for process in stack.processes("haproxy", "-f"):
            process.kill()
        killed_at_s = time.monotonic()
        await asyncio.to_thread(until, lambda: is_there(stack), "HAProxy is back")
        back_at_s = time.monotonic()
        await wait_s(4)
    print(f"back after {back_at_s - killed_at_s:.1f} s; {len(load.failures())} requests failed")
    assert [each for each in load.failures() if each.sent_at_s > back_at_s] == []
    assert {router.pid for router in stack.processes("gateway", "Router")} == routers
    until(lambda: is_idle(stack), "no slot leaked")


def is_there(stack: Stack) -> bool:
    """Tell whether the front port answers."""
    try:
        return stack.http(key=None).get("/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_processes_of_a_stack_are_found(stack: Stack) -> None:
    """The other tests kill by these names: they must mean what they say."""
    assert all(isinstance(p, psutil.Process) for p in stack.processes("gateway", "Router"))
    assert stack.processes("control", "Control")
