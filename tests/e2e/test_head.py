"""The Ray head dies, or the Redis that its state is in: others serve on.

The chart's RayService for kind, its worker pods as they are; the only HAProxy is the head's here,
so a router is asked at its own port while that is away.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.e2e.waiting import until
from tests.kubernetes.cluster import Cluster, running_cluster
from tests.kubernetes.ray_service import rendered
from tests.redis import Redis, running_redis

pytestmark = [pytest.mark.proof, pytest.mark.timeout(1200)]

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
AWAY_S = 20.0
# A token each 20 ms or more: longer than the head is away.
WORDS = 2500
SLOW = {"args": {"engine": {"weights_s": 0.02}}}
VALUES = {
    "serve": {
        "overrides": {
            "control": {"args": {"database": "sqlite:///.headrace/sim.db", "nodes": 1}},
            "pool-sim": SLOW,
        }
    }
}


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with running_redis() as running:
        yield running


@pytest.fixture(scope="module")
def cluster(redis: Redis) -> Iterator[Cluster]:
    """A router, Control and two engines on worker pods."""
    with running_cluster(rendered(VALUES), redis=redis, ready_timeout_s=600) as running:
        until(lambda: len(running.replicas()) == 4, "every replica there")
        yield running
        assert running.problems() == []


async def test_without_the_head_others_serve_on_and_nothing_starts_anew(cluster: Cluster) -> None:
    before = cluster.replicas()
    async with asking(cluster) as router:
        stream = asyncio.create_task(to_its_end(router))
        await eventually(lambda: cluster.stack.metric("headrace_engine_running") == 1, "it runs")
        with cluster.without_head():
            await eventually(lambda: is_ready(cluster) is None, "the front port is shut")
            await serves(router)
        since_s = time.monotonic()
        await eventually(lambda: is_ready(cluster) is True, "the front port serves again")
        print(f"served again {time.monotonic() - since_s:.1f} s after the head's start")
        assert await stream == WORDS
    await is_as_before(cluster, before)


async def test_without_redis_others_serve_on_and_nothing_starts_anew(
    cluster: Cluster, redis: Redis
) -> None:
    """Ray's GCS ends with its Redis, and the head with that; no other starts before it is back."""
    before, heads = cluster.replicas(), cluster.heads()
    async with asking(cluster) as router:
        stream = asyncio.create_task(to_its_end(router))
        await eventually(lambda: cluster.stack.metric("headrace_engine_running") == 1, "it runs")
        redis.kill()
        try:
            await serves(router)
            print(f"the head without Redis: {[each.is_running() for each in heads]}")
        finally:
            redis.start()
        since_s = time.monotonic()
        await eventually(lambda: is_ready(cluster) is True, "the front port serves again")
        print(f"served again {time.monotonic() - since_s:.1f} s after Redis was back")
        assert await stream == WORDS
    await is_as_before(cluster, before)


@asynccontextmanager
async def asking(cluster: Cluster) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the router at its own port, as another pod's HAProxy would ask it."""
    [pid] = cluster.replicas("Router")
    settings = cluster.stack.environment
    first, last = (
        int(settings[f"RAY_SERVE_DIRECT_INGRESS_{which}_HTTP_PORT"]) for which in ("MIN", "MAX")
    )
    [port] = {
        each.laddr.port
        for each in psutil.Process(pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN and first <= each.laddr.port <= last
    }
    url, headers = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {cluster.stack.key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as client:
        yield client


async def to_its_end(router: httpx.AsyncClient) -> int:
    """Read a stream of WORDS tokens; return how many it says there were, if it ends well."""
    body = {**BODY, "stream": True, "max_tokens": WORDS}
    body["stream_options"] = {"include_usage": True}
    answer = await router.post(CHAT, json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    *_, usage, done, _ = answer.text.split("\n\n")
    assert done == "data: [DONE]", answer.text[-500:]
    tokens = json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"]
    return int(tokens)


async def serves(router: httpx.AsyncClient) -> None:
    """Ask one request after the other for as long as the head is to be away."""
    statuses: Counter[int] = Counter()
    ends_s = time.monotonic() + AWAY_S
    slowest_s = 0.0
    while time.monotonic() < ends_s:
        asked_s = time.monotonic()
        answer = await router.post(CHAT, json={**BODY, "max_tokens": 5})
        statuses[answer.status_code] += 1
        slowest_s = max(slowest_s, time.monotonic() - asked_s)
    print(f"without the head: {dict(statuses)}, the slowest in {slowest_s:.1f} s")
    assert set(statuses) == {200}


async def is_as_before(cluster: Cluster, before: set[int]) -> None:
    """Wait until Serve's controller has looked at everything; no replica may be another one."""
    await eventually(lambda: has_converged(cluster), "Serve is content")
    polls = len(cluster.api.answers)
    await eventually(lambda: len(cluster.api.answers) > polls + 12, "the autoscaler looks on")
    assert cluster.replicas() == before
    assert cluster.deleted() == []
    with cluster.stack.http() as client:
        answer = await asyncio.to_thread(client.post, CHAT, json={**BODY, "max_tokens": 5})
    assert answer.status_code == 200


def has_converged(cluster: Cluster) -> bool:
    """Tell whether Serve says that every application runs."""
    serve = Path(sys.executable).with_name("serve")
    done = cluster.stack.command(serve, "status", "--address", cluster.dashboard)
    if done.returncode:
        return False
    applications = yaml.safe_load(done.stdout)["applications"]
    return {each["status"] for each in applications.values()} == {"RUNNING"}


async def eventually(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(until, condition, what)


def is_ready(cluster: Cluster) -> bool | None:
    """Tell whether the gateway can serve, by its front port; None if nobody is there."""
    with suppress(httpx.HTTPError), cluster.stack.http(key=None) as client:
        return client.get("/ready", timeout=5).status_code == 200
    return None
