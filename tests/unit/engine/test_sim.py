"""The simulated engine beyond the contract: determinism, faults, time, odd requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from serve_app.config import SimSettings
from serve_app.core.types import Outcome, PoolName, PriorityClass, ReplicaId
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
from serve_app.engine.sim import SimEngine, engine_params
from serve_app.engine.sim_text import VOCABULARY, WORDS, Answer, prefix_hashes
from tests.generate_calls import generate_call
from tests.steady_clock import SteadyClock

INSTANT = SimSettings(zero_latency=True, max_model_len=4096)


def make(settings: SimSettings = INSTANT, replica: str = "r0") -> SimEngine:
    return SimEngine(settings, PoolName("pool"), ReplicaId(replica), SteadyClock())


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    engine = make()
    await engine.start()
    yield engine
    await engine.stop()


def chat(name: str = "a", *, stream: bool = False, text: str = "hello", **body: Any):
    of_call = ("resume_token_ids", "priority_class", "max_tokens_of_call", "cache_salt")
    fields = {field.removesuffix("_of_call"): body.pop(field) for field in of_call if field in body}
    body.setdefault("messages", [{"role": "user", "content": text}])
    return generate_call(name, body, endpoint=Endpoint.CHAT, stream=stream, **fields)


def completion(name: str = "a", **body: Any) -> GenerateCall:
    return generate_call(name, body, stream=False)


async def read(items: AsyncGenerator[GenerateItem, None]) -> list[GenerateItem]:
    return [item async for item in items]


async def run(engine: SimEngine, call: GenerateCall) -> list[GenerateItem]:
    return await read(engine.generate(call))


async def answer(engine: SimEngine, call: GenerateCall) -> dict[str, Any]:
    frame, final = await run(engine, call)
    assert isinstance(frame, Frame)
    assert isinstance(final, Final)
    body = json.loads(frame.data)
    assert isinstance(body, dict)
    return body


def content(body: dict[str, Any], index: int = 0) -> str:
    return str(body["choices"][index]["message"]["content"])


# ---- answers -----------------------------------------------------------------------


async def test_replicas_agree_and_seeds_and_choices_differ(engine: SimEngine) -> None:
    other = make(replica="r1")
    await other.start()
    first = await answer(engine, chat(max_tokens=9, n=2))
    same = await answer(other, chat("another id", max_tokens=9))
    seeded = await answer(other, chat(max_tokens=9, seed=5))
    await other.stop()
    assert content(first, 0) == content(same)
    assert len({content(first, 0), content(first, 1), content(seeded)}) == 3
    assert len(content(first).split()) == 9


async def test_an_answer_without_a_limit_has_the_default_length_and_stops(
    engine: SimEngine,
) -> None:
    body = await answer(engine, chat())
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == INSTANT.default_output_tokens
    capped = await answer(engine, chat(max_tokens_of_call=7))
    assert capped["choices"][0]["finish_reason"] == "length"
    assert capped["usage"]["completion_tokens"] == 7
    both = await answer(engine, chat(max_tokens=50, max_completion_tokens=6))
    assert both["usage"]["completion_tokens"] == 6


async def test_another_replica_continues_a_cut_answer_to_the_same_text(engine: SimEngine) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "stream_options": {"include_usage": True}}
    whole = await answer(engine, chat(max_tokens=12))
    cut: list[Frame] = []
    async with aclosing(engine.generate(chat(stream=True, **options))) as items:
        async for item in items:
            assert isinstance(item, Frame)
            cut.append(item)
            if len(cut) == 5:
                break
    delivered = tuple(token for frame in cut for token in frame.token_ids)
    other = make(replica="r1")
    await other.start()
    *frames, final = await run(other, chat(stream=True, resume_token_ids=delivered, **options))
    await other.stop()
    stream = b"".join(frame.data for frame in [*cut, *frames] if isinstance(frame, Frame))
    events = [json.loads(each[6:]) for each in stream.decode().split("\n\n")[:-2]]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == content(whole)
    assert sum("role" in delta for delta in deltas) == 1
    # The client is told what it got, the meter what this replica made.
    assert events[-1]["usage"] == whole["usage"]
    assert isinstance(final, Final)
    assert final.usage.completion_tokens == 12 - len(delivered)


@pytest.mark.parametrize("resumed", [0, 1, 3])
def test_an_answer_cut_by_a_stop_is_the_same_in_any_pieces(resumed: int) -> None:
    whole = Answer(12345, 30, "length", ())
    text = whole.text(0, 30).decode()
    stop = text[17:23]
    cut = Answer(12345, 30, "length", (stop, "never there"))
    pieces = [cut.text(index, index + 1) for index in range(resumed, cut.tokens)]
    assert (cut.text(0, resumed) + b"".join(pieces)).decode() == text[:17]
    assert cut.finish_reason == "stop"
    # Counted are the tokens up to the one that completes the stop string.
    assert len(whole.text(0, cut.tokens - 1)) < 23 <= len(whole.text(0, cut.tokens))


def test_words_are_distinct_and_need_no_escaping() -> None:
    assert len(set(WORDS)) == VOCABULARY
    assert all(word.isascii() and word.isalpha() and len(word) == 3 for word in WORDS)


def test_prefix_hashes_chain_and_are_salted() -> None:
    one = prefix_hashes(b"a" * 64 + b"b" * 64 + b"rest", 16, "acme")
    two = prefix_hashes(b"a" * 64 + b"c" * 64, 16, "acme")
    late = prefix_hashes(b"x" * 64 + b"b" * 64, 16, "acme")
    assert len(one) == 2
    assert one[0] == two[0]
    assert len({one[1], two[1], late[1]}) == 3
    assert set(prefix_hashes(b"a" * 64, 16, "other")).isdisjoint(one)


async def test_the_next_turn_finds_prompt_and_answer_in_the_cache() -> None:
    engine = make(SimSettings(speed=1000.0))
    await engine.start()
    question = {"role": "user", "content": "why? " * 80}
    first = await answer(engine, chat(messages=[question], max_tokens=100))
    turns = [question, {"role": "assistant", "content": content(first)}, question]
    second = await answer(engine, chat(messages=turns, max_tokens=2))
    await engine.stop()
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > first["usage"]["prompt_tokens"] + 60


# ---- odd requests ------------------------------------------------------------------


async def test_prompts_may_be_lists_and_token_ids(engine: SimEngine) -> None:
    two = await answer(engine, completion(prompt=["one", "two"], n=2, max_tokens=3))
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]
    assert two["usage"]["completion_tokens"] == 12
    ids = await answer(engine, completion(prompt=[1, 2, 3, 4, 5], max_tokens=3))
    assert ids["usage"]["prompt_tokens"] == 5
    nested = await answer(engine, completion(prompt=[[1, 2], [3]], max_tokens=3))
    assert nested["usage"]["prompt_tokens"] == 3


async def test_four_bytes_are_a_token_and_parts_count_as_their_text(engine: SimEngine) -> None:
    plain = await answer(engine, completion(prompt="x" * 41, max_tokens=1))
    assert plain["usage"]["prompt_tokens"] == 11
    whole = await answer(engine, chat(text="abcd efgh", max_tokens=4))
    parts = [{"type": "text", "text": "abcd "}, {"type": "text", "text": "efgh"}]
    split = await answer(engine, chat(messages=[{"role": "user", "content": parts}], max_tokens=4))
    assert content(whole) == content(split)
    assert whole["usage"] == split["usage"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5000}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stream_options": []}, None),
        ({"stream_options": [1]}, "stream_options"),
        ({"seed": "x"}, "seed"),
    ],
)
async def test_a_wrong_field_is_refused_by_name(
    engine: SimEngine, body: dict[str, Any], param: str | None
) -> None:
    last = (await run(engine, chat(**body)))[-1]
    if param is None:
        assert isinstance(last, Final)
    else:
        assert isinstance(last, Refusal)
        assert (last.status, last.param) == (400, param)


# ---- scheduling and time -----------------------------------------------------------


async def test_a_critical_request_overtakes_sheddable_ones_in_the_queue() -> None:
    engine = make(INSTANT.model_copy(update={"max_num_seqs": 1}))
    await engine.start()
    order: list[str] = []
    engine.on_metered(lambda metered: order.append(metered.request_id))
    sheddable = [
        asyncio.create_task(
            run(engine, chat(f"s{number}", max_tokens=5, priority_class=PriorityClass.SHEDDABLE))
        )
        for number in range(3)
    ]
    await asyncio.sleep(0)
    critical = run(engine, chat("critical", max_tokens=5, priority_class=PriorityClass.CRITICAL))
    await asyncio.gather(critical, *sheddable)
    await engine.stop()
    assert order.index("critical") < 2
    assert len(order) == 4


async def test_steps_take_their_time_and_speed_divides_it() -> None:
    # A step lasts a simulated hour; nothing but the speed can make this test end.
    slow = SimSettings(overhead_s=3600.0, speed=3600.0 * 200, zero_latency=False)
    engine = make(slow)
    await engine.start()
    *_, final = await run(engine, chat(stream=True, max_tokens=4))
    await engine.stop()
    assert isinstance(final, Final)
    assert final.timings.total_s >= 4 / 200
    assert final.timings.first_token_s == pytest.approx(1 / 200, rel=0.01)
    assert final.timings.queued_s == pytest.approx(0.0, abs=1e-6)


async def test_a_cold_start_is_waited_for_and_no_work_is_taken_before_it() -> None:
    engine = make(SimSettings(start_delay_s=0.02))
    starting = asyncio.create_task(engine.start())
    with pytest.raises(EngineDead, match="not started"):
        await run(engine, chat())
    info = await starting
    assert info.start_s >= 0.02
    assert info.kv_tokens_capacity == 26_313 * 16
    await engine.stop()


def test_settings_that_contradict_each_other_are_named_with_the_fix() -> None:
    with pytest.raises(ValueError, match=r"max_model_len .131072. exceeds .* raise kv_blocks"):
        engine_params(SimSettings(kv_blocks=64))
    with pytest.raises(ValueError, match="token_budget"):
        engine_params(SimSettings(token_budget=16))


# ---- faults ------------------------------------------------------------------------


async def test_a_killed_engine_fails_what_runs_and_everything_after() -> None:
    engine = make(SimSettings())
    await engine.start()
    metered: list[Metered] = []
    engine.on_metered(metered.append)
    items = engine.generate(chat(stream=True, max_tokens=1000))
    paused = engine.generate(chat("paused", stream=True, max_tokens=1000))
    assert isinstance(await anext(items), Frame)
    assert isinstance(await anext(paused), Frame)
    whole = asyncio.create_task(run(engine, chat("b", max_tokens=1000)))
    waiting = asyncio.create_task(read(items))
    await asyncio.sleep(0)
    engine.kill()
    # One reader waits when it happens, one is between two frames.
    with pytest.raises(EngineDead):
        await waiting
    with pytest.raises(EngineDead):
        await read(paused)
    with pytest.raises(EngineDead):
        await whole
    with pytest.raises(EngineDead):
        await engine.check_health()
    with pytest.raises(EngineDead):
        await run(engine, chat("c"))
    assert [entry.outcome for entry in metered] == [Outcome.FAILED] * 3
    assert metered[0].usage.completion_tokens >= 1
    assert engine.snapshot().running == 0
    await engine.stop()


async def test_an_engine_whose_loop_fails_is_dead_and_not_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()
    await engine.start()

    def broken(until_s: float) -> None:
        raise RuntimeError("a bug in the model")

    monkeypatch.setattr(engine._model, "advance", broken)
    with pytest.raises(EngineDead):
        await run(engine, chat())
    with pytest.raises(EngineDead):
        await engine.check_health()
    assert "loop failed" in caplog.text
    await engine.stop()


async def test_an_answer_goes_on_as_far_as_it_is_paid_for_and_not_a_token_further(
    engine: SimEngine,
) -> None:
    call = replace(chat(max_tokens=200), stream=True, paid_tokens=10)
    made, final = 0, None
    async with aclosing(engine.generate(call)) as items:
        async for item in items:
            if isinstance(item, Frame):
                made += len(item.token_ids)
                if made and made <= 5:
                    engine.extend(call.request_id, 60)
                    engine.extend(call.request_id, 20)
            elif isinstance(item, Final):
                final = item
    assert final is not None
    assert (made, final.usage.completion_tokens) == (60, 60)
    assert final.finish_reason == "length"
    engine.extend(call.request_id, 99)


async def test_an_extension_that_comes_too_late_is_of_no_use(engine: SimEngine) -> None:
    call = replace(chat(max_tokens=200), stream=True, paid_tokens=10)
    items = [item async for item in engine.generate(call)]
    engine.extend(call.request_id, 100)
    assert isinstance(items[-1], Final)
    assert items[-1].usage.completion_tokens == 10


async def test_an_engine_that_was_held_up_counts_nothing_that_was_not_paid_for() -> None:
    late_s = [0.0]
    settings = SimSettings(max_model_len=4096)
    engine = SimEngine(
        settings, PoolName("pool"), ReplicaId("r0"), lambda: time.monotonic() + late_s[0]
    )
    await engine.start()
    metered: list[Metered] = []
    engine.on_metered(metered.append)
    call = replace(chat(max_tokens=2000), stream=True, paid_tokens=10)
    made = 0
    async with aclosing(engine.generate(call)) as items:
        async for item in items:
            if isinstance(item, Frame):
                made += len(item.token_ids)
            # A thousand steps at once, when it gets to look.
            late_s[0] = 10.0
    await engine.stop()
    assert made == 10
    assert [each.usage.completion_tokens for each in metered] == [10]
