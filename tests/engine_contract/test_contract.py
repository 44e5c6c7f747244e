"""What every engine promises, whatever makes its tokens."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytest_asyncio

from serve_app.core.types import Outcome, PriorityClass, RequestId
from serve_app.engine.api import (
    Endpoint,
    Engine,
    EngineDead,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    Metered,
    Refusal,
)

from .conftest import start_sim_engine

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAIT_S = 300
CONTEXT_TOKENS = 1024
DONE = b"data: [DONE]\n\n"
IDS = itertools.count(1)
BOTH_ENDPOINTS = pytest.mark.parametrize("endpoint", list(Endpoint))
USAGE = {True: {"include_usage": True}, False: None}
STREAM_OR_NOT = pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])


def make_call(
    endpoint: Endpoint = Endpoint.CHAT, *, stream: bool = True, text: str = "", **options: Any
) -> GenerateCall:
    """Return a greedy request for 12 tokens; what GenerateCall has is taken from options."""
    text = text or "Tell me a long story about a river and a boat."
    named = ("tenant", "cache_salt", "max_tokens", "resume_token_ids")
    fields = {name: options.pop("call_" + name) for name in named if "call_" + name in options}
    # ignore_eos is vLLM's: its length must not depend on what the model has to say.
    body = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **options}
    if endpoint is Endpoint.CHAT:
        body.setdefault("messages", [{"role": "user", "content": text}])
    else:
        body.setdefault("prompt", text)
    defaults: dict[str, Any] = {"tenant": "acme", "cache_salt": "salt of acme"}
    return GenerateCall(
        request_id=RequestId(f"contract-{next(IDS)}"),
        endpoint=endpoint,
        body=json.dumps(body).encode(),
        stream=stream,
        priority_class=PriorityClass.STANDARD,
        **(defaults | fields),
    )


@dataclass
class Collected:
    """Everything a generation yielded."""

    frames: list[Frame] = field(default_factory=list)
    final: Final | None = None
    refusal: Refusal | None = None

    @property
    def events(self) -> list[dict[str, Any]]:
        data = b"".join(frame.data for frame in self.frames)
        assert data.endswith(DONE)
        chunks = data.removesuffix(DONE).decode().split("\n\n")[:-1]
        assert all(chunk.startswith("data: {") for chunk in chunks)
        return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]

    @property
    def body(self) -> dict[str, Any]:
        (frame,) = self.frames
        parsed = json.loads(frame.data)
        assert isinstance(parsed, dict)
        return parsed

    def text(self, index: int = 0) -> str:
        """Return what a client reads from choice ``index``, streamed or not."""
        if self.frames[0].data.startswith(b"{"):
            choice = next(each for each in self.body["choices"] if each["index"] == index)
            return str(choice["text"] if "text" in choice else choice["message"]["content"])
        choices = [choice for event in self.events for choice in event["choices"]]
        return "".join(
            choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            for choice in choices
            if choice["index"] == index
        )

    @property
    def token_ids(self) -> list[int]:
        return [token for frame in self.frames for token in frame.token_ids]


async def collect(engine: Engine, call: GenerateCall) -> Collected:
    """Run a generation to its end and check the order of what it yields."""
    collected = Collected()
    async with asyncio.timeout(WAIT_S), aclosing(engine.generate(call)) as items:
        async for item in items:
            assert collected.final is None, "something came after the Final"
            assert collected.refusal is None, "something came after the Refusal"
            if isinstance(item, Frame):
                collected.frames.append(item)
            elif isinstance(item, Final):
                collected.final = item
            else:
                collected.refusal = item
    assert (collected.final is None) != (collected.refusal is None)
    return collected


async def until(condition: Callable[[], bool]) -> None:
    """Return when ``condition`` holds; every engine's loop runs meanwhile."""
    async with asyncio.timeout(WAIT_S):
        # An engine has no event for "the load is now such"; its snapshot is what there is.
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def is_empty(engine: Engine) -> bool:
    view = engine.snapshot()
    return view.running == 0 and view.waiting == 0 and view.in_flight_tokens == (0, 0, 0)


@pytest.fixture(scope="module")
def ledger() -> dict[int, list[Metered]]:
    """What each engine of the session has metered: one listener per engine."""
    return {}


