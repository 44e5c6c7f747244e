"""One limit through three routers: granted in full, never more, as if there were one."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.e2e import keys
from tests.e2e.fleet import A_MINUTE, TOKENS_A_MINUTE, stood_still
from tests.e2e.fleet import CONCURRENT as SLOTS
from tests.e2e.waiting import until
from tests.stack import Stack

ASKS = 10
# From a Control's process to its first grant, on a busy machine.
BEGUN_S = 12


@pytest.fixture(scope="module")
def stack(fleet_stack: Stack) -> Stack:
    return fleet_stack


@pytest.fixture(scope="module")
def make_key(stack: Stack) -> Callable[[str], str]:
    """A function that makes a tenant's key which every router knows."""
    return lambda tenant: keys.make_key(stack, tenant=tenant)


async def burst(
    stack: Stack, key: str, count: int, *, together: int = 48, patient: bool = True, **fields: Any
) -> list[httpx.Response]:
    """Send requests over connections of their own, some at a time.

    A patient client asks again while its limits cannot be looked up, as it is told to.
    """
    gate = asyncio.Semaphore(together)
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "wide", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}

    async def one() -> httpx.Response:
        async with gate:
            for _ in range(ASKS if patient else 1):
                answer = await client.post("/v1/chat/completions", json=body | fields)
                if answer.status_code != 503:
                    break
                assert not patient or answer.json()["error"]["code"] == "limits_unavailable"
                await asyncio.sleep(float(answer.headers["retry-after"]))
            return answer

    async with httpx.AsyncClient(
        base_url=stack.url, headers=headers, timeout=240, limits=keys.EACH_ITS_OWN
    ) as client:
        return await asyncio.gather(*(one() for _ in range(count)))


