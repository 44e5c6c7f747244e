"""From vLLM's output steps to frames, without vLLM."""

import asyncio
import json

import pytest

from serve_app.engine.api import Endpoint, Frame
from serve_app.engine.meter import RequestMeter
from serve_app.engine.vllm_generation import Generation, stream_error
from tests.generate_calls import generate_call


@pytest.fixture
def generation() -> Generation:
    call = generate_call(endpoint=Endpoint.CHAT)
    return Generation(call, RequestMeter(call, 0.0))


def _chunk(text: str, finish_reason: str | None = None, index: int = 0) -> str:
    choice = {"index": index, "delta": {"content": text}, "finish_reason": finish_reason}
    body = json.dumps({"id": "x", "choices": [choice]}, separators=(",", ":"))
    return f"data: {body}\n\n"


async def test_all_text_of_a_step_and_its_ids_are_one_frame(generation: Generation) -> None:
    generation.write(_chunk(""))
    generation.write(_chunk("The"))
    generation.complete_step([504])
    generation.write(_chunk(" end"))
    generation.complete_step([7])
    generation.end()
    first = await generation.next_frame()
    assert first == Frame(0, (_chunk("") + _chunk("The") + _chunk(" end")).encode(), (504, 7))
    assert await generation.next_frame() is None


async def test_frames_count_from_zero_without_gaps(generation: Generation) -> None:
    for number in range(3):
        generation.write(_chunk(str(number)))
        generation.complete_step([number])
        frame = await generation.next_frame()
        assert frame is not None
        assert (frame.sequence, frame.token_ids) == (number, (number,))
    assert generation.frames == 3


async def test_text_is_not_readable_before_its_step_is_complete(generation: Generation) -> None:
    generation.write(_chunk("half"))
    reader = asyncio.create_task(generation.next_frame())
    await asyncio.sleep(0)
    assert not reader.done()
    generation.complete_step([1])
    frame = await reader
    assert frame is not None
    assert frame.token_ids == (1,)


async def test_ids_of_a_step_without_text_travel_with_the_next_text(
    generation: Generation,
) -> None:
    generation.complete_step([1])
    generation.complete_step([2])
    generation.write(_chunk("word"))
    generation.complete_step([3])
    frame = await generation.next_frame()
    assert frame == Frame(0, _chunk("word").encode(), (1, 2, 3))


async def test_what_ends_a_stream_joins_the_frame_of_its_last_step(
    generation: Generation,
) -> None:
    generation.write(_chunk("end", "stop"))
    generation.hold([9])
    generation.write("data: [DONE]\n\n")
    generation.complete_step([])
    generation.end()
    frame = await generation.next_frame()
    assert frame is not None
    assert frame.data.endswith(b"data: [DONE]\n\n")
    assert frame.token_ids == (9,)
    assert await generation.next_frame() is None


async def test_a_reader_waits_for_the_account_and_not_only_for_the_text(
    generation: Generation,
) -> None:
    reader = asyncio.create_task(generation.next_frame())
    await asyncio.sleep(0)
    assert not reader.done()
    generation.end()
    assert await reader is None


def test_the_finish_reason_is_the_first_choices(generation: Generation) -> None:
    generation.write(_chunk("a", "length", index=1))
    assert generation.finish_reason is None
    generation.write(_chunk("b", "tool_calls", index=0))
    assert generation.finish_reason == "tool_calls"


def test_text_that_quotes_a_finish_reason_is_not_one(generation: Generation) -> None:
    generation.write(_chunk('{"finish_reason":"stop"}'))
    assert generation.finish_reason is None


def test_only_vllms_error_object_is_an_error() -> None:
    assert stream_error(_chunk('data: {"error": 1}')) is None
    assert stream_error("data: [DONE]\n\n") is None
    event = 'data: {"error": {"message": "bad", "type": "x", "param": null, "code": 400}}\n\n'
    assert stream_error(event) == (400, "bad")


async def test_closing_waits_for_every_prompt(generation: Generation) -> None:
    generation.opened("a", object())
    generation.opened("b", object())
    waiter = asyncio.create_task(generation.wait_closed())
    generation.closed("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiter.done()
    generation.closed("b")
    await waiter
