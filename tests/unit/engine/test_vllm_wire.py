"""What reaches vLLM's OpenAI layer, and how its refusals read."""

import json
from typing import Any

import pytest

from serve_app.core.types import PriorityClass
from serve_app.engine.api import Endpoint, GenerateCall
from serve_app.engine.vllm_wire import (
    ENGINE_ONLY_FIELDS,
    most_tokens,
    refusal,
    request_body,
    validation_error,
)
from tests.generate_calls import generate_call


def _call(body: Any, **changes: Any) -> GenerateCall:
    fields = {
        "endpoint": Endpoint.CHAT,
        "cache_salt": "tenant-salt",
        "priority_class": PriorityClass.SHEDDABLE,
    }
    return generate_call(body=json.dumps(body).encode(), **(fields | changes))


def test_fields_that_steer_the_engine_come_from_the_call_alone() -> None:
    client = dict.fromkeys(ENGINE_ONLY_FIELDS, "client") | {
        "temperature": 0,
        "stream": False,
        "model": "m",
    }
    assert request_body(_call(client)) == {
        "temperature": 0,
        "model": "m",
        "stream": True,
        "priority": 2,
        "cache_salt": "tenant-salt",
    }


def test_without_a_salt_the_clients_is_still_dropped() -> None:
    body = request_body(_call({"cache_salt": "theirs"}, cache_salt=""))
    assert "cache_salt" not in body


@pytest.mark.parametrize("body", [[], "text", 1, None])
def test_a_body_that_is_no_object_is_refused(body: Any) -> None:
    with pytest.raises(ValueError, match="JSON object"):
        request_body(_call(body))


@pytest.mark.parametrize(
    ("endpoint", "body", "expected"),
    [
        (Endpoint.CHAT, {}, {"max_tokens": 10}),
        (Endpoint.CHAT, {"max_tokens": 5}, {"max_tokens": 5}),
        (Endpoint.CHAT, {"max_tokens": 50}, {"max_tokens": 10}),
        (Endpoint.CHAT, {"max_completion_tokens": 50}, {"max_completion_tokens": 10}),
        (
            Endpoint.CHAT,
            {"max_tokens": 3, "max_completion_tokens": 50},
            {"max_tokens": 3, "max_completion_tokens": 10},
        ),
        (Endpoint.CHAT, {"max_tokens": "many"}, {"max_tokens": "many"}),
        (Endpoint.CHAT, {"max_tokens": True}, {"max_tokens": True}),
        (Endpoint.CHAT, {"max_tokens": -1}, {"max_tokens": -1}),
        (Endpoint.COMPLETIONS, {"max_tokens": None}, {"max_tokens": 10}),
        (Endpoint.COMPLETIONS, {"max_tokens": 4}, {"max_tokens": 4}),
    ],
)
def test_output_is_capped_and_wrong_values_are_left_to_be_refused(
    endpoint: Endpoint, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    sent = request_body(_call(body, endpoint=endpoint, max_tokens=10))
    assert {key: value for key, value in sent.items() if key.startswith("max_")} == expected


def test_a_cap_above_the_completions_default_leaves_the_default() -> None:
    call = _call({}, endpoint=Endpoint.COMPLETIONS, max_tokens=100)
    assert request_body(call)["max_tokens"] == 16


def test_no_limit_of_ours_is_above_the_context() -> None:
    call = _call({}, endpoint=Endpoint.CHAT, max_tokens=100_000)
    assert request_body(call, context_tokens=2048)["max_tokens"] == 2048
    assert "max_tokens" not in request_body(_call({}, endpoint=Endpoint.CHAT), context_tokens=2048)


def test_context_overflow_has_openais_code_and_names_the_clients_field() -> None:
    message = "This model's maximum context length is 8 tokens. However, your prompt has 9"
    chat = refusal(Endpoint.CHAT, 400, message, "input_tokens")
    assert (chat.code, chat.param) == ("context_length_exceeded", "messages")
    completion = refusal(Endpoint.COMPLETIONS, 400, message, "input_text")
    assert (completion.code, completion.param) == ("context_length_exceeded", "prompt")


def test_other_refusals_keep_their_field_and_have_no_code() -> None:
    refused = refusal(Endpoint.CHAT, 400, "top_p must be in (0, 1]", "top_p")
    assert (refused.status, refused.param, refused.code) == (400, "top_p", None)
    assert refused.type == "invalid_request_error"


def test_a_full_engine_is_the_servers_fault() -> None:
    refused = refusal(Endpoint.CHAT, 503, "busy", None)
    assert (refused.status, refused.type, refused.code) == (
        503,
        "server_error",
        "engine_overloaded",
    )


@pytest.mark.parametrize(
    ("path", "param"),
    [
        (("temperature",), "temperature"),
        (("messages", 0, "ChatCompletionSystemMessageParam", "content"), "messages[0]"),
        (("stream_options", "include_usage"), "stream_options.include_usage"),
        (("stop", "list[str]", 0), "stop"),
        ((), None),
    ],
)
def test_validation_errors_name_the_field_as_the_client_wrote_it(
    path: tuple[str | int, ...], param: str | None
) -> None:
    named, message = validation_error(path, "Value error, is wrong")
    assert named == param
    assert message == (f"{param}: is wrong" if param else "is wrong")


@pytest.mark.parametrize(
    ("endpoint", "body", "cap", "most"),
    [
        (Endpoint.CHAT, {"max_tokens": 50}, None, 50),
        (Endpoint.CHAT, {"max_tokens": 50, "max_completion_tokens": 40}, None, 40),
        (Endpoint.CHAT, {"max_tokens": 50}, 30, 30),
        (Endpoint.CHAT, {}, None, None),
        (Endpoint.CHAT, {}, 30, 30),
        (Endpoint.COMPLETIONS, {}, None, 16),
        (Endpoint.COMPLETIONS, {"max_tokens": 50}, 80, 50),
    ],
)
def test_what_is_paid_for_caps_an_answer_below_the_most_it_may_have(
    endpoint: Endpoint, body: dict[str, Any], cap: int | None, most: int | None
) -> None:
    call = _call(body, endpoint=endpoint, max_tokens=cap, paid_tokens=8)
    sent = request_body(call)
    assert 8 in (sent.get("max_tokens"), sent.get("max_completion_tokens"))
    assert most_tokens(call) == most
