"""Nodes that come and go with the demand: Ray's own autoscaler, a strict Kubernetes, real nodes.

A burst on a pool that sleeps makes Serve want engine replicas, those want GPUs, and the
autoscaler asks Kubernetes for pods; when the pool is idle the pods go, the right ones, and no
request notices any of it. What is applied is the RayService that the chart renders for kind: its
groups, its environment of Ray's processes, its configuration of Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.waiting import until
from tests.kubernetes.cluster import Cluster, running_cluster
from tests.kubernetes.ray_service import rendered
from tests.stack import ROOT

MOST = 2
GROUP = "sim-on-demand"
BODY = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One pool of nought to two replicas that need a GPU each, on nodes that are not there yet."""
    with running_cluster(rendered(values())) as running:
        yield running


def values() -> dict[str, Any]:
    """Return what an operator would add to the kind profile: GPUs, a pool that sleeps, no patience.

    PostgreSQL is SQLite here, and the GCS keeps its state in memory.
    """
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    _, _, gateway = document["applications"]
    replicas = {
        "num_replicas": 0,
        "autoscale": {"min_replicas": 0, "max_replicas": MOST},
        "num_cpus": 1,
        "num_gpus": 1,
    }
    settings = gateway["deployments"][0]["user_config"]["pools"]["sim"]
    settings |= {
        "max_concurrency_per_replica": 8,
        "hold_without_replica_s": 300,
        "queue_timeout_s": 300,
        "early_rejection": False,
        "scaling": {
            "to_zero": True,
            "cold_start_s": 5,
            "fast_s": 2,
            "slow_s": 4,
            "down_after_s": 4,
            "idle_s": 4,
        },
    }
    return {
        "autoscaler": {"idleTimeoutSeconds": 4},
        "pools": {"sim": {"gpus": 1}},
        "serve": {
            "overrides": {
                "control": {"args": {"database": "sqlite:///.headrace/sim.db", "nodes": 1}},
                "pool-sim": {"args": {"replicas": replicas}},
                "gateway": {
                    "args": {"limits": {"hold_plain_s": 300}},
                    "deployments": gateway["deployments"],
                },
            }
        },
    }


@pytest.fixture(autouse=True)
def nothing_forbidden(cluster: Cluster) -> Iterator[None]:
    """No test may leave behind a request that an API server would not have understood."""
    yield
    assert cluster.problems() == []


async def ask(cluster: Cluster, count: int, **fields: Any) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=count)
    headers = {"authorization": f"Bearer {cluster.stack.key}"}
    async with httpx.AsyncClient(
        base_url=cluster.stack.url, timeout=400, limits=limits, headers=headers
    ) as client:
        return await asyncio.gather(*(client.post(CHAT, json=BODY | fields) for _ in range(count)))


@asynccontextmanager
async def load(cluster: Cluster, clients: int, **fields: Any) -> AsyncIterator[list[int]]:
    """Keep so many clients asking for the time of the block; yield the statuses they get."""
    stop = asyncio.Event()
    codes: list[int] = []

    async def client() -> None:
        while not stop.is_set():
            codes.extend(each.status_code for each in await ask(cluster, 1, **fields))

    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    try:
        yield codes
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def eventually(condition: Any, what: str) -> None:
    await asyncio.to_thread(until, condition, what)


def asleep(cluster: Cluster) -> bool:
    """Whether there is neither a worker pod nor the wish for one."""
    groups = cluster.objects.ray_cluster()["spec"]["workerGroupSpecs"]
    [wanted] = [each["replicas"] for each in groups if each["groupName"] == GROUP]
    return not cluster.objects.select({"ray.io/group": GROUP}) and wanted == 0


async def test_from_no_node_to_two_and_back_with_no_held_request_lost(cluster: Cluster) -> None:
    assert asleep(cluster)
    async with load(cluster, 24, max_tokens=300) as codes:
        await eventually(
            lambda: list(cluster.engines("sim", GROUP).values()) == [1] * MOST, "it grew"
        )
        grown = cluster.pods(GROUP)
        await eventually(
            lambda: cluster.stack.metric("headrace_replicas", pool="sim") == MOST, "both serve"
        )
    assert set(codes) == {200}
    assert len(grown) == MOST
    await eventually(lambda: asleep(cluster), "the nodes have gone")
    # A replica may start while another leaves: then there was a third node for a while.
    assert set(grown) <= set(cluster.deleted()) == cluster.objects.ever(GROUP)


@pytest.mark.proof
async def test_an_idle_pod_is_removed_while_a_busy_one_stays(cluster: Cluster) -> None:
    async with load(cluster, 24, max_tokens=300):
        await eventually(lambda: replicas(cluster) == MOST, "both serve")
        pods = cluster.pods(GROUP)
    await eventually(lambda: replicas(cluster) == 1, "one is stopped")
    headers = {"authorization": f"Bearer {cluster.stack.key}"}
    body = BODY | {"max_tokens": 100_000, "stream": True}
    async with (
        httpx.AsyncClient(base_url=cluster.stack.url, timeout=180, headers=headers) as client,
        client.stream("POST", CHAT, json=body) as answer,
    ):
        chunks = answer.aiter_raw()
        assert await anext(chunks)
        await eventually(lambda: len(cluster.pods(GROUP)) == 1, "the idle pod has gone")
        [stays] = cluster.pods(GROUP)
        assert stays in pods
        polls = len(cluster.api.answers)
        await eventually(lambda: len(cluster.api.answers) > polls + 12, "it looks on")
        assert cluster.pods(GROUP) == [stays], "what is busy is not idle"
        assert b'"error"' not in await anext(chunks)
    await eventually(lambda: asleep(cluster), "the nodes have gone")
    assert set(pods) <= set(cluster.deleted())


