"""A request made one that another replica began, on stand-ins for vLLM's own objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.engine.vllm_resume import replay, sampling_problem


class Detokeniser:
    """Two tokens make a character, as half of one that is longer than a byte does."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    def update(self, token_ids: list[int], stop_terminated: bool) -> None:
        self.ids += token_ids


class State:
    def __init__(self, request: Any) -> None:
        self.prompt_token_ids = request.prompt_token_ids
        self.prompt_len = len(request.prompt_token_ids)
        self.detokenizer = Detokeniser()

    def make_request_output(self, token_ids: list[int], *_: Any) -> Any:
        odd = len(self.detokenizer.ids) % 2
        return None if odd else SimpleNamespace(token_ids=token_ids, text="é")


def params(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "n": 1,
        "logprobs": None,
        "prompt_logprobs": None,
        "structured_outputs": None,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "bad_words": [],
        "thinking_token_budget": None,
        "repetition_detection": None,
        "max_tokens": 20,
        "min_tokens": 5,
    }
    return SimpleNamespace(**(fields | changes))


def test_what_was_delivered_is_read_again_token_by_token_and_ends_the_engines_prompt() -> None:
    request = SimpleNamespace(request_id="q", prompt_token_ids=[1, 2, 3], sampling_params=params())
    states: dict[str, State] = {}

    def register() -> None:
        states["q"] = State(request)

    outputs = replay(register, states, request, (7, 8, 9, 10))
    # Half characters have no output of their own.
    assert [output.token_ids for output in outputs] == [[8], [10]]
    assert states["q"].detokenizer.ids == [7, 8, 9, 10]
    assert states["q"].prompt_token_ids == [1, 2, 3], "the client's prompt is not longer for it"
    assert states["q"].prompt_len == 7, "what is to be computed is"
    assert request.prompt_token_ids == [1, 2, 3, 7, 8, 9, 10]
    assert (request.sampling_params.max_tokens, request.sampling_params.min_tokens) == (16, 1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 1}, "logprobs"),
        ({"structured_outputs": object()}, "structured output"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -0.5}, "presence_penalty"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"thinking_token_budget": 0}, "thinking_token_budget"),
        ({"repetition_detection": object()}, "repetition_detection"),
        ({"max_tokens": 3}, "all its tokens"),
    ],
)
def test_what_vllm_keeps_per_output_token_in_its_engine_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    problem = sampling_problem(params(**changes), 3)
    assert problem is not None
    assert named in problem


def test_a_plain_request_can_go_on() -> None:
    assert sampling_problem(params(), 3) is None
    assert sampling_problem(params(max_tokens=None), 3) is None
