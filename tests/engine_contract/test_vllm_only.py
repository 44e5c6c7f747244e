"""What only the real engine can show: a model's answers, and vLLM's own scheduling.

The test that kills the engine of the session is marked as the last one.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import psutil
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from serve_app import models
from serve_app.core.types import Outcome, PriorityClass, RequestId, Usage
from serve_app.engine.api import (
    Endpoint,
    EngineDead,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    Metered,
    Refusal,
)
from serve_app.engine.health import EngineHealth
from serve_app.engine.vllm import VllmEngine

pytestmark = [
    pytest.mark.model,
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("engine", ["vllm"], indirect=True),
]

PARIS = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
GREEDY = {"temperature": 0, "max_tokens": 24}
LONG = PARIS | {"temperature": 0, "max_tokens": 600, "ignore_eos": True}
WAIT_S = 300

Streams = list[AsyncGenerator[GenerateItem, None]]


class Ids:
    """Request ids no test has used before."""

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> RequestId:
        self._last += 1
        return RequestId(f"vllm-only-{self._last}")


IDS = Ids()


def chat(body: dict[str, Any], **changes: Any) -> GenerateCall:
    fields: dict[str, Any] = {
        "request_id": IDS.next(),
        "endpoint": Endpoint.CHAT,
        "body": json.dumps({"model": "any"} | body).encode(),
        "stream": False,
        "tenant": "t",
        "cache_salt": "salt-t",
        "priority_class": PriorityClass.STANDARD,
    }
    return GenerateCall(**(fields | changes))


def completion(body: dict[str, Any], **changes: Any) -> GenerateCall:
    return chat(body, endpoint=Endpoint.COMPLETIONS, **changes)


async def read(engine: VllmEngine, call: GenerateCall) -> tuple[list[Frame], Final]:
    async with asyncio.timeout(WAIT_S):
        items: list[GenerateItem] = [item async for item in engine.generate(call)]
    *frames, final = items
    assert isinstance(final, Final), final
    return [frame for frame in frames if isinstance(frame, Frame)], final


async def answer(engine: VllmEngine, call: GenerateCall) -> tuple[dict[str, Any], Final]:
    (frame,), final = await read(engine, call)
    return json.loads(frame.data), final


def _random_call(dice: random.Random) -> GenerateCall:
    body: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True, "n": dice.choice([1, 1, 2])}
    stream = dice.random() < 0.6
    if dice.random() < 0.5:
        return chat(PARIS | body, stream=stream)
    return completion(body | {"prompt": dice.choice(["One", ["One", "Two"]])}, stream=stream)


async def exhaust(stream: AsyncGenerator[GenerateItem, None]) -> None:
    async with asyncio.timeout(WAIT_S):
        async for _ in stream:
            pass


def tokens(final: Final) -> Usage:
    """Return what a generation counted; its engine's and cache's time are its own."""
    return dataclasses.replace(final.usage, engine_s=0.0, kv_block_us=0)


async def refused(engine: VllmEngine, call: GenerateCall) -> Refusal:
    (item,) = [item async for item in engine.generate(call)]
    assert isinstance(item, Refusal), item
    return item


def events(frames: list[Frame]) -> list[dict[str, Any]]:
    *chunks, done, rest = b"".join(frame.data for frame in frames).decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]


def delta_text(frames: list[Frame]) -> str:
    choices = [choice for event in events(frames) for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for the engine's state; there is no event to wait for, so look again and again."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - the engine is another process
            await asyncio.sleep(0.005)


@pytest.fixture
def metered(engine: VllmEngine) -> Callable[[GenerateCall], Awaitable[Metered]]:
    """Return a function that waits for the account of a call."""
    heard: dict[RequestId, list[Metered]] = {}
    engine.on_metered(lambda m: heard.setdefault(m.request_id, []).append(m))

    async def account(call: GenerateCall) -> Metered:
        await until(lambda: call.request_id in heard)
        (only,) = heard[call.request_id]
        return only

    return account


@pytest_asyncio.fixture(loop_scope="session")
async def busy(engine: VllmEngine) -> AsyncIterator[Streams]:
    """Fill every slot of the engine with a long stream."""
    slots = engine.snapshot().slots
    streams = [engine.generate(chat(LONG, stream=True)) for _ in range(slots)]
    async with asyncio.timeout(WAIT_S):
        for stream in streams:
            await anext(stream)
    yield streams
    for stream in streams:
        await stream.aclose()


async def test_the_chat_template_makes_the_model_answer_the_question(engine: VllmEngine) -> None:
    body, final = await answer(engine, chat(PARIS | GREEDY))
    text = body["choices"][0]["message"]["content"]
    assert "Paris" in text
    frames, streamed = await read(engine, chat(PARIS | GREEDY, stream=True))
    assert delta_text(frames) == text
    assert tokens(streamed) == tokens(final)
    assert final.finish_reason == streamed.finish_reason == "stop"
    assert body["usage"]["prompt_tokens"] == final.usage.prompt_tokens
    assert body["usage"]["completion_tokens"] == final.usage.completion_tokens


async def test_every_frames_ids_stand_for_the_text_so_far(engine: VllmEngine) -> None:
    path = models.resolve("smollm2", models.default_cache_dir())
    from transformers import AutoTokenizer  # seconds, and torch

    tokenizer = AutoTokenizer.from_pretrained(path)
    frames, final = await read(engine, chat(PARIS | GREEDY, stream=True))
    ids: list[int] = []
    for count, frame in enumerate(frames, start=1):
        ids += frame.token_ids
        text = "".join(
            choice["delta"].get("content") or ""
            for event in b"".join(f.data for f in frames[:count]).decode().split("\n\n")
            if event.startswith("data: {")
            for choice in json.loads(event.removeprefix("data: "))["choices"]
        )
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) == final.usage.completion_tokens


async def test_choices_share_a_prompt_and_all_their_tokens_count(engine: VllmEngine) -> None:
    wanted = PARIS | {"n": 2, "max_tokens": 6, "temperature": 1.0, "seed": 1}
    body, final = await answer(engine, chat(wanted))
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert final.usage.completion_tokens == body["usage"]["completion_tokens"]
    frames, streamed = await read(engine, chat(wanted, stream=True))
    assert {c["index"] for event in events(frames) for c in event["choices"]} == {0, 1}
    ids = [token for frame in frames for token in frame.token_ids]
    assert len(ids) == streamed.usage.completion_tokens
    assert streamed.usage.prompt_tokens == final.usage.prompt_tokens


async def test_several_prompts_of_a_completion_add_up(engine: VllmEngine) -> None:
    wanted = {"prompt": ["Paris is", "One, two, three,"], "max_tokens": 5, "temperature": 0}
    body, final = await answer(engine, completion(wanted))
    assert body["usage"]["prompt_tokens"] == final.usage.prompt_tokens
    assert body["usage"]["completion_tokens"] == final.usage.completion_tokens
    frames, streamed = await read(engine, completion(wanted, stream=True))
    assert tokens(streamed) == tokens(final)
    assert sum(len(frame.token_ids) for frame in frames) == final.usage.completion_tokens


async def test_logprobs_have_one_entry_per_token(engine: VllmEngine) -> None:
    wanted = PARIS | GREEDY | {"logprobs": True, "top_logprobs": 2}
    body, final = await answer(engine, chat(wanted))
    content = body["choices"][0]["logprobs"]["content"]
    assert len(content) == final.usage.completion_tokens
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


async def test_structured_output_obeys_its_schema(engine: VllmEngine) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    wanted = PARIS | {
        "temperature": 0,
        "max_tokens": 60,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    }
    body, _ = await answer(engine, chat(wanted))
    value = json.loads(body["choices"][0]["message"]["content"])
    assert value["city"] in ("Paris", "Rome")
    assert isinstance(value["big"], bool)


async def test_a_forced_tool_is_called_with_arguments_of_its_schema(engine: VllmEngine) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    function = {"name": "weather", "parameters": parameters, "strict": True}
    tool = {"type": "function", "function": function}
    choice = {"type": "function", "function": {"name": "weather"}}
    wanted = PARIS | {"temperature": 0, "max_tokens": 60, "tools": [tool], "tool_choice": choice}
    body, _ = await answer(engine, chat(wanted))
    (called,) = body["choices"][0]["message"]["tool_calls"]
    assert called["function"]["name"] == "weather"
    assert json.loads(called["function"]["arguments"])["city"] in ("Paris", "Rome")


async def test_the_call_caps_what_the_body_asks_for(engine: VllmEngine) -> None:
    _, final = await answer(engine, chat(LONG, max_tokens=3))
    assert (final.usage.completion_tokens, final.finish_reason) == (3, "length")


async def test_what_a_client_says_about_the_engine_is_ignored(engine: VllmEngine) -> None:
    steering = {
        "priority": -99,
        "cache_salt": "another tenant's",
        "request_id": "theirs",
        "kv_transfer_params": {"do_remote_prefill": True},
        "use_beam_search": True,
        "model": "unknown",
        "stream": True,
    }
    call = chat(PARIS | GREEDY | steering)
    body, _ = await answer(engine, call)
    assert body["id"] == f"chatcmpl-{call.request_id}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", list(Endpoint))
async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    engine: VllmEngine, endpoint: Endpoint, stream: bool
) -> None:
    text = "hello " * 1500
    body = {"messages": [{"role": "user", "content": text}], "prompt": text, "max_tokens": 4}
    refusal = await refused(engine, chat(body, endpoint=endpoint, stream=stream))
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    assert refusal.param == ("messages" if endpoint is Endpoint.CHAT else "prompt")
    assert "1024" in refusal.message
    assert "1025" in refusal.message


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": -1}),
        ("top_p", {"top_p": 2}),
        ("max_tokens", {"max_tokens": 0}),
        ("messages[0]", {"messages": [{"role": "user", "content": 7}]}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
    ],
)
async def test_a_wrong_field_is_refused_by_name(
    engine: VllmEngine, field: str, body: dict[str, Any]
) -> None:
    refusal = await refused(engine, chat(PARIS | body))
    assert (refusal.status, refusal.type) == (400, "invalid_request_error")
    assert refusal.param == field


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": NaN}', b"\xff"])
async def test_a_body_that_is_not_an_object_is_refused(engine: VllmEngine, body: bytes) -> None:
    refusal = await refused(engine, dataclasses.replace(chat({}), body=body))
    assert refusal.status == 400


async def test_cancelling_several_prompts_counts_and_frees_all_of_them(
    engine: VllmEngine, metered: Callable[[GenerateCall], Awaitable[Metered]]
) -> None:
    body = {"prompt": ["One", "Two"], "max_tokens": 600, "ignore_eos": True, "n": 2}
    call = completion(body)
    reader = asyncio.create_task(read(engine, call))
    await until(lambda: engine.snapshot().in_flight_tokens[1] > 40)
    reader.cancel()
    await asyncio.wait({reader})
    assert engine.snapshot().running == 0
    account = await metered(call)
    assert account.outcome is Outcome.CANCELLED
    assert account.usage.completion_tokens > 20


async def test_a_critical_request_overtakes_a_sheddable_one_in_vllms_queue(
    engine: VllmEngine, busy: Streams
) -> None:
    finished: list[PriorityClass] = []

    async def serve(priority_class: PriorityClass) -> None:
        body = PARIS | {"max_tokens": 2, "temperature": 0}
        await read(engine, chat(body, priority_class=priority_class))
        finished.append(priority_class)

    async with asyncio.TaskGroup() as group:
        group.create_task(serve(PriorityClass.SHEDDABLE))
        await until(lambda: engine.snapshot().waiting == 1)
        group.create_task(serve(PriorityClass.CRITICAL))
        await until(lambda: engine.snapshot().waiting == 2)
        await busy[0].aclose()
    assert finished == [PriorityClass.CRITICAL, PriorityClass.SHEDDABLE]


async def test_random_departures_leave_nothing_behind(engine: VllmEngine) -> None:
    dice = random.Random(20_260)
    calls = [_random_call(dice) for _ in range(48)]
    heard: list[Metered] = []
    engine.on_metered(heard.append)

    async def leave(call: GenerateCall, after_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(after_s),
                contextlib.aclosing(engine.generate(call)) as items,
            ):
                async for _ in items:
                    pass

    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as group:
        for call in calls:
            group.create_task(leave(call, dice.uniform(0, 3)))
            await asyncio.sleep(dice.uniform(0, 0.1))
    assert len(heard) > len(calls) // 2
    view = engine.snapshot()
    assert (view.running, view.waiting, view.in_flight_tokens) == (0, 0, (0, 0, 0))
    ids = [account.request_id for account in heard]
    assert len(ids) == len(set(ids))
    assert {account.outcome for account in heard} <= {Outcome.COMPLETED, Outcome.CANCELLED}
    # The scheduler's own view, as of a step in which one request runs alone.
    await read(engine, chat(PARIS | GREEDY))
    labels = {"model_name": "smollm2", "engine": "0"}
    assert REGISTRY.get_sample_value("vllm:num_requests_running", labels) == 0
    assert REGISTRY.get_sample_value("vllm:num_requests_waiting", labels) == 0
    assert REGISTRY.get_sample_value("vllm:kv_cache_usage_perc", labels) == 0


async def test_vllms_own_metrics_are_in_the_default_registry(engine: VllmEngine) -> None:
    await read(engine, chat(PARIS | GREEDY))
    labels = {"model_name": "smollm2", "engine": "0"}
    assert (REGISTRY.get_sample_value("vllm:generation_tokens_total", labels) or 0) > 0


async def test_an_engine_core_that_hangs_is_found_by_its_steps(engine: VllmEngine) -> None:
    """Its process lives and its sockets are open: only its progress tells."""
    seconds = itertools.count()
    health = EngineHealth(engine, 8.0, lambda: float(next(seconds)))
    stream = engine.generate(chat(LONG | {"max_tokens": 100}, stream=True))
    await anext(stream)
    await health.check()
    core = engine.processes[0]

    async def look_on() -> None:
        for _ in range(100):  # the steps that were on their way are still reported
            await asyncio.sleep(0.01)
            await health.check()

    core.suspend()
    try:
        with pytest.raises(EngineDead, match="no step"):
            await look_on()
        await engine.check_health()
    finally:
        core.resume()
    await exhaust(stream)
    await health.check()


@pytest.mark.last
async def test_the_engines_death_is_seen_by_who_streams_and_by_the_probe(
    engine: VllmEngine, metered: Callable[[GenerateCall], Awaitable[Metered]]
) -> None:
    await engine.check_health()
    processes = engine.processes
    call = chat(LONG, stream=True)
    stream = engine.generate(call)
    await anext(stream)
    whole = asyncio.create_task(read(engine, chat(LONG)))
    await until(lambda: engine.snapshot().running == 2)
    processes[0].kill()
    with pytest.raises(EngineDead):
        await exhaust(stream)
    with pytest.raises(EngineDead):
        await whole
    with pytest.raises(EngineDead):
        await engine.check_health()
    with pytest.raises(EngineDead):
        await read(engine, chat(PARIS))
    account = await metered(call)
    assert account.outcome is Outcome.FAILED
    assert account.usage.completion_tokens >= 1
    await engine.stop()
    assert not any(psutil.pid_exists(process.pid) for process in processes)
    assert engine.snapshot().running == 0
