"""The same overload live and in the simulator: what the policies promise is what happens."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from dataclasses import dataclass

import httpx
import pytest

from serve_app.config_policy import PoolPolicy
from serve_app.core.engine_model import EngineParams
from serve_app.core.types import Outcome, PoolName, PriorityClass, TenantId
from serve_app.sim.records import Question
from serve_app.sim.setup import PoolSetup, Setup, Slo
from serve_app.sim.simulator import replay
from serve_app.sim.workload import Arrival
from tests.e2e.keys import make_key
from tests.e2e.memory import Memory
from tests.e2e.policies import SLOW, SLOW_POLICY
from tests.e2e.waiting import is_idle, until
from tests.stack import Stack

RATE_PER_S, DURATION_S, WARMUP_S = 24.0, 40.0, 10.0
TTFT_SLOS_S = (2.0, 4.0, 8.0)
TPOT_SLO_S = 0.3
AGREEMENT = 0.15
RETRIES, RETRY_S = 2, 0.5
RUNS, STALL_S = 3, 1.0
ROLES = {
    "router": ("gateway", "Router"),
    "engine": ("pool-slow", "Engine"),
    "control": ("control", "Control"),
    "haproxy": ("haproxy",),
}
TENANTS = ("load-a", "load-b", "load-c")
TIERS = {
    PriorityClass.CRITICAL: "priority",
    PriorityClass.STANDARD: "default",
    PriorityClass.SHEDDABLE: "flex",
}


@dataclass(frozen=True)
class Fate:
    """What became of one arrival, seen by its client."""

    completed: bool
    ttft_s: float = 0.0
    tpot_s: float = 0.0


@dataclass(frozen=True)
class Asking:
    """One run: no prompt of it begins as another run's."""

    client: httpx.AsyncClient
    name: str
    began_s: float
    retries: int


def overload(rate_per_s: float = RATE_PER_S, duration_s: float = DURATION_S) -> list[Arrival]:
    """Return by default twice what two slow replicas can do, 20/30/50 % by class."""
    source = random.Random(7)
    found: list[Arrival] = []
    at_s = 0.0
    while True:
        at_s += source.expovariate(rate_per_s)
        if at_s >= duration_s:
            return found
        [rank] = source.choices((0, 1, 2), (0.2, 0.3, 0.5))
        output_tokens = source.randint(10, 40)
        arrival = Arrival(
            arrival_s=at_s,
            tenant=TenantId(source.choice(TENANTS)),
            priority_class=PriorityClass(rank),
            prompt_tokens=source.randint(200, 600),
            output_tokens=output_tokens,
            max_tokens=output_tokens,
        )
        found.append(arrival)


def figures(arrivals: list[Arrival], fates: list[Fate]) -> tuple[float, float]:
    """Return goodput per second and the share refused, of what arrived after the warm-up."""
    measured_s = arrivals[-1].arrival_s - WARMUP_S
    measured = [
        (arrival, fate)
        for arrival, fate in zip(arrivals, fates, strict=True)
        if arrival.arrival_s >= WARMUP_S
    ]
    good = sum(
        fate.completed
        and fate.ttft_s <= TTFT_SLOS_S[arrival.priority_class]
        and fate.tpot_s <= TPOT_SLO_S
        for arrival, fate in measured
    )
    refused = sum(not fate.completed for _, fate in measured)
    return good / measured_s, refused / len(measured)


def simulated(arrivals: list[Arrival]) -> list[Fate]:
    pool = PoolSetup(
        PoolName("slow"),
        PoolPolicy.model_validate(SLOW_POLICY).to_core(),
        EngineParams(**SLOW),  # type: ignore[arg-type]
        replicas=2,
    )
    setup = Setup((pool,), DURATION_S, WARMUP_S, target=Slo(TTFT_SLOS_S, TPOT_SLO_S))
    run = replay(setup, iter(arrivals), seed=0)

    def fate(question: Question) -> Fate:
        if question.outcome is not Outcome.COMPLETED or question.ttft_s is None:
            return Fate(False)
        return Fate(True, question.ttft_s, question.tpot_s)

    return [fate(question) for question in run.questions]


async def live(
    stack: Stack, keys: dict[str, str], arrivals: list[Arrival], retries: int = 0
) -> list[Fate]:
    """Send them all; again, a few times, where a process stood still: that measures nothing."""
    for _ in range(RUNS):
        before = stalls(stack)
        fates, longest_s = await run(stack, keys, arrivals, retries)
        await asyncio.to_thread(until, lambda: is_idle(stack), "everything answered")
        if longest_s <= STALL_S and stalls(stack) == before:
            break
        print(f"a process stood still: {longest_s:.1f} s this one, {stalls(stack) - before} others")
    return fates