@pytest_asyncio.fixture(loop_scope="session")
async def metered(engine: Engine, ledger: dict[int, list[Metered]]) -> list[Metered]:
    """Return what the engine meters, of this test only."""
    if id(engine) not in ledger:
        ledger[id(engine)] = []
        engine.on_metered(ledger[id(engine)].append)
    ledger[id(engine)].clear()
    return ledger[id(engine)]


@pytest_asyncio.fixture(loop_scope="session", autouse=True)
async def nothing_leaks(engine: Engine) -> AsyncIterator[None]:
    """After every test the engine holds no request and no context."""
    yield
    await until(lambda: is_empty(engine))
    assert engine.snapshot().kv_usage_ratio == pytest.approx(0.0, abs=0.01)


# ---- what a stream looks like ----------------------------------------------------------


@BOTH_ENDPOINTS
async def test_frames_are_numbered_without_gaps_and_counted(
    engine: Engine, endpoint: Endpoint
) -> None:
    answer = await collect(engine, make_call(endpoint))
    assert [frame.sequence for frame in answer.frames] == list(range(len(answer.frames)))
    assert answer.final is not None
    assert answer.final.frames == len(answer.frames)
    assert len(answer.frames) > 1, "a stream of twelve tokens comes in pieces"
    assert all(frame.data.endswith(b"\n\n") for frame in answer.frames)
    assert sum(frame.data.count(DONE) for frame in answer.frames) == 1
    assert answer.frames[-1].data.endswith(DONE)


@BOTH_ENDPOINTS
async def test_events_have_openais_shape(engine: Engine, endpoint: Endpoint) -> None:
    answer = await collect(engine, make_call(endpoint))
    kind = "chat.completion.chunk" if endpoint is Endpoint.CHAT else "text_completion"
    assert {event["object"] for event in answer.events} == {kind}
    assert len({(e["id"], e["model"], e["created"]) for e in answer.events}) == 1
    choices = [choice for event in answer.events for choice in event["choices"]]
    reasons = [choice["finish_reason"] for choice in choices]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    if endpoint is Endpoint.CHAT:
        assert choices[0]["delta"]["role"] == "assistant"
        assert not any("role" in choice["delta"] for choice in choices[1:])


@BOTH_ENDPOINTS
async def test_a_whole_answer_has_openais_shape(engine: Engine, endpoint: Endpoint) -> None:
    answer = await collect(engine, make_call(endpoint, stream=False))
    body = answer.body
    assert body["object"] == ("chat.completion" if endpoint is Endpoint.CHAT else "text_completion")
    (choice,) = body["choices"]
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    if endpoint is Endpoint.CHAT:
        assert choice["message"]["role"] == "assistant"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@STREAM_OR_NOT
@BOTH_ENDPOINTS
async def test_an_answer_names_the_model_as_the_client_did(
    engine: Engine, endpoint: Endpoint, stream: bool
) -> None:
    call = make_call(endpoint, stream=stream, model="alias", stream_options=USAGE[stream])
    answer = await collect(engine, call)
    named = answer.events if stream else [answer.body]
    assert {event["model"] for event in named} == {"alias"}


@BOTH_ENDPOINTS
async def test_deltas_join_to_the_answer_that_is_not_streamed(
    engine: Engine, endpoint: Endpoint
) -> None:
    streamed = await collect(engine, make_call(endpoint))
    whole = await collect(engine, make_call(endpoint, stream=False))
    assert streamed.text() == whole.text()
    assert streamed.text()
    assert streamed.token_ids == whole.token_ids


@STREAM_OR_NOT
async def test_every_choice_is_delivered_and_counted(engine: Engine, stream: bool) -> None:
    call = make_call(stream=stream, n=2, temperature=0.8, seed=7)
    answer = await collect(engine, call)
    assert answer.text(0)
    assert answer.text(1)
    assert len(answer.token_ids) == 24
    assert answer.final is not None
    assert answer.final.usage.completion_tokens == 24