def replicas(cluster: Cluster) -> float:
    """Return how many replicas the router knows of."""
    return cluster.stack.metric("headrace_replicas", pool="sim")


@pytest.mark.proof
async def test_errors_of_the_api_and_a_pod_that_stays_pending_only_delay(cluster: Cluster) -> None:
    await eventually(lambda: asleep(cluster), "it sleeps")
    cluster.operator.hold(GROUP)
    cluster.api.fail_next("PATCH", "rayclusters", 409, times=2)
    cluster.api.fail_next("GET", "pods", 500, times=2)
    waiting = asyncio.create_task(ask(cluster, 3, max_tokens=20))
    await eventually(lambda: len(cluster.pods(GROUP, "Pending")) == 1, "a pod is asked for")
    assert cluster.api.injected_left() == 0
    polls = len(cluster.api.answers)
    await eventually(lambda: len(cluster.api.answers) > polls + 12, "the autoscaler looks on")
    assert len(cluster.pods(GROUP, "Pending")) == 1, "it asks for one pod once"
    assert not waiting.done()
    assert cluster.stack.http(key=None).get("/ready").status_code == 200

    cluster.operator.release(GROUP)
    assert [each.status_code for each in await waiting] == [200] * 3


@pytest.mark.proof
async def test_another_autoscaler_takes_over_the_pods_of_the_first(cluster: Cluster) -> None:
    [answer] = await ask(cluster, 1, max_tokens=5)
    assert answer.status_code == 200
    before = len(cluster.deleted())
    async with load(cluster, 2, max_tokens=50) as codes:
        pods = cluster.pods(GROUP)
        [first] = cluster.autoscalers()
        first.kill()
        await eventually(
            lambda: [each.pid for each in cluster.autoscalers()] not in ([], [first.pid]),
            "another autoscaler",
        )
        polls = len(cluster.api.answers)
        await eventually(lambda: len(cluster.api.answers) > polls + 12, "it looks on")
        assert cluster.pods(GROUP) == pods
    assert set(codes) == {200}
    await eventually(lambda: asleep(cluster), "the nodes have gone")
    assert set(pods) <= set(cluster.deleted()[before:])


@pytest.mark.proof
async def test_an_evicted_nodes_requests_end_within_its_notice(cluster: Cluster) -> None:
    [answer] = await ask(cluster, 1, max_tokens=5)
    assert answer.status_code == 200
    async with load(cluster, 4, max_tokens=200) as codes:
        victim = cluster.pods(GROUP)[0]
        cluster.operator.evict(victim, notice_s=40)
        await eventually(lambda: victim not in cluster.operator.running(), "it has gone")
        await eventually(lambda: sum(cluster.engines("sim", GROUP).values()) >= 1, "another serves")
        so_far = len(codes)
        await eventually(lambda: len(codes) > so_far + 4, "answers go on")
    assert set(codes) == {200}
    await eventually(lambda: asleep(cluster), "the nodes have gone")
    assert victim not in cluster.deleted()


@pytest.mark.proof
async def test_what_an_eviction_cuts_off_is_told_and_accounted_for(cluster: Cluster) -> None:
    """One stream fits into the notice; the other takes too long, and two choices go on nowhere."""
    [answer] = await ask(cluster, 1, max_tokens=5)
    assert answer.status_code == 200
    [victim] = cluster.pods(GROUP)
    asked: list[dict[str, Any]] = [{"max_tokens": 900}, {"max_tokens": 100_000, "n": 2}]
    ends = [asyncio.create_task(ask(cluster, 1, stream=True, **each)) for each in asked]
    await eventually(
        lambda: cluster.stack.metric("headrace_engine_running", pool="sim") == 3, "both run"
    )
    cluster.operator.evict(victim, notice_s=60)
    [short], [long] = await asyncio.gather(*ends)
    assert short.text.endswith("data: [DONE]\n\n")
    assert '"code":"engine_error"' in long.text.rpartition("data: ")[2]
    await eventually(lambda: victim not in cluster.operator.running(), "it has gone")
    [tokens] = await asyncio.to_thread(cut_off, cluster)
    assert tokens > 900, "the engine's own record came before its disk went"


def cut_off(cluster: Cluster) -> list[int]:
    """Return the tokens of the generations that engines say they could not bring to their end."""
    file = f"file:{cluster.stack.folder}/.headrace/sim.db?mode=ro"
    with contextlib.closing(sqlite3.connect(file, uri=True, timeout=30)) as database:
        rows = database.execute(
            "SELECT output_tokens FROM usage_event WHERE witness = 'engine' AND outcome = 'failed'"
        ).fetchall()
    return [tokens for (tokens,) in rows]


@pytest.mark.proof
async def test_after_the_heads_restart_it_serves_again_on_nodes_of_its_own(
    cluster: Cluster,
) -> None:
    [answer] = await ask(cluster, 1, max_tokens=5)
    assert answer.status_code == 200
    [old] = cluster.pods(GROUP)
    [head] = cluster.heads()
    head.kill()
    await eventually(lambda: ready(cluster) is False, "it is down")
    await eventually(lambda: ready(cluster) is True, "it is up")
    [again] = await ask(cluster, 1, max_tokens=5)
    assert again.status_code == 200
    await eventually(lambda: asleep(cluster), "the nodes have gone")
    assert old not in cluster.operator.running()


def ready(cluster: Cluster) -> bool:
    """Whether the gateway says that it can serve."""
    try:
        with cluster.stack.http(key=None) as client:
            return client.get("/ready").status_code == 200
    except httpx.HTTPError:
        return False
