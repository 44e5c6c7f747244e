"""A changed configuration on a running stack, `serve deploy`; in the end, its end."""

from __future__ import annotations

import asyncio
import copy
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.e2e.sim import replicas_ready
from tests.e2e.traffic import Load
from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
STEP_S = 0.05
LONG_TOKENS = 400
ROUTERS = 2
WORDS = 10
# With one engine of plenty of places a request takes half a second: six at a time.
RATE_PER_S = 12.0


def document(pools: list[str], aliases: dict[str, str], routers: int = ROUTERS) -> dict[str, Any]:
    """Return simulated pools of these names, one engine each with a token every 50 ms."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    control, template, gateway = found["applications"]
    applications = [control]
    for name in pools:
        pool = copy.deepcopy(template)
        pool["name"] = f"pool-{name}"
        pool["args"]["name"] = name
        pool["args"]["engine"]["weights_s"] = STEP_S
        pool["args"]["replicas"] = {"num_replicas": 1, "num_cpus": 0.1}
        applications.append(pool)
    gateway["args"]["replicas"] = {"num_replicas": routers, "num_cpus": 0.1}
    gateway["deployments"][0]["user_config"] = {
        "pools": {name: {"stale_after_s": 10.0} for name in pools},
        "aliases": aliases,
    }
    found["applications"] = [*applications, gateway]
    return found


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack(document(["old"], {"old": "old"})) as running:
        # One router makes a stack ready; the other may take longer.
        until(lambda: len(router_pids(running)) == ROUTERS, "both routers")
        yield running


def deploy(stack: Stack, pools: list[str], aliases: dict[str, str], routers: int = ROUTERS) -> None:
    done = stack.deploy(document(pools, aliases, routers))
    assert done.returncode == 0, done.stdout + done.stderr


def router_pids(stack: Stack) -> list[int]:
    return sorted(process.pid for process in stack.processes("ServeReplica:gateway:Router"))


def models(stack: Stack) -> set[str]:
    with stack.http() as client:
        found = client.get("/v1/models").raise_for_status().json()
    return {model["id"] for model in found["data"]}


def everywhere(stack: Stack, wanted: set[str]) -> bool:
    """Whether the routers, asked over fresh connections, all list just these models."""
    return all(models(stack) == wanted for _ in range(12))


def known_everywhere(stack: Stack, pool: str) -> bool:
    """Whether the routers, asked over fresh connections, all send to a pool's engine."""
    return all(replicas_ready(stack, pool) == 1 for _ in range(12))


def ask(stack: Stack, model: str) -> str:
    answer = stack.openai().chat.completions.create(model=model, messages=HELLO, max_tokens=4)
    return answer.choices[0].message.content or ""


def serves(stack: Stack, model: str) -> bool:
    try:
        return ask(stack, model) != ""
    except (openai.APIError, httpx.HTTPError):
        return False


def test_aliases_and_pools_come_and_go_under_running_routers(stack: Stack) -> None:
    routers = router_pids(stack)
    assert len(routers) == 2
    assert ask(stack, "old")

    deploy(stack, ["old"], {"old": "old", "nickname": "old"})
    until(lambda: everywhere(stack, {"old", "nickname"}), "the new alias on every router")
    assert ask(stack, "nickname") == ask(stack, "old")

    deploy(stack, ["old", "new"], {"old": "old", "new": "new"})
    until(lambda: everywhere(stack, {"old", "new"}), "the new pool on every router")
    until(lambda: known_everywhere(stack, "new"), "the new pool's engine known to every router")
    assert serves(stack, "new")
    with pytest.raises(openai.NotFoundError):
        ask(stack, "nickname")
    assert router_pids(stack) == routers

    # The old pool is taken away under a running stream, which ends as if nothing were.
    chunks = iter(
        stack.openai().chat.completions.create(
            model="old", messages=HELLO, max_tokens=LONG_TOKENS, stream=True
        )
    )
    words = [next(chunks).choices[0].delta.content or "" for _ in range(3)]
    deploy(stack, ["new"], {"new": "new"})
    until(lambda: everywhere(stack, {"new"}), "the old pool gone from every router")
    with pytest.raises(openai.NotFoundError) as caught:
        ask(stack, "old")
    assert caught.value.code == "model_not_found"
    last = None
    for last in chunks:
        words.append(last.choices[0].delta.content or "")
    assert last is not None
    assert last.choices[0].finish_reason == "length"
    assert len("".join(words).split()) == LONG_TOKENS

    assert ask(stack, "new")
    assert router_pids(stack) == routers
    until(lambda: not stack.processes("ServeReplica:pool-old"), "the old engine's end")
    with stack.http(key=None) as client:
        assert client.get("/ready").json()["pools"].keys() == {"new"}

    # A pool that comes back under its old name is served by its new engine.
    deploy(stack, ["new", "old"], {"new": "new", "old": "old"})
    until(lambda: serves(stack, "old"), "an answer of the pool that came back")
    until(lambda: everywhere(stack, {"new", "old"}), "the pool that came back on every router")
    assert router_pids(stack) == routers