async def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(engine: Engine) -> None:
    whole = (await collect(engine, make_call())).text()
    stop = whole[len(whole) // 2 :][:4]
    streamed = await collect(engine, make_call(stop=stop))
    assert streamed.text() == whole[: whole.index(stop)]
    assert streamed.final is not None
    assert streamed.final.finish_reason == "stop"
    assert (await collect(engine, make_call(stream=False, stop=[stop]))).text() == streamed.text()


async def test_a_continued_answer_goes_on_where_the_other_replica_stopped(engine: Engine) -> None:
    whole = await collect(engine, make_call())
    delivered = tuple(whole.token_ids[:5])
    continued = await collect(engine, make_call(call_resume_token_ids=delivered))
    assert continued.token_ids == whole.token_ids[5:]
    assert continued.text()
    assert whole.text().endswith(continued.text())


async def test_a_reader_that_pauses_until_the_end_still_gets_everything(engine: Engine) -> None:
    async with asyncio.timeout(WAIT_S), aclosing(engine.generate(make_call())) as items:
        frames = [await anext(items)]
        await until(lambda: is_empty(engine))
        rest = [item async for item in items]
    frames += rest[:-1]
    assert sum(len(frame.token_ids) for frame in frames if isinstance(frame, Frame)) == 12
    assert isinstance(rest[-1], Final)
    assert rest[-1].frames == len(frames)


# ---- counting --------------------------------------------------------------------------


@STREAM_OR_NOT
@BOTH_ENDPOINTS
async def test_token_ids_usage_and_meter_agree(
    engine: Engine, metered: list[Metered], endpoint: Endpoint, stream: bool
) -> None:
    call = make_call(endpoint, stream=stream, max_tokens=9)
    answer = await collect(engine, call)
    assert answer.final is not None
    assert len(answer.token_ids) == answer.final.usage.completion_tokens == 9
    assert answer.final.usage.prompt_tokens > 5
    assert answer.final.finish_reason == "length"
    (entry,) = metered
    assert (entry.request_id, entry.tenant) == (call.request_id, "acme")
    assert entry.outcome is Outcome.COMPLETED
    assert entry.usage == answer.final.usage
    if not stream:
        assert answer.body["usage"]["completion_tokens"] == 9
        assert answer.body["usage"]["prompt_tokens"] == entry.usage.prompt_tokens


async def test_a_stream_tells_its_usage_only_when_asked(engine: Engine) -> None:
    silent = await collect(engine, make_call())
    assert not any(event.get("usage") for event in silent.events)
    asked = await collect(engine, make_call(stream_options={"include_usage": True}))
    *others, last = asked.events
    assert not any(event.get("usage") for event in others)
    assert last["choices"] == []
    assert asked.final is not None
    assert last["usage"]["completion_tokens"] == asked.final.usage.completion_tokens
    assert last["usage"]["prompt_tokens"] == asked.final.usage.prompt_tokens
    assert asked.text() == silent.text()


@STREAM_OR_NOT
async def test_the_lower_of_two_output_caps_holds(engine: Engine, stream: bool) -> None:
    for body_cap, call_cap in [(20, 6), (6, 20), (None, 6)]:
        call = make_call(stream=stream, max_tokens=body_cap, call_max_tokens=call_cap)
        answer = await collect(engine, call)
        assert answer.final is not None
        assert answer.final.usage.completion_tokens == 6
        assert answer.final.finish_reason == "length"


@STREAM_OR_NOT
async def test_what_is_paid_for_caps_the_output_too(engine: Engine, stream: bool) -> None:
    call = replace(make_call(stream=stream, max_tokens=20), paid_tokens=6)
    answer = await collect(engine, call)
    assert answer.final is not None
    assert answer.final.usage.completion_tokens == 6
    assert answer.final.finish_reason == "length"


async def test_what_is_paid_for_meanwhile_lets_an_answer_go_on(engine: Engine) -> None:
    call = replace(make_call(max_tokens=60), paid_tokens=24)
    answer = Collected()
    async with aclosing(engine.generate(call)) as items:
        async for item in items:
            if isinstance(item, Frame):
                if not answer.frames:
                    engine.extend(call.request_id, 40)
                    engine.extend(call.request_id, 30)
                answer.frames.append(item)
            elif isinstance(item, Final):
                answer.final = item
    assert answer.final is not None
    assert answer.final.usage.completion_tokens == 40
    assert answer.final.finish_reason == "length"
    engine.extend(call.request_id, 50)


async def test_no_extension_goes_beyond_what_was_asked_for(engine: Engine) -> None:
    call = replace(make_call(max_tokens=30), paid_tokens=24)
    final = None
    async with aclosing(engine.generate(call)) as items:
        async for item in items:
            engine.extend(call.request_id, 1000)
            final = item
    assert isinstance(final, Final)
    assert final.usage.completion_tokens == 30


async def test_output_ends_with_the_context(engine: Engine) -> None:
    answer = await collect(engine, make_call(Endpoint.COMPLETIONS, text="boat " * 800))
    long = await collect(
        engine, make_call(Endpoint.COMPLETIONS, text="boat " * 800, max_tokens=CONTEXT_TOKENS - 1)
    )
    assert answer.final is not None
    assert long.final is not None
    room = CONTEXT_TOKENS - long.final.usage.prompt_tokens
    assert long.final.usage.completion_tokens <= room
    assert long.final.usage.completion_tokens > answer.final.usage.completion_tokens
    assert long.final.finish_reason == "length"


async def test_a_cap_above_the_context_is_no_limit(engine: Engine) -> None:
    call = make_call(text="boat " * 780, max_tokens=None, call_max_tokens=100 * CONTEXT_TOKENS)
    answer = await collect(engine, call)
    assert answer.final is not None
    assert answer.final.usage.completion_tokens >= 1
    used = answer.final.usage
    assert used.prompt_tokens + used.completion_tokens <= CONTEXT_TOKENS


async def test_timings_are_in_order(engine: Engine) -> None:
    answer = await collect(engine, make_call())
    assert answer.final is not None
    timings = answer.final.timings
    assert timings.queued_s is not None
    assert timings.first_token_s is not None
    assert 0 <= timings.queued_s <= timings.first_token_s <= timings.total_s


async def test_a_prefix_is_shared_within_a_salt_and_not_beyond(engine: Engine) -> None:
    text = f"Boat {next(IDS)}. " + "The river runs to the sea. " * 40

    async def cached(salt: str) -> int:
        answer = await collect(engine, make_call(text=text, call_cache_salt=salt))
        assert answer.final is not None
        assert answer.final.usage.cached_prompt_tokens <= answer.final.usage.prompt_tokens
        return answer.final.usage.cached_prompt_tokens

    assert await cached("one") == 0
    assert await cached("one") > 100
    assert await cached("two") == 0


async def test_sixteen_at_once_all_complete_and_are_metered_once(
    engine: Engine, metered: list[Metered]
) -> None:
    calls = [make_call(stream=bool(number % 2)) for number in range(16)]
    alone = (await collect(engine, make_call())).text()
    answers = await asyncio.gather(*(collect(engine, call) for call in calls))
    assert all(len(answer.token_ids) == 12 for answer in answers)
    # Batching may change a real model's rounding, so only the first words must agree.
    assert all(answer.text()[:3] == alone[:3] for answer in answers)
    assert sorted(entry.request_id for entry in metered[1:]) == sorted(c.request_id for c in calls)
    assert {entry.outcome for entry in metered} == {Outcome.COMPLETED}


# ---- refusals --------------------------------------------------------------------------


@BOTH_ENDPOINTS
async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(
    engine: Engine, metered: list[Metered], endpoint: Endpoint
) -> None:
    answer = await collect(engine, make_call(endpoint, text="boat " * 1500))
    assert answer.refusal is not None
    assert (answer.refusal.status, answer.refusal.code) == (400, "context_length_exceeded")
    assert answer.refusal.type == "invalid_request_error"
    numbers = [int(number) for number in re.findall(r"\d+", answer.refusal.message)]
    assert CONTEXT_TOKENS in numbers
    assert any(number > CONTEXT_TOKENS for number in numbers)
    assert metered == []


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"messages": 3}', b'{"messages": []}'])
async def test_a_body_that_makes_no_sense_is_the_clients_error(
    engine: Engine, metered: list[Metered], body: bytes
) -> None:
    call = make_call()
    wrong = GenerateCall(
        request_id=call.request_id,
        endpoint=call.endpoint,
        body=body,
        stream=True,
        tenant="acme",
        cache_salt="",
        priority_class=PriorityClass.STANDARD,
    )
    answer = await collect(engine, wrong)
    assert answer.refusal is not None
    assert answer.refusal.status == 400
    assert answer.refusal.message
    assert metered == []