def stalls(stack: Stack) -> float:
    """Return how often a loop of the stack was late by more than STALL_S."""
    name = "headrace_event_loop_lag_seconds"
    return stack.metric(f"{name}_count") - stack.metric(f"{name}_bucket", le=str(STALL_S))


async def run(
    stack: Stack, keys: dict[str, str], arrivals: list[Arrival], retries: int
) -> tuple[list[Fate], float]:
    """Return what became of each, and by how much our own loop was late at most."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            asleep_s = time.monotonic()
            await asyncio.sleep(0.1)
            longest_s = max(longest_s, time.monotonic() - asleep_s - 0.1)

    watching = asyncio.create_task(watch())
    async with httpx.AsyncClient(base_url=stack.url, timeout=120, limits=limits) as client:
        asking = Asking(client, secrets.token_hex(4), time.monotonic() + 0.5, retries)
        fates = await asyncio.gather(*(one(asking, keys[each.tenant], each) for each in arrivals))
    watching.cancel()
    return fates, longest_s


async def one(asking: Asking, key: str, arrival: Arrival) -> Fate:
    """Ask at the arrival's time, and again soon after each refusal; times are the last try's."""
    await asyncio.sleep(max(0.0, asking.began_s + arrival.arrival_s - time.monotonic()))
    fate = await ask(asking, key, arrival)
    for _ in range(asking.retries):
        if fate.completed:
            break
        await asyncio.sleep(RETRY_S)
        fate = await ask(asking, key, arrival)
    return fate


async def ask(asking: Asking, key: str, arrival: Arrival) -> Fate:
    """Follow one stream, event by event."""
    body = {
        "model": "slow",
        # A token of the simulated engine is four bytes; no two prompts begin alike.
        "prompt": f"{asking.name} {arrival.arrival_s:<4.15f} ".ljust(
            4 * arrival.prompt_tokens, "x"
        ),
        "max_tokens": arrival.max_tokens,
        "stream": True,
        "service_tier": TIERS[arrival.priority_class],
    }
    asked_s = time.monotonic()
    headers = {"authorization": f"Bearer {key}"}
    first_s = last_s = None
    posted = asking.client.stream("POST", "/v1/completions", json=body, headers=headers)
    async with posted as answer:
        if answer.status_code != 200:
            assert answer.status_code in (429, 503), await answer.aread()
            assert int(answer.headers["retry-after"]) >= 1
            return Fate(False)
        async for chunk in answer.aiter_raw():
            if b"data:" in chunk:
                last_s = time.monotonic()
                first_s = first_s or last_s
    assert first_s is not None
    assert last_s is not None
    between_s = (last_s - first_s) / max(1, arrival.output_tokens - 1)
    return Fate(True, first_s - asked_s, between_s)


def make_keys(stack: Stack) -> dict[str, str]:
    return {name: make_key(stack, tenant=name, priority_ceiling="critical") for name in TENANTS}


async def test_an_overload_ends_live_as_in_the_simulator(policies_stack: Stack) -> None:
    """Twice the capacity for forty seconds: goodput and the share refused, within 15 %."""
    arrivals = overload()
    expected_per_s, expected_shed = figures(arrivals, simulated(arrivals))
    fates = await live(policies_stack, make_keys(policies_stack), arrivals)
    goodput_per_s, shed = figures(arrivals, fates)

    report = (
        f"live {goodput_per_s:.2f} good/s, {shed:.3f} refused; "
        f"simulated {expected_per_s:.2f} good/s, {expected_shed:.3f} refused"
    )
    print(report)
    assert expected_shed > 0.2, "it is no overload"
    assert goodput_per_s == pytest.approx(expected_per_s, rel=AGREEMENT), report
    assert shed == pytest.approx(expected_shed, rel=AGREEMENT), report


@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(60, id="1 minute"),
        pytest.param(600, id="10 minutes", marks=(pytest.mark.proof, pytest.mark.timeout(2400))),
    ],
)
async def test_clients_that_retry_take_nothing_from_those_that_are_served_in_time(
    policies_stack: Stack, duration_s: float
) -> None:
    """At twice the capacity goodput stays within 5 % of the knee's; no process grows."""
    knee = overload(RATE_PER_S / 2)
    knee_per_s, _ = figures(knee, simulated(knee))
    arrivals = overload(duration_s=duration_s)
    with Memory(policies_stack, ROLES) as memory:
        fates = await live(policies_stack, make_keys(policies_stack), arrivals, RETRIES)
    goodput_per_s, shed = figures(arrivals, fates)

    report = f"{goodput_per_s:.2f} good/s, {shed:.3f} refused; {knee_per_s:.2f} good/s at the knee"
    print(report, memory.growth_mib())
    assert shed > 0.2, "it is no overload"
    assert goodput_per_s >= 0.95 * knee_per_s, report
    assert memory.grown() == {}