def test_a_configuration_that_cannot_be_served_changes_nothing(stack: Stack) -> None:
    before, routers = models(stack), router_pids(stack)
    wrong = document(["new"], {"new": "new"})
    wrong["applications"][-1]["deployments"][0]["user_config"]["aliases"]["x"] = "nowhere"
    stack.deploy(wrong)
    until(lambda: "pools are: new" in stack.ray_logs(), "the refusal, with what to do, in a log")
    assert everywhere(stack, before)
    assert router_pids(stack) == routers


def routers_known(stack: Stack) -> int:
    """Return how many routers report to Control; -1 while the one that was asked is leaving."""
    try:
        return int(stack.metric("headrace_control_processes", role="router"))
    except httpx.HTTPError:
        return -1


@pytest.mark.parametrize(
    "lasting_s",
    [pytest.param(30, id="30 s"), pytest.param(150, id="150 s", marks=pytest.mark.proof)],
)
async def test_routers_come_and_go_and_neither_a_stream_nor_a_request_fails(
    stack: Stack, lasting_s: float
) -> None:
    """150 s is longer than an HAProxy that was replaced keeps its streams by default."""
    pools, aliases = ["new"], {"new": "new"}
    tokens = int(lasting_s / STEP_S)

    async def long_stream() -> list[str]:
        events = await stack.async_openai(timeout=400).chat.completions.create(
            model="new", messages=HELLO, max_tokens=tokens, stream=True
        )
        return [c.delta.content async for e in events for c in e.choices if c.delta.content]

    started_at_s = time.monotonic()
    story = asyncio.create_task(long_stream())
    load = Load(stack, "new", WORDS, RATE_PER_S)
    async with load.running():
        await asyncio.to_thread(
            until, lambda: stack.metric("headrace_engine_running") > 0, "the stream running"
        )
        # A router that holds a stream lives on beside those that are wanted.
        for count, at_most in ((3, 3), (1, 2)):
            await asyncio.to_thread(deploy, stack, pools, aliases, count)
            await asyncio.to_thread(
                until,
                lambda least=count, most=at_most: least <= routers_known(stack) <= most,
                f"a change to {count} routers",
            )
    assert load.failures() == []
    assert len("".join(await story).split()) == tokens
    assert time.monotonic() - started_at_s > lasting_s, "it lasted as long as it should"
    until(lambda: stack.metric("headrace_engine_running") == 0, "no slot leaked")


def test_a_signal_ends_it_quietly_though_a_stream_is_open(stack: Stack) -> None:
    """The last test of this stack."""
    chunks = iter(
        stack.openai().chat.completions.create(
            model="new", messages=HELLO, max_tokens=50_000, stream=True
        )
    )
    next(chunks)
    [up] = [each for each in stack.processes("serve_app.cli", "up") if each.name() != "bash"]

    up.send_signal(signal.SIGTERM)

    # Ray's own handler would print a trace and abort.
    assert stack.root.wait(timeout=240) == 0
    assert stack.output().rstrip().endswith("stopping"), stack.output()