async def test_an_id_that_is_running_is_refused_and_the_first_goes_on(engine: Engine) -> None:
    call = make_call(max_tokens=40)
    async with asyncio.timeout(WAIT_S), aclosing(engine.generate(call)) as items:
        first = await anext(items)
        second = await collect(engine, call)
        rest = [item async for item in items]
    assert isinstance(first, Frame)
    assert second.refusal is not None
    assert (second.refusal.status, second.refusal.code) == (409, "duplicate_request")
    assert isinstance(rest[-1], Final)


# ---- leaving early ---------------------------------------------------------------------

LONG = {"max_tokens": 600}


def only_entry(metered: list[Metered], call: GenerateCall) -> Metered:
    (entry,) = metered
    assert entry.request_id == call.request_id
    return entry


@pytest.mark.parametrize("frames_read", [1, 4])
async def test_closing_a_stream_frees_the_engine_and_meters_what_was_made(
    engine: Engine, metered: list[Metered], frames_read: int
) -> None:
    call = make_call(**LONG)
    delivered = 0
    async with asyncio.timeout(WAIT_S):
        items = engine.generate(call)
        for _ in range(frames_read):
            item = await anext(items)
            assert isinstance(item, Frame)
            delivered += len(item.token_ids)
        assert engine.snapshot().running == 1
        await items.aclose()
    await until(lambda: is_empty(engine) and len(metered) == 1)
    entry = only_entry(metered, call)
    assert entry.outcome is Outcome.CANCELLED
    assert delivered <= entry.usage.completion_tokens < 600
    assert entry.usage.prompt_tokens > 5


