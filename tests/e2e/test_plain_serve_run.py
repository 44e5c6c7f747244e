"""`serve run configs/sim.yaml` as Ray's own documentation would have it: no flags, no `up`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.e2e.sim import replicas_ready
from tests.e2e.waiting import until
from tests.stack import KEY, ROOT, Stack, free_port, ray_flags, running_stack

CHAT = "/v1/chat/completions"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """configs/sim.yaml with nothing changed but its port."""
    assert not ray_flags().keys() & os.environ.keys(), "the flags must not be set already"
    document = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    port = document["http_options"]["port"] = free_port()
    with running_stack(
        document,
        command=(str(Path(sys.executable).with_name("serve")), "run"),
        environment={"HEADRACE_PORT": str(port)},
        fast_path=False,
    ) as running:
        yield running


def test_it_serves_whole_and_streamed(stack: Stack) -> None:
    client = stack.openai()
    whole = client.chat.completions.create(model="sim", messages=HELLO, max_tokens=8)
    stream = client.chat.completions.create(model="sim", messages=HELLO, max_tokens=8, stream=True)
    words = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert words == whole.choices[0].message.content
    assert len(words.split()) == 8


async def test_it_serves_many_at_once_on_both_replicas(stack: Stack) -> None:
    async with stack.async_openai() as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model="sim", messages=HELLO, max_tokens=8)
                for _ in range(24)
            )
        )
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_the_screen_is_not_filled_with_calls_between_our_own_processes(stack: Stack) -> None:
    assert "heartbeat OK" not in stack.output()
    assert "report_metrics OK" not in stack.output()


def test_it_says_that_the_fast_path_is_off(stack: Stack) -> None:
    until(lambda: replicas_ready(stack, "sim") == 2, "both replicas")
    with stack.http(key=None) as client:
        ready = client.get("/ready").json()
    assert ready["fast_path"] is False
    assert any("fast path is off" in note for note in ready["notes"])
    assert ready["pools"] == {"sim": {"ready": True, "replicas": 2}}
    assert "fast path is off" in stack.output()
    assert not stack.processes("haproxy", "-f")


def test_errors_keep_their_shape(stack: Stack) -> None:
    with pytest.raises(openai.AuthenticationError):
        stack.openai(api_key="wrong-key").models.list()
    with pytest.raises(openai.NotFoundError) as caught:
        stack.openai().chat.completions.create(model="none", messages=HELLO)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        stack.openai().chat.completions.create(model="sim", messages=[])
    assert refused.value.param == "messages"


def test_every_response_is_named_once(stack: Stack) -> None:
    with stack.http() as client:
        answers = [
            client.get("/v1/models", headers={"x-request-id": "mine"}),
            client.get("/nowhere", headers={"x-request-id": "mine"}),
            client.post(
                CHAT,
                json={"model": "sim", "messages": HELLO, "max_tokens": 2},
                headers={"x-request-id": "mine"},
            ),
        ]
    assert [answer.headers.get_list("x-request-id") for answer in answers] == [["mine"]] * 3
    assert answers[-1].headers["x-headrace-request-id"].startswith("req_")


def test_a_client_that_leaves_ends_its_generation(stack: Stack) -> None:
    def cancelled() -> float:
        return stack.metric("headrace_engine_requests_total", outcome="cancelled")

    before = cancelled()
    body = {"model": "sim", "messages": HELLO, "max_tokens": 100_000, "stream": True}
    with stack.http() as client, client.stream("POST", CHAT, json=body) as answer:
        next(answer.iter_bytes())
    until(lambda: cancelled() == before + 1, "the engine's cancellation")
    until(lambda: stack.metric("headrace_in_flight") == 0, "an empty router")


def test_the_key_is_printed_nowhere(stack: Stack) -> None:
    assert KEY not in stack.output()
    assert KEY not in stack.ray_logs()
