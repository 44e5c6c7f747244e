"""The wire contract: what passes the edge, and what is told to whom when it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import LimitSettings
from serve_app.errors import ApiError, InvalidRequest
from serve_app.gateway.prompt import PREFIX_BYTES
from serve_app.gateway.wire import (
    ParsedRequest,
    _Chat,
    _Completion,
    parse_chat,
    parse_completions,
)
from tests.properties import examples

LIMITS = LimitSettings()
MESSAGES = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> ParsedRequest:
    # The standard library writes numbers of any size, as a client may.
    body = json.dumps({"model": "small", "messages": MESSAGES, **fields}).encode()
    return parse_chat(body, LIMITS)


def completion(**fields: Any) -> ParsedRequest:
    return parse_completions(orjson.dumps({"model": "small", "prompt": "hi", **fields}), LIMITS)


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.status == 400
    assert caught.value.type == "invalid_request_error"
    return caught.value


def refusal_of(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(body, LIMITS)
    return caught.value


def test_a_plain_request_is_read() -> None:
    parsed = chat(stream=True, stream_options={"include_usage": True}, max_tokens=7, n=2)
    assert parsed.model == "small"
    assert parsed.stream
    assert parsed.include_usage
    assert (parsed.max_tokens, parsed.n, parsed.choices) == (7, 2, 2)
    assert parsed.prompt_bytes == len("user") + len("hello")
    assert parsed.service_tier == "auto"


def test_nulls_mean_the_same_as_absent_fields() -> None:
    names = (
        "max_tokens max_completion_tokens temperature top_p n stop seed stream stream_options "
        "logprobs top_logprobs tools tool_choice response_format user metadata service_tier "
        "logit_bias presence_penalty frequency_penalty parallel_tool_calls"
    )
    parsed = chat(**dict.fromkeys(names.split()))
    assert (parsed.max_tokens, parsed.n, parsed.stream, parsed.user) == (None, 1, False, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [*MESSAGES, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "hologram"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": LIMITS.max_output_tokens + 1}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 10**9}, "max_completion_tokens"),
        ({"min_tokens": 10**9}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": LIMITS.max_choices + 1}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ["x", 3]}, "stop[1]"),
        ({"stop": 3}, "stop"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{}] * 129}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "poem"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"service_tier": "gold"}, "service_tier"),
        ({"user": "u" * 65}, "user"),
        ({"user": "a\0b"}, "user"),
        ({"safety_identifier": "a\0b"}, "safety_identifier"),
        ({"safety_identifier": "u" * 65}, "safety_identifier"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {"k": 3}}, "metadata.k"),
        ({"logit_bias": {"50": 101}}, "logit_bias.50"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
    ],
)
def test_bad_fields_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert param in error.message


def test_a_missing_field_is_named() -> None:
    error = refusal_of(orjson.dumps({"messages": MESSAGES}))
    assert (error.param, error.code) == ("model", "missing_required_parameter")
    error = refusal_of(orjson.dumps({"model": "small"}))
    assert (error.param, error.code) == ("messages", "missing_required_parameter")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"hello", "not valid JSON"),
        (b'{"model": "m"', "not valid JSON"),
        (b'{"model": "m"} x', "not valid JSON"),
        (b"[]", "must be a JSON object, not an array"),
        (b"3", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "\xff"}', "not valid UTF-8 (byte 11)"),
        (b"\xff\xfe{\x00}\x00", "not valid UTF-8"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_bodies_that_are_not_a_json_object_say_why(body: bytes, words: str) -> None:
    error = refusal_of(body)
    assert words in error.message
    assert error.param is None


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_has_not_names_its_field(constant: str) -> None:
    error = refusal_of(b'{"model": "m", "temperature": ' + constant.encode() + b"}")
    assert error.param == "temperature"
    assert "not a JSON number" in error.message


def test_deep_nesting_is_refused_at_the_edge_and_not_by_the_encoder() -> None:
    deep = b'{"model":"m","messages":[{"role":"user","content":"x"}],"extra":'
    error = refusal_of(deep + b"[" * 900 + b"]" * 900 + b"}")
    assert "nested" in error.message


def test_messages_are_counted_before_they_are_validated() -> None:
    # None of them is a message: had validation run first, it would complain about that.
    error = refusal(messages=[None] * 100_000)
    assert error.message == "Invalid 'messages': at most 2048 entries; got 100000."


def test_errors_do_not_repeat_what_the_client_wrote() -> None:
    secret = "my-password-is-swordfish"
    for error in (
        refusal(messages=[{"role": secret, "content": "x"}]),
        refusal(temperature=secret),
        refusal(messages=[{"role": "user", "content": {"text": secret}}]),
    ):
        assert secret not in error.message


def test_error_paths_are_bounded() -> None:
    error = refusal(metadata={"k" * 100_000: "v"})
    assert error.param is not None
    assert len(error.message) < 1000


def test_the_engine_gets_its_own_model_name_and_no_steering_fields() -> None:
    parsed = chat(
        priority=-5,
        cache_salt="other-tenant",
        kv_transfer_params={"do_remote_prefill": True},
        request_id="mine",
        vllm_xargs={"x": 1},
        data_parallel_rank=3,
        user="ann",
        metadata={"team": "a"},
        service_tier="priority",
        temperature=0.5,
        made_up_by_a_plugin=[1],
    )
    body = orjson.loads(parsed.body_for_engine("served"))
    assert body == {
        "model": "served",
        "messages": MESSAGES,
        "temperature": 0.5,
        "made_up_by_a_plugin": [1],
    }
    assert (parsed.user, parsed.metadata, parsed.service_tier) == ("ann", {"team": "a"}, "priority")


def test_a_body_with_nothing_but_a_model_is_still_an_object() -> None:
    parsed = completion()
    assert orjson.loads(parsed.body_for_engine('q"uote')) == {"model": 'q"uote', "prompt": "hi"}


def test_a_key_sent_twice_means_one_thing_to_edge_and_engine() -> None:
    body = b'{"model":"m","max_tokens":1,"max_tokens":2,"messages":[{"role":"user","content":"x"}]}'
    parsed = parse_chat(body, LIMITS)
    assert parsed.max_tokens == 2
    assert parsed.body_for_engine("m").count(b"max_tokens") == 1


@pytest.mark.parametrize(
    "field", ["chat_template", "prompt_embeds", "use_beam_search", "functions", "function_call"]
)
def test_what_is_not_served_is_refused_and_not_ignored(field: str) -> None:
    assert refusal(**{field: "x"}).param == field
    assert field not in orjson.loads(chat(**{field: None}).body_for_engine("m"))


def test_template_variables_pass_but_not_the_template() -> None:
    parsed = chat(chat_template_kwargs={"enable_thinking": False})
    assert b"enable_thinking" in parsed.body_for_engine("m")
    error = refusal(chat_template_kwargs={"chat_template": "{{ x }}"})
    assert error.param == "chat_template_kwargs.chat_template"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": "http://10.0.0.1/"},
        {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}},
        {"type": "image_embeds", "image_embeds": "AAAA"},
        {"type": "text", "text": "x", "prompt_embeds": "AAAA"},
        {"type": "text", "text": "x", "uuid": "cache-entry-of-somebody"},
    ],
)
def test_media_by_reference_and_cache_names_are_refused(part: dict[str, Any]) -> None:
    error = refusal(messages=[{"role": "user", "content": [part]}])
    assert error.param is not None
    assert error.param.startswith("messages[0].content[0]")


def test_inline_media_passes() -> None:
    url = "data:image/png;base64,AAAA"
    parsed = chat(
        messages=[
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]},
        ]
    )
    assert parsed.prompt_bytes == len("user") + len(url)


def test_a_tool_conversation_passes() -> None:
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    parsed = chat(
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "what time is it?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        ],
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "now"}},
    )
    assert b'"arguments":"{}"' in parsed.body_for_engine("m")


def test_a_named_tool_must_exist() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    error = refusal(tools=[tool], tool_choice={"type": "function", "function": {"name": "then"}})
    assert error.param == "tool_choice.function.name"


def test_the_newer_of_two_output_limits_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=9).max_tokens == 9


def test_conversations_that_begin_alike_share_a_prefix() -> None:
    system = {"role": "system", "content": "a long instruction"}
    one = chat(messages=[system, {"role": "user", "content": "first"}]).prefix
    two = chat(messages=[system, {"role": "user", "content": "second"}]).prefix
    shared = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    assert b"a long instruction" in one[:shared]


def test_where_a_message_ends_is_part_of_the_prefix() -> None:
    one = chat(messages=[{"role": "user", "content": "ab"}, {"role": "user", "content": "c"}])
    two = chat(messages=[{"role": "user", "content": "a"}, {"role": "user", "content": "bc"}])
    assert one.prefix != two.prefix


def test_the_prefix_is_bounded_and_the_size_is_not() -> None:
    text = "é" * PREFIX_BYTES
    parsed = chat(messages=[{"role": "user", "content": text}])
    assert len(parsed.prefix) == PREFIX_BYTES
    assert parsed.prompt_bytes == 2 * PREFIX_BYTES + len("user")


@pytest.mark.parametrize(
    ("prompt", "choices", "token_ids"),
    [
        ("hello", 2, None),
        (["a", "b", "c"], 6, None),
        ([1, 2, 3], 2, 3),
        ([[1, 2], [3]], 4, 3),
    ],
)
def test_every_kind_of_completion_prompt_is_measured(
    prompt: object, choices: int, token_ids: int | None
) -> None:
    parsed = completion(prompt=prompt, n=2)
    assert (parsed.choices, parsed.prompt_token_ids) == (choices, token_ids)


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (3, "prompt"),
        ({}, "prompt"),
        ([], "prompt"),
        (["a", 3], "prompt[1]"),
        ([1, True], "prompt"),
        ([1, 1.5], "prompt"),
        ([1, -1], "prompt"),
        ([2**31], "prompt"),
        ([[1], []], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([None], "prompt[0]"),
        (["a"] * (LIMITS.max_prompts + 1), "prompt"),
    ],
)
def test_bad_completion_prompts_are_refused(prompt: object, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        completion(prompt=prompt)
    assert caught.value.param == param


def test_best_of_passes_only_where_it_asks_for_nothing() -> None:
    assert completion(best_of=1).n == 1
    assert completion(best_of=3, n=3).n == 3
    with pytest.raises(InvalidRequest) as caught:
        completion(best_of=3)
    assert caught.value.param == "best_of"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    sorted(set(_Chat.model_fields) | set(_Completion.model_fields) | {"tool_choice", "best_of"})
)
PARTS = st.dictionaries(
    st.sampled_from(["type", "text", "image_url", "uuid", "input_audio"]),
    st.sampled_from(["text", "image_url", "input_audio"]) | JSON,
    max_size=4,
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "name", "tool_calls"]),
    st.sampled_from(["user", "assistant"]) | st.lists(PARTS | JSON, max_size=3) | JSON,
    max_size=4,
)


def outcome(
    parse: Callable[[bytes, LimitSettings], ParsedRequest], body: bytes
) -> ParsedRequest | ApiError:
    """Return what the edge makes of a body; any other exception fails the test."""
    try:
        return parse(body, LIMITS)
    except ApiError as error:
        return error


@given(body=st.binary(max_size=200))
@examples(300)
def test_any_bytes_are_either_a_request_or_an_api_error(body: bytes) -> None:
    for parse in (parse_chat, parse_completions):
        result = outcome(parse, body)
        assert isinstance(result, ParsedRequest) or result.status == 400


@given(
    fields=st.dictionaries(FIELDS, JSON, max_size=6),
    messages=st.lists(MESSAGE, max_size=3),
    prompt=JSON | st.lists(st.integers()) | st.lists(st.text()),
)
@examples(600)
def test_any_json_is_either_a_request_or_an_api_error(
    fields: dict[str, Any], messages: list[Any], prompt: object
) -> None:
    everything = {"model": "m", "messages": messages, "prompt": prompt, **fields}
    body = json.dumps(everything).encode()
    for parse in (parse_chat, parse_completions):
        result = outcome(parse, body)
        if isinstance(result, ApiError):
            assert result.status == 400
            assert orjson.loads(result.body())["error"]["message"]
        else:
            assert orjson.loads(result.body_for_engine("m"))["model"] == "m"
            assert result.choices >= result.n >= 1