@asynccontextmanager
async def opened(stack: Stack, key: str, count: int) -> AsyncIterator[list[httpx.Response]]:
    """Ask for long streams, all at once, and hold those that are granted open for the block."""
    body = {"model": "wide", "prompt": "hi", "max_tokens": 5000, "stream": True}
    headers = {"authorization": f"Bearer {key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=stack.url, timeout=240, limits=limits) as client:

        async def one() -> httpx.Response:
            for _ in range(ASKS):
                request = client.build_request(
                    "POST", "/v1/completions", json=body, headers=headers
                )
                answer = await client.send(request, stream=True)
                if answer.status_code == 200:
                    break
                await answer.aread()
                if answer.status_code != 503:
                    break
                assert answer.json()["error"]["code"] == "limits_unavailable"
                await asyncio.sleep(float(answer.headers["retry-after"]))
            return answer

        answers = await asyncio.gather(*(one() for _ in range(count)))
        try:
            yield answers
        finally:
            for answer in answers:
                await answer.aclose()


def in_flight(stack: Stack) -> float:
    return stack.metric("headrace_in_flight")


def counted(answers: list[httpx.Response]) -> int:
    """Return how many were granted; the others were told that their limit is used up."""
    others = [each for each in answers if each.status_code != 200]
    for each in others:
        assert each.status_code == 429, each.text
        assert each.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(each.headers["retry-after"]) >= 1
    return len(answers) - len(others)


async def test_requests_per_minute_are_granted_in_full_and_no_more(
    stack: Stack, make_key: Callable[[str], str]
) -> None:
    await asyncio.to_thread(until_nothing_is_doubted, stack)
    key = make_key("counted")
    before = {each: served(stack, each) for each in routers(stack)}
    began_at_s = time.monotonic()
    granted = counted(await burst(stack, key, A_MINUTE))
    assert granted >= 0.99 * A_MINUTE, what_was_said_of_limits(stack)
    granted += counted(await burst(stack, key, A_MINUTE // 2))
    drained = A_MINUTE * (time.monotonic() - began_at_s) / 60
    assert granted <= A_MINUTE + drained
    until(lambda: all(served(stack, each) > before[each] for each in before), "all routers served")


async def test_tokens_per_minute_are_granted_in_full_and_no_more(
    stack: Stack, make_key: Callable[[str], str]
) -> None:
    await asyncio.to_thread(until_nothing_is_doubted, stack)
    key = make_key("metered")
    began_at_s = time.monotonic()
    long = [{"role": "user", "content": "word " * 150}]
    answers = await burst(stack, key, 160, messages=long)
    # One that was refused beside others, which hold their prompts' upper bounds, may fit alone.
    for _ in range(160):
        answers += await burst(stack, key, 1, messages=long)
        if answers[-1].status_code != 200:
            break
    granted = [each.json()["usage"]["total_tokens"] for each in answers if each.status_code == 200]
    counted(answers)
    drained = TOKENS_A_MINUTE * (time.monotonic() - began_at_s) / 60
    assert sum(granted) <= TOKENS_A_MINUTE + drained
    # What does not fit is less than one more request's upper bound.
    assert sum(granted) >= TOKENS_A_MINUTE * 0.95 - 2 * max(granted)


async def test_slots_are_one_number_for_all_routers(
    stack: Stack, make_key: Callable[[str], str]
) -> None:
    key = make_key("slotted")
    async with opened(stack, key, 3 * SLOTS) as answers:
        assert SLOTS - 1 <= counted(answers) <= SLOTS
        await asyncio.to_thread(until, lambda: in_flight(stack) >= SLOTS - 1, "routers tell it")
    await asyncio.to_thread(until, lambda: in_flight(stack) == 0, "the slots are free again")
    again = await burst(stack, key, SLOTS, together=SLOTS, max_tokens=1)
    assert counted(again) >= SLOTS - 1


async def test_a_killed_routers_parts_come_back(
    stack: Stack, make_key: Callable[[str], str]
) -> None:
    key = make_key("slotted")
    assert counted(await burst(stack, key, 2 * SLOTS, together=2 * SLOTS)) >= SLOTS - 1
    router = stack.processes("ServeReplica:gateway:Router")[0]
    router.send_signal(signal.SIGKILL)
    until(lambda: not router.is_running(), "the router is gone")
    until(lambda: all(served_by_somebody(stack, key) for _ in range(20)), "nobody is sent to it")
    body = {"max_tokens": 100, "together": SLOTS}
    for _ in range(40):
        answers = await burst(stack, key, SLOTS, **body)
        if all(each.status_code == 200 for each in answers):
            break
        # Until it is known to be dead its slots may be in use, for all anybody knows.
        codes = {each.json()["error"]["code"] for each in answers if each.status_code != 200}
        assert codes <= {"limits_unavailable", "rate_limit_exceeded"}, codes
        await asyncio.sleep(1.0)
    else:
        raise AssertionError("its slots never came back")


async def test_control_away_is_not_a_limit_used_up(
    stack: Stack, make_key: Callable[[str], str]
) -> None:
    held, fresh = make_key("counted"), make_key("counted")
    assert counted(await burst(stack, held, 60)) == 60
    [control] = stack.processes("ServeReplica:control:Control")
    with stood_still([control]):
        answers = await burst(stack, held, 60)
        assert sum(each.status_code == 200 for each in answers) == 60
        for answer in await burst(stack, fresh, 6, patient=False):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "limits_unavailable"
            assert answer.headers["retry-after"] == "1"
    until(lambda: ask_once(stack, fresh) == 200, "Control is back")


def until_nothing_is_doubted(stack: Stack) -> None:
    """Wait until Control is older than a minute.

    One that begins within a minute of a router's death, as after other tests here, cannot know
    what that one granted: it takes every limit for used up when it began.
    """
    [control] = stack.processes("ServeReplica:control:Control")
    until(lambda: time.time() - control.create_time() > BEGUN_S + 60, "Control is a minute old")


def what_was_said_of_limits(stack: Stack) -> str:
    """Return the log's lines of Controls that begin, and of routers that are lost or alone."""
    words = ("headrace.granter", "headrace.slices")
    said = [line for line in stack.worker_lines() if any(word in line for word in words)]
    return f"now {time.time():.1f}\n" + "\n".join(said[-40:])


def served_by_somebody(stack: Stack, key: str) -> bool:
    try:
        with stack.http(key) as client:
            return client.get("/v1/models").status_code == 200
    except httpx.HTTPError:
        return False


def ask_once(stack: Stack, key: str) -> int:
    body = {"model": "wide", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    with stack.http(key) as client:
        return client.post("/v1/chat/completions", json=body).status_code


def routers(stack: Stack) -> list[str]:
    from prometheus_client.parser import text_string_to_metric_families

    text = stack.http().get("/metrics").raise_for_status().text
    return [
        sample.labels["process"]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "headrace_router_peers"
    ]


def served(stack: Stack, process: str) -> float:
    return stack.metric("headrace_responses_total", process=process, status="200")
