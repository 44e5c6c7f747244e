"""Several routers as one: capacity shared, Control away, routers that die."""

from __future__ import annotations

import asyncio
import signal
import time

import psutil
import pytest

from serve_app.config import CHANNEL_PORTS
from serve_app.core.exchange import over_admission_most
from tests.e2e.fleet import ENGINES, ROUTERS, SLOTS, STEP_S, stood_still
from tests.e2e.traffic import Load, wait_s
from tests.e2e.waiting import WAIT_S, until
from tests.stack import Stack

WORDS = 25
LOOKS = 8
STOOD_STILL_S = 1.5
# A request holds a slot for WORDS steps, about half a second.
CAPACITY_PER_S = ENGINES * SLOTS / (WORDS * STEP_S)


@pytest.fixture(scope="module")
def stack(fleet_stack: Stack) -> Stack:
    return fleet_stack


def load_of(stack: Stack, rate_per_s: float = 0.0, words: int = WORDS) -> Load:
    return Load(stack, "small", words, rate_per_s)


def kill(stack: Stack, *words: str) -> None:
    for process in stack.processes(*words):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


async def kill_a_router(stack: Stack) -> float:
    """Kill one; return when its sockets are closed: until then it takes what it never reads."""
    victim = stack.processes("gateway", "Router")[0]
    victim.send_signal(signal.SIGKILL)
    await asyncio.to_thread(psutil.wait_procs, [victim], timeout=WAIT_S)
    return time.monotonic()


async def test_routers_fill_idle_engines_together_and_no_further(stack: Stack) -> None:
    """A burst meets three routers that all see the same free places: apart, each takes them all.

    Nobody has heard of the others' burst yet when it begins, so the first fill may go as far as
    routers that disagree may; an engine that is shown full gets no more from any of them.
    """
    first: list[float] = []
    later: list[float] = []
    places = ENGINES * SLOTS
    burst = load_of(stack, words=4 * WORDS)

    def look() -> float:
        gauges = ("headrace_engine_running", "headrace_engine_waiting")
        return sum(stack.metric(gauge) for gauge in gauges)

    async with burst.connected(), asyncio.TaskGroup() as group:
        for _ in range(4 * places):
            group.create_task(burst.ask())
        looked_at_s = time.monotonic()
        while len(later) < LOOKS:
            if burst.open() < 2 * places:
                for _ in range(places):
                    group.create_task(burst.ask())
            await asyncio.sleep(0.2)
            # Two rounds at the most for what came first, and what comes after.
            seen = first if len(burst.answers) - burst.open() < 2 * places else later
            seen.append(await asyncio.to_thread(look))
            if time.monotonic() - looked_at_s > STOOD_STILL_S:
                later.clear()  # It was we who sent nothing.
            looked_at_s = time.monotonic()
    assert burst.failures() == []
    seen = first + later
    # A quarter of the places is kept for Critical once the routers know what the others hold.
    assert max(seen) >= 0.75 * places, seen
    assert max(seen) <= places + ENGINES * over_admission_most(SLOTS, ROUTERS), seen
    assert max(later) <= places + ENGINES * over_admission_most(0, ROUTERS), seen
    assert sum(later) >= 0.5 * places * len(later), seen


@pytest.mark.parametrize(
    "away_s",
    [pytest.param(8, id="8 s"), pytest.param(60, id="60 s", marks=pytest.mark.proof)],
)
async def test_control_killed_at_three_quarters_load_is_not_noticed(
    stack: Stack, away_s: float
) -> None:
    load = load_of(stack, 0.75 * CAPACITY_PER_S)
    killed = stack.processes("control", "Control")
    async with load.running():
        await wait_s(1)
        await wait_s(away_s, meanwhile=lambda: kill(stack, "control", "Control"))
        await wait_s(1)
    assert load.failures() == []
    assert len(load.answers) > 0.5 * (away_s + 2) * load.rate_per_s, "the load was really sent"
    until(lambda: bool(stack.processes("control", "Control")), "Control is back")
    assert {each.pid for each in killed}.isdisjoint(
        each.pid for each in stack.processes("control", "Control")
    )


async def test_a_router_killed_under_load_fails_nothing_that_comes_after(stack: Stack) -> None:
    load = load_of(stack, 0.75 * CAPACITY_PER_S)
    async with load.running():
        await wait_s(2)
        in_flight = load.open()
        killed_at_s = await kill_a_router(stack)
        await wait_s(6)
    late = [answer for answer in load.failures() if answer.sent_at_s > killed_at_s]
    assert late == []
    # A third of what is in flight is the most that one router of three holds, and a few.
    assert len(load.failures()) <= max(ENGINES * SLOTS, in_flight // 2), load.failures()


async def test_a_router_that_begins_while_control_is_away_gets_no_requests(stack: Stack) -> None:
    """It knows no keys; the others do."""
    load = load_of(stack, 0.3 * CAPACITY_PER_S)
    before = {each.pid for each in stack.processes("gateway", "Router")}
    with stood_still(stack.processes("control", "Control")):
        async with load.running():
            await wait_s(1)
            killed_at_s = await kill_a_router(stack)
            await asyncio.to_thread(until, lambda: listens(stack, before), "a new router")
            await wait_s(6)
    late = [answer for answer in load.failures() if answer.sent_at_s > killed_at_s]
    assert late == []


def listens(stack: Stack, before: set[int]) -> bool:
    """Tell whether a router that was not there before has its end of the token channel."""
    first, last = CHANNEL_PORTS
    return any(
        connection.status == psutil.CONN_LISTEN and first <= connection.laddr.port <= last
        for router in stack.processes("gateway", "Router")
        if router.pid not in before
        for connection in router.net_connections("tcp4")
    )


async def test_an_engine_paused_for_five_seconds_loses_no_stream(stack: Stack) -> None:
    load = load_of(stack, 0.3 * CAPACITY_PER_S)
    async with load.running():
        await wait_s(1)
        with stood_still(stack.processes("pool-small", "Engine")[:1]):
            await wait_s(5)
        await wait_s(1)
    assert load.failures() == []


async def test_a_thousand_clients_that_connect_and_go_away_leave_nothing(stack: Stack) -> None:
    descriptors = [process.num_fds() for process in stack.processes("gateway", "Router")]

    async def come_and_go(number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        if number % 3 == 1:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        if number % 3 == 2:
            body = b'{"model":"small","messages":[{"role":"user","content":"x"}],"stream":true}'
            head = f"Host: x\r\nAuthorization: Bearer {stack.key}\r\nContent-Length: {len(body)}"
            writer.write(
                b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n"
                + head.encode()
                + b"\r\n\r\n"
                + body
            )
        await writer.drain()
        writer.close()

    for wave in range(10):
        await asyncio.gather(*(come_and_go(100 * wave + number) for number in range(100)))
    load = load_of(stack, 5)
    async with load.running():
        await wait_s(1)
    assert load.failures() == []

    def settled() -> bool:
        now = [process.num_fds() for process in stack.processes("gateway", "Router")]
        return all(after <= before + 20 for before, after in zip(descriptors, now, strict=True))

    until(settled, "the sockets closed")
