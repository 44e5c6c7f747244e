"""What one engine began another goes on with: the client sees one answer, cut wherever it was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from serve_app.engine.api import (
    RESUME_UNSUPPORTED,
    Endpoint,
    Engine,
    GenerateCall,
    Metered,
)

from .test_contract import BOTH_ENDPOINTS, Collected, collect, make_call

pytestmark = pytest.mark.asyncio(loop_scope="session")

USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


# What comes next is beyond doubt: a model that computes a token within a prompt and not by
# itself rounds differently, and then a close race between two tokens may end differently.
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24,"
CREATED_S = 1_700_000_000


@pytest_asyncio.fixture(loop_scope="session")
async def metered(engine: Engine) -> list[Metered]:
    """Return what the engine meters from now on."""
    heard: list[Metered] = []
    engine.on_metered(heard.append)
    return heard


async def resume(engine: Engine, call: GenerateCall, token_ids: Sequence[int]) -> Collected:
    """Go on with ``call`` after these tokens, as a router does."""
    resumed = replace(call, resume_token_ids=tuple(token_ids), resume_created_s=CREATED_S)
    return await collect(engine, resumed)


@BOTH_ENDPOINTS
async def test_an_answer_cut_anywhere_goes_on_to_the_same_tokens_text_and_usage(
    engine: Engine, endpoint: Endpoint
) -> None:
    call = make_call(endpoint, text=COUNTING, max_tokens=10, **USAGE)
    whole = await collect(engine, call)
    for cut in range(1, 10):
        before = await collect(engine, make_call(endpoint, text=COUNTING, max_tokens=cut))
        after = await resume(engine, call, before.token_ids)
        where = f"cut after {cut} tokens"
        assert before.token_ids + after.token_ids == whole.token_ids, where
        assert before.text() + after.text() == whole.text(), where
        assert after.events[-1]["usage"]["completion_tokens"] == 10, where
        assert (
            after.events[-1]["usage"]["prompt_tokens"]
            == (whole.events[-1]["usage"]["prompt_tokens"])
        ), where
        # One answer: the same id, the time that the first replica gave it, one role.
        assert {event["id"] for event in after.events} == {whole.events[0]["id"]}
        assert {event["created"] for event in after.events} == {CREATED_S}
        roles = [c for e in after.events for c in e["choices"] if c.get("delta", {}).get("role")]
        assert roles == [], where


async def test_the_account_is_of_what_this_engine_generated(
    engine: Engine, metered: list[Metered]
) -> None:
    call = make_call(text=COUNTING, max_tokens=9)
    whole = await collect(engine, call)
    after = await resume(engine, call, whole.token_ids[:4])
    assert whole.final is not None
    assert after.final is not None
    assert after.final.usage.completion_tokens == 5 == len(after.token_ids)
    assert after.final.usage.prompt_tokens == whole.final.usage.prompt_tokens
    assert after.final.usage.cached_prompt_tokens <= after.final.usage.prompt_tokens
    assert after.final.finish_reason == "length"
    assert metered[-1].usage == after.final.usage


async def test_a_stop_string_across_the_cut_ends_the_answer_where_it_would_have(
    engine: Engine,
) -> None:
    plain = (await collect(engine, make_call(text=COUNTING, max_tokens=16))).text()
    stop = plain[len(plain) // 2 :][:6]
    call = make_call(text=COUNTING, max_tokens=16, stop=stop)
    whole = await collect(engine, call)
    assert whole.text() == plain[: plain.index(stop)]
    rests = []
    for cut in range(1, len(whole.token_ids)):
        after = await resume(engine, call, whole.token_ids[:cut])
        assert after.final is not None
        assert after.final.finish_reason == "stop"
        rests.append(after.text())
        assert whole.text().endswith(rests[-1]), f"cut after {cut} tokens"
    # What could be the stop string's beginning was held back, and comes from whoever goes on.
    assert sorted(rests, key=len, reverse=True) == rests
    assert len(rests[0]) > len(stop)


async def test_the_limit_that_is_paid_for_counts_what_was_delivered(engine: Engine) -> None:
    call = replace(make_call(text=COUNTING, max_tokens=40), paid_tokens=12)
    whole = await collect(engine, call)
    after = await resume(engine, call, whole.token_ids[:5])
    assert len(after.token_ids) == 12 - 5


@pytest.mark.parametrize(
    "options",
    [{"n": 2, "temperature": 0.8, "seed": 7}, {"max_tokens": 5}],
    ids=["several choices", "nothing is missing"],
)
async def test_what_cannot_be_gone_on_with_is_refused_by_name(
    engine: Engine, options: dict[str, Any]
) -> None:
    whole = await collect(engine, make_call())
    answer = await resume(engine, make_call(**options), whole.token_ids[:5])
    assert answer.refusal is not None
    assert (answer.refusal.status, answer.refusal.code) == (400, RESUME_UNSUPPORTED)