@STREAM_OR_NOT
async def test_cancelling_who_waits_for_the_first_frame_frees_the_engine(
    engine: Engine, metered: list[Metered], stream: bool
) -> None:
    call = make_call(stream=stream, **LONG)
    task = asyncio.create_task(collect(engine, call))
    await until(lambda: not is_empty(engine))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: is_empty(engine) and len(metered) == 1)
    assert only_entry(metered, call).outcome is Outcome.CANCELLED


async def test_a_cancelled_whole_answer_meters_the_tokens_nobody_saw(
    engine: Engine, metered: list[Metered]
) -> None:
    call = make_call(stream=False, **LONG)
    task = asyncio.create_task(collect(engine, call))
    await until(lambda: engine.snapshot().in_flight_tokens[PriorityClass.STANDARD] > 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: len(metered) == 1)
    entry = only_entry(metered, call)
    assert entry.outcome is Outcome.CANCELLED
    assert 0 < entry.usage.completion_tokens < 600


async def test_cancelling_what_waits_behind_a_full_batch_leaves_the_batch_alone(
    engine: Engine, metered: list[Metered]
) -> None:
    slots = engine.snapshot().slots
    running = [asyncio.create_task(collect(engine, make_call(max_tokens=60))) for _ in range(slots)]
    await until(lambda: engine.snapshot().running == slots)
    late = make_call(**LONG)
    waiting = asyncio.create_task(collect(engine, late))
    await until(lambda: engine.snapshot().waiting == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    answers = await asyncio.gather(*running)
    assert all(len(answer.token_ids) == 60 for answer in answers)
    await until(lambda: len(metered) == slots + 1)
    (entry,) = (entry for entry in metered if entry.request_id == late.request_id)
    assert entry.outcome is Outcome.CANCELLED
    assert entry.usage.completion_tokens == 0


@STREAM_OR_NOT
async def test_an_aborted_generation_ends_by_itself(
    engine: Engine, metered: list[Metered], stream: bool
) -> None:
    call = make_call(stream=stream, **LONG)
    task = asyncio.create_task(collect(engine, call))
    await until(lambda: engine.snapshot().in_flight_tokens[PriorityClass.STANDARD] > 60)
    await engine.abort(call.request_id)
    answer = await task
    assert answer.final is not None
    assert answer.final.finish_reason == "abort"
    assert 0 < answer.final.usage.completion_tokens < 600
    entry = only_entry(metered, call)
    assert entry.outcome is Outcome.CANCELLED
    assert entry.usage == answer.final.usage


async def test_aborting_what_is_not_there_changes_nothing(engine: Engine) -> None:
    call = make_call(max_tokens=20)
    async with asyncio.timeout(WAIT_S), aclosing(engine.generate(call)) as items:
        first = await anext(items)
        await engine.abort(RequestId("never heard of"))
        rest = [item async for item in items]
    await engine.abort(call.request_id)
    assert isinstance(first, Frame)
    assert isinstance(rest[-1], Final)
    assert rest[-1].finish_reason == "length"


# ---- the engine itself -----------------------------------------------------------------


async def test_a_snapshot_shows_the_load_and_counts_itself(engine: Engine) -> None:
    before = engine.snapshot()
    async with asyncio.timeout(WAIT_S), aclosing(engine.generate(make_call(**LONG))) as items:
        await anext(items)
        during = engine.snapshot()
    after = engine.snapshot()
    assert before.sequence < during.sequence < after.sequence
    assert (before.running, during.running) == (0, 1)
    assert during.in_flight_tokens[PriorityClass.STANDARD] > 5
    assert during.in_flight_tokens[PriorityClass.CRITICAL] == 0
    assert during.slots >= 1
    assert during.kv_tokens_capacity >= CONTEXT_TOKENS
    assert 0 <= during.kv_usage_ratio <= 1
    assert not during.draining


async def test_a_started_engine_is_healthy(engine: Engine) -> None:
    await engine.check_health()


async def test_progress_tells_steps_and_whether_anybody_waits_for_one(engine: Engine) -> None:
    before = engine.progress()
    async with asyncio.timeout(WAIT_S), aclosing(engine.generate(make_call())) as items:
        await first_frame(items)
        assert engine.progress().busy
        async for _ in items:
            pass
    after = engine.progress()
    assert not before.busy
    # Twelve tokens: a step each, and at most a few to spare.
    assert 12 <= after.steps - before.steps <= 20
    await until(lambda: not engine.progress().busy)


@pytest_asyncio.fixture(loop_scope="session")
async def drainable(engine: Engine, request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """An engine that may be drained. No engine can take that back, so sim gets a fresh one.

    A second vLLM would cost a minute and the memory of a model: there the flag is reset.
    """
    if request.node.callspec.params["engine"] == "sim":
        fresh = await start_sim_engine()
        yield fresh
        await fresh.stop()
    else:
        yield engine
        vars(engine)["_draining"] = False


async def first_frame(items: AsyncGenerator[GenerateItem, None]) -> Frame:
    item = await anext(items)
    assert isinstance(item, Frame)
    return item


async def test_draining_takes_no_new_work_and_lets_the_running_end(drainable: Engine) -> None:
    async with asyncio.timeout(WAIT_S), aclosing(drainable.generate(make_call())) as items:
        await first_frame(items)
        draining = asyncio.create_task(drainable.drain(WAIT_S))
        await until(lambda: drainable.snapshot().draining)
        with pytest.raises(EngineDead, match="draining"):
            await collect(drainable, make_call())
        assert not draining.done()
        rest = [item async for item in items]
        assert await draining == 0
    assert isinstance(rest[-1], Final)
    assert rest[-1].usage.completion_tokens == 12


async def test_at_a_drains_deadline_what_runs_is_cut_and_metered_as_failed(
    drainable: Engine,
) -> None:
    metered: list[Metered] = []
    drainable.on_metered(metered.append)
    call = make_call(**LONG)
    async with asyncio.timeout(WAIT_S), aclosing(drainable.generate(call)) as items:
        await first_frame(items)
        draining = asyncio.create_task(drainable.drain(0.0))
        with pytest.raises(EngineDead, match="time was over"):
            [_ async for _ in items]
        assert await draining == 1
    [cut] = [each for each in metered if each.request_id == call.request_id]
    assert cut.outcome is Outcome.FAILED
    assert cut.usage.completion_tokens >= 1
    assert drainable.snapshot().running == 0


@pytest.mark.parametrize("engine", ["sim"], indirect=True)
async def test_stopping_ends_what_runs_and_may_be_repeated(engine: Engine) -> None:
    """Only on sim: a stopped vLLM cannot serve the next test. The session stops it twice."""
    fresh = await start_sim_engine()
    async with asyncio.timeout(WAIT_S), aclosing(fresh.generate(make_call(**LONG))) as items:
        await first_frame(items)
        await fresh.stop()
        rest = [item async for item in items]
    await fresh.stop()
    assert isinstance(rest[-1], Final)
    assert rest[-1].finish_reason == "abort"
    assert fresh.snapshot().running == 0
    with pytest.raises(EngineDead, match="stopped"):
        await collect(fresh, make_call())
