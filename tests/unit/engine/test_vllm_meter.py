"""Counting what an engine generated."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.types import Outcome, Usage
from serve_app.engine.api import Metered
from serve_app.engine.meter import ChoiceStep, PromptMeter, RequestMeter
from tests.generate_calls import generate_call

CALL = generate_call()


@given(st.lists(st.lists(st.integers(0, 50_000), max_size=5), max_size=20))
def test_deltas_and_totals_count_the_same(steps: list[list[int]]) -> None:
    delta, cumulative = PromptMeter(cumulative=False), PromptMeter(cumulative=True)
    so_far: list[int] = []
    for step in steps:
        so_far += step
        new = delta.observe([ChoiceStep(0, step)], prompt_tokens=3, cached_prompt_tokens=0)
        same = cumulative.observe(
            [ChoiceStep(0, list(so_far))], prompt_tokens=3, cached_prompt_tokens=0
        )
        assert new == same == step
    assert delta.completion_tokens == cumulative.completion_tokens == len(so_far)


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    meter = RequestMeter(CALL, 0.0)
    prompt = meter.open_prompt(cumulative=False)
    prompt.observe([ChoiceStep(0, [1])], prompt_tokens=40, cached_prompt_tokens=0)
    prompt.observe([ChoiceStep(1, [2, 3])], prompt_tokens=40, cached_prompt_tokens=32)
    assert meter.usage == Usage(40, 0, 3)


def test_prompts_of_one_request_add_up() -> None:
    meter = RequestMeter(CALL, 0.0)
    for cached in (0, 16):
        meter.open_prompt(cumulative=True).observe(
            [ChoiceStep(0, [1, 2], "stop")], prompt_tokens=20, cached_prompt_tokens=cached
        )
    assert meter.usage == Usage(40, 16, 4)
    assert meter.finish_reason == "stop"


def test_a_request_the_engine_never_reported_counts_nothing() -> None:
    meter = RequestMeter(CALL, 1.0)
    meter.open_prompt(cumulative=False)
    assert meter.usage == Usage()
    assert meter.finish_reason is None
    assert meter.timings(3.5).total_s == pytest.approx(2.5)


def test_every_listener_hears_of_a_request_once() -> None:
    meter = RequestMeter(CALL, 10.0)
    meter.open_prompt(cumulative=False).observe(
        [ChoiceStep(0, [1])], prompt_tokens=2, cached_prompt_tokens=0
    )
    meter.observe_times(queued_s=0.5, first_token_s=1.5)
    meter.observe_times(queued_s=9.0, first_token_s=9.0)
    heard: list[Metered] = []
    also: list[Metered] = []
    meter.settle(Outcome.CANCELLED, 12.0, [heard.append, also.append])
    meter.settle(Outcome.COMPLETED, 13.0, [heard.append])
    assert len(heard) == len(also) == 1
    assert dataclasses.asdict(heard[0]) == {
        "request_id": "r",
        "tenant": "acme",
        "usage": {
            "prompt_tokens": 2,
            "cached_prompt_tokens": 0,
            "completion_tokens": 1,
            "engine_s": 0.0,
            "kv_block_us": 0,
        },
        "outcome": Outcome.CANCELLED,
        "timings": {"queued_s": 0.5, "first_token_s": 1.5, "total_s": 2.0},
        "charge": None,
        "attempt": 1,
    }
