"""Several routers as one: capacity shared, Control away, routers that come, go and die."""

from __future__ import annotations

import asyncio
import copy
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

ROUTERS = 3
ENGINES = 2
SLOTS = 8
STEP_S = 0.02
WORDS = 25
# A request holds a slot for WORDS steps, about half a second.
CAPACITY_PER_S = ENGINES * SLOTS / (WORDS * STEP_S)


def document() -> dict[str, Any]:
    """Three routers before two small simulated engines: a token every 20 ms."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    _, pool, gateway = found["applications"]
    pool["args"]["engine"] |= {"weights_s": STEP_S, "max_num_seqs": SLOTS}
    pool["args"]["replicas"] |= {"num_replicas": ENGINES, "health_check_period_s": 1}
    gateway["args"]["replicas"] |= {"num_replicas": ROUTERS, "health_check_period_s": 1}
    gateway["deployments"][0]["user_config"]["pools"]["sim"] = {
        "max_concurrency_per_replica": SLOTS,
        "queue_capacity": 512,
        "queue_timeout_s": 60,
        "stale_after_s": 1.0,
        **{name: {"ttft_slo_s": 60} for name in ("critical", "standard", "sheddable")},
    }
    for application in (pool, gateway):
        application["args"].setdefault("control", {})["metrics_period_s"] = 0.5
    return found


def with_routers(count: int) -> dict[str, Any]:
    changed = copy.deepcopy(document())
    changed["applications"][2]["args"]["replicas"]["num_replicas"] = count
    return changed


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(document()) as running:
        until(lambda: they_know_each_other(running, ROUTERS), "the routers know each other")
        yield running


@pytest.fixture(autouse=True)
def as_it_was(stack: Stack) -> Iterator[None]:
    """Leave nothing open, and as many routers as there were."""
    yield
    until(lambda: they_know_each_other(stack, ROUTERS), "the routers know each other again")
    until(lambda: is_idle(stack), "no slot held after the test")


def they_know_each_other(stack: Stack, count: int) -> bool:
    try:
        routers = stack.metric("headrace_control_processes", role="router")
        return routers == count and stack.metric("headrace_router_peers") == count * (count - 1)
    except httpx.HTTPError:
        return False


def is_idle(stack: Stack) -> bool:
    gauges = ("engine_running", "engine_waiting", "in_flight", "queue_depth")
    try:
        return all(stack.metric(f"headrace_{gauge}") == 0 for gauge in gauges)
    except httpx.HTTPError:
        return False


@dataclass
class Answer:
    """How one request ended. ``error`` is what the client saw of a failure."""

    sent_at_s: float
    status: int | None = None
    words: int = 0
    error: str | None = None


@dataclass
class Load:
    """Requests of one kind, each on a connection of its own; ``running`` sends at a rate."""

    stack: Stack
    rate_per_s: float = 0.0
    words: int = WORDS
    answers: list[Answer] = field(default_factory=list)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Have ``ask`` work while the block runs."""
        self._client = httpx.AsyncClient(
            base_url=self.stack.url,
            headers={"authorization": f"Bearer {self.stack.key}"},
            timeout=90,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        async with self._client:
            yield

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send while the block runs; wait for all answers when it ends."""
        async with self.connected(), asyncio.TaskGroup() as group:
            sending = group.create_task(self._send(group))
            try:
                yield
            finally:
                sending.cancel()

    async def _send(self, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            group.create_task(self.ask())
            due_s += 1 / self.rate_per_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))

    async def ask(self) -> None:
        answer = Answer(time.monotonic())
        self.answers.append(answer)
        body = {
            "model": "sim",
            "messages": [{"role": "user", "content": f"hello {len(self.answers)}"}],
            "max_tokens": self.words,
        }
        try:
            response = await self._client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
            return
        answer.status = response.status_code
        if response.status_code == 200:
            answer.words = response.json()["usage"]["completion_tokens"]
        else:
            answer.error = response.text

    def failures(self) -> list[Answer]:
        return [each for each in self.answers if each.words != self.words]


async def wait_s(seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Let traffic run for a while: its amount is what a test is about, not its timing."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        await asyncio.to_thread(meanwhile)
        await asyncio.sleep(0.2)


def kill(stack: Stack, *words: str) -> None:
    for process in stack.processes(*words):
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


async def test_routers_fill_idle_engines_together_and_no_further(stack: Stack) -> None:
    """A burst meets three routers that all see the same free places: apart, each takes them all."""
    seen: list[float] = []

    def look() -> None:
        gauges = ("headrace_engine_running", "headrace_engine_waiting")
        seen.append(sum(stack.metric(gauge) for gauge in gauges))

    burst = Load(stack, words=4 * WORDS)
    async with burst.connected(), asyncio.TaskGroup() as group:
        for _ in range(6 * ENGINES * SLOTS):
            group.create_task(burst.ask())
        await wait_s(4, meanwhile=look)
    assert burst.failures() == []
    places = ENGINES * SLOTS
    assert max(seen) >= 0.9 * places, seen
    # Whole places are dealt out by lot, so that each router may be one off at each engine.
    assert max(seen) <= places + ROUTERS * ENGINES, seen


@pytest.mark.parametrize(
    "away_s",
    [pytest.param(8, id="8 s"), pytest.param(60, id="60 s", marks=pytest.mark.proof)],
)
async def test_control_killed_at_three_quarters_load_is_not_noticed(
    stack: Stack, away_s: float
) -> None:
    load = Load(stack, rate_per_s=0.75 * CAPACITY_PER_S)
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
    load = Load(stack, rate_per_s=0.75 * CAPACITY_PER_S)
    async with load.running():
        await wait_s(2)
        victim = stack.processes("gateway", "Router")[0]
        victim.send_signal(signal.SIGKILL)
        # Until its sockets are closed it takes what it will never read.
        await asyncio.to_thread(psutil.wait_procs, [victim], timeout=30)
        killed_at_s = time.monotonic()
        await wait_s(6)
    late = [answer for answer in load.failures() if answer.sent_at_s > killed_at_s]
    assert late == []
    # A third of what is in flight is the most that one router of three holds, and a few.
    assert len(load.failures()) <= ENGINES * SLOTS, load.failures()


async def test_routers_added_and_removed_under_load_fail_nothing(stack: Stack) -> None:
    load = Load(stack, rate_per_s=0.6 * CAPACITY_PER_S)
    async with load.running():
        for count in (ROUTERS + 1, ROUTERS):
            deployed = await asyncio.to_thread(stack.deploy, with_routers(count))
            assert deployed.returncode == 0, deployed.stdout + deployed.stderr
            await asyncio.to_thread(
                until, lambda n=count: they_know_each_other(stack, n), f"{count} routers"
            )
    assert load.failures() == []


async def test_an_engine_paused_for_five_seconds_loses_no_stream(stack: Stack) -> None:
    load = Load(stack, rate_per_s=0.3 * CAPACITY_PER_S)
    async with load.running():
        await wait_s(1)
        paused = stack.processes("pool-sim", "Engine")[0]
        paused.send_signal(signal.SIGSTOP)
        try:
            await wait_s(5)
        finally:
            paused.send_signal(signal.SIGCONT)
        await wait_s(1)
    assert load.failures() == []


async def test_a_thousand_clients_that_connect_and_go_away_leave_nothing(stack: Stack) -> None:
    descriptors = [process.num_fds() for process in stack.processes("gateway", "Router")]

    async def come_and_go(number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", stack.port)
        if number % 3 == 1:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
        if number % 3 == 2:
            body = b'{"model":"sim","messages":[{"role":"user","content":"x"}],"stream":true}'
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
    load = Load(stack, rate_per_s=5)
    async with load.running():
        await wait_s(1)
    assert load.failures() == []

    def settled() -> bool:
        now = [process.num_fds() for process in stack.processes("gateway", "Router")]
        return all(after <= before + 20 for before, after in zip(descriptors, now, strict=True))

    until(settled, "the sockets closed")
