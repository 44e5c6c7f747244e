"""Steady load for long, and a client that does not keep up: nothing grows, nothing stays."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import yaml

from benchmarks.overhead.load import Generator, Tally, Workload
from tests.e2e.memory import Memory
from tests.e2e.waiting import is_idle, until
from tests.stack import ROOT, ROUTER_PORTS, Stack, running_stack

ROLES = {
    "router": ("gateway", "Router"),
    "engine": ("pool-sim", "Engine"),
    "control": ("control", "Control"),
    "haproxy": ("haproxy",),
}
# Some 70 MB: more than kernels keep for the two connections on the way, up to 33 MiB each.
LONG_TOKENS = 400_000
SHARE_OF_LIMIT = 0.7
# A load under which requests wait longer is not steady; less than so much shows no leak.
WAITED_S = 0.5
LEAST_PER_S = 25.0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    _, pool, gateway = document["applications"]
    pool["args"]["engine"] |= {
        "zero_latency": True,
        "max_model_len": 2 * LONG_TOKENS,
        "kv_blocks": 4 * LONG_TOKENS // 16,
    }
    # What two busy cores leave undone for a moment waits; refusing it is other tests' subject.
    policy = gateway["deployments"][0]["user_config"]["pools"]["sim"]
    policy |= {"queue_capacity": 8192, "queue_timeout_s": 60, "early_rejection": False}
    gateway["args"]["channel"] = {"stream_buffer_bytes": 64 * 1024}
    gateway["args"]["limits"] = {"max_output_tokens": LONG_TOKENS}
    for application in document["applications"][1:]:
        application["args"].setdefault("control", {})["metrics_period_s"] = 0.5
    with running_stack(document) as running:
        yield running


def load(stream: bool, rate_per_s: float | None = None) -> Workload:
    return Workload(
        "soak",
        "sim",
        stream=stream,
        output_tokens=50 if stream else 8,
        concurrency=16,
        rate_per_s=rate_per_s,
    )


async def send(stack: Stack, workload: Workload, duration_s: float) -> Tally:
    """Send for a while; return what came of it, checked by nobody yet."""
    return await Generator(stack.url, stack.key, workload).run(duration_s)


def whole_answers(tally: Tally) -> int:
    assert tally.failures == 0, tally.errors
    return len(tally.latencies_s)


def descriptors(stack: Stack) -> int:
    """Count routers' and engines', but for the connections that HAProxy keeps for its next request.

    One that only the router still holds is counted: it is not established any more.
    """
    routers, engines = (stack.processes(*ROLES[role]) for role in ("router", "engine"))
    held = sum(process.num_fds() for process in (*routers, *engines))
    return held - len(from_haproxy(stack))


def from_haproxy(stack: Stack) -> list[Any]:
    """Return the open connections to the router's own port."""
    first = int(stack.environment["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    return [
        connection
        for router in stack.processes(*ROLES["router"])
        for connection in router.net_connections()
        if connection.status == psutil.CONN_ESTABLISHED
        and connection.laddr.port in range(first, first + ROUTER_PORTS)
    ]


def goes_straight_to_the_router(stack: Stack) -> bool:
    """Whether HAProxy knows the router: before, Serve's own proxy stands in and buffers all."""
    with stack.http() as client:
        client.get("/v1/models").raise_for_status()
        return bool(from_haproxy(stack))


async def test_a_client_that_reads_a_byte_at_a_time_is_cut_off_and_nobody_else_notices(
    stack: Stack,
) -> None:
    """Of some 70 MB the router keeps 64 KiB, and the kernel's buffers a part."""
    until(lambda: goes_straight_to_the_router(stack), "the fast path")
    failed = stack.metric("headrace_requests_total", outcome="failed")
    body = json.dumps(
        {
            "model": "sim",
            "messages": [{"role": "user", "content": "a very long story"}],
            "max_tokens": LONG_TOKENS,
            "stream": True,
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {stack.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", stack.port))
        slow.sendall((head + body).encode())

        def cut_off() -> bool:
            slow.recv(1)
            return stack.metric("headrace_requests_total", outcome="failed") > failed

        others = asyncio.create_task(send(stack, load(True, 50), 3))
        await asyncio.to_thread(until, cut_off, "the slow client cut off")
    assert whole_answers(await others) == 150
    until(lambda: is_idle(stack), "its slot free")
    assert stack.metric("headrace_engine_tokens_total", kind="wasted") < LONG_TOKENS
    assert stack.metric("headrace_responses_total", status="408") == 1


@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(60, id="1 minute"),
        pytest.param(1800, id="30 minutes", marks=(pytest.mark.proof, pytest.mark.timeout(3600))),
    ],
)
async def test_steady_load_leaks_no_memory_stream_slot_or_socket(
    stack: Stack, duration_s: float
) -> None:
    """At 70 % of what the stack can do, plain answers and streams side by side."""
    before = descriptors(stack)
    # Measured together, as they are sent: what one kind can do alone says little of both.
    tallies = await asyncio.gather(*(send(stack, load(stream), 5) for stream in (False, True)))
    plain_per_s, streams_per_s = (
        SHARE_OF_LIMIT * whole_answers(tally) / tally.wall_s for tally in tallies
    )
    while True:
        with Memory(stack, ROLES) as memory:
            tallies = await asyncio.gather(
                send(stack, load(False, plain_per_s), duration_s),
                send(stack, load(True, streams_per_s), duration_s),
            )
        latencies_s = [each for tally in tallies for each in tally.latencies_s]
        print(f"{len(latencies_s)} of {plain_per_s:.0f} + {streams_per_s:.0f}/s in {duration_s} s")
        print(f"growth in MiB: {memory.growth_mib()}; at each tenth: {memory.course_mib()}")
        print(f"the slowest took {max(latencies_s):.1f} s")
        answers = sum(whole_answers(tally) for tally in tallies)
        assert answers >= 0.99 * (plain_per_s + streams_per_s) * duration_s
        if not memory.grown() or max(latencies_s) < WAITED_S or plain_per_s < LEAST_PER_S:
            break
        # The machine fell behind: what waited had to be kept somewhere, and allocators keep that.
        plain_per_s, streams_per_s = plain_per_s / 2, streams_per_s / 2
    assert memory.grown() == {}
    until(lambda: is_idle(stack), "no slot held")
    until(lambda: descriptors(stack) <= before + 16, "the sockets closed")
