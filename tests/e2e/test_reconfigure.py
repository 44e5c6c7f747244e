"""A changed configuration on a running stack: `serve deploy`, and no router restarts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
LONG_TOKENS = 4000


def document(pools: list[str], aliases: dict[str, str]) -> dict[str, Any]:
    """Return simulated pools of these names, one engine each, behind two routers."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    control, template, gateway = found["applications"]
    applications = [control]
    for name in pools:
        pool = copy.deepcopy(template)
        pool["name"] = f"pool-{name}"
        pool["args"]["name"] = name
        pool["args"]["replicas"] = {"num_replicas": 1, "num_cpus": 0.1}
        applications.append(pool)
    gateway["args"]["replicas"] = {"num_replicas": 2, "num_cpus": 0.1}
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
        until(lambda: len(router_pids(running)) == 2, "both routers")
        yield running


def deploy(stack: Stack, pools: list[str], aliases: dict[str, str]) -> None:
    done = stack.deploy(document(pools, aliases))
    assert done.returncode == 0, done.stdout + done.stderr


def router_pids(stack: Stack) -> list[int]:
    return sorted(process.pid for process in stack.processes("ServeReplica:gateway:Router"))


def models(stack: Stack) -> set[str]:
    with stack.http() as client:
        return {model["id"] for model in client.get("/v1/models").json()["data"]}


def everywhere(stack: Stack, wanted: set[str]) -> bool:
    """Whether the routers, asked over fresh connections, all list just these models."""
    return all(models(stack) == wanted for _ in range(12))


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
    until(lambda: serves(stack, "new"), "an answer of the new pool")
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
    assert router_pids(stack) == routers


def test_a_configuration_that_cannot_be_served_changes_nothing(stack: Stack) -> None:
    before, routers = models(stack), router_pids(stack)
    wrong = document(["new"], {"new": "new"})
    wrong["applications"][-1]["deployments"][0]["user_config"]["aliases"]["x"] = "nowhere"
    stack.deploy(wrong)
    until(lambda: "pools are: new" in stack.ray_logs(), "the refusal, with what to do, in a log")
    assert everywhere(stack, before)
    assert router_pids(stack) == routers
