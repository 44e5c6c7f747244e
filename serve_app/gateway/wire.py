"""The OpenAI wire contract at the edge: bytes in, one checked request out.

Pure functions. What a field may hold is said by the models below; which fields reach the
engine by gateway/fields.py. Whatever passes is encoded once, so that the engine parses
exactly what was checked: duplicate keys, for one, cannot mean two things.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from serve_app.config import LimitSettings
from serve_app.errors import InvalidRequest
from serve_app.gateway.fields import DROPPED, HARMLESS, REFUSED
from serve_app.gateway.invalid import from_validation, parse_object, refuse
from serve_app.gateway.prompt import Prompt, chat_prompt, completion_prompt

ServiceTier = Literal["auto", "default", "flex", "priority"]

Sampling = Literal["greedy", "seeded", "random"]

_INT64: Final = 2**63
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that passed the edge.

    ``max_tokens`` is per choice, None if the client set none. ``choices`` is how many
    texts will be generated: ``n`` for every prompt. ``prompt_bytes`` is the size of the
    prompt's text, ``prompt_token_ids`` its exact length when it came as token ids.
    ``prefix`` is the prompt's start for prefix hashing. ``session`` is the client's hint
    which requests belong together. ``sampling`` says how far the answer could be made again.
    """

    model: str
    stream: bool
    include_usage: bool
    n: int
    choices: int
    max_tokens: int | None
    prompt_bytes: int
    prompt_token_ids: int | None
    prefix: bytes
    service_tier: ServiceTier
    user: str | None
    metadata: Mapping[str, str]
    session: str | None
    sampling: Sampling
    fields: bytes

    def body_for_engine(self, model: str) -> bytes:
        """Return the JSON object for the engine; answers repeat ``model`` as their model.

        ``fields`` is the object without its model, encoded when the request was parsed.
        """
        start = b'{"model":' + orjson.dumps(model)
        return start + (b"}" if self.fields == b"{}" else b"," + self.fields[1:])


def parse_chat(body: bytes, limits: LimitSettings) -> ParsedRequest:
    """Check the body of /v1/chat/completions.

    Raises:
        InvalidRequest: what is wrong, with ``param`` as OpenAI writes it.
    """
    raw = parse_object(body)
    _bound_sizes(raw, {**_SIZES, "messages": limits.max_messages})
    _refuse_unserved(raw)
    request = _validate(_Chat, raw)
    _check_common(request, limits)
    if request.top_logprobs and not request.logprobs:
        refuse("top_logprobs", "it needs `logprobs` to be true")
    _check_tools(raw)
    _check_template_variables(raw)
    fields = _fields_for_engine(raw)
    prompt = chat_prompt(raw["messages"], raw.get("tools"))
    max_tokens = request.max_completion_tokens or request.max_tokens
    return _parsed(request, prompt, max_tokens, fields)


def parse_completions(body: bytes, limits: LimitSettings) -> ParsedRequest:
    """Check the body of /v1/completions.

    Raises:
        InvalidRequest: what is wrong, with ``param`` as OpenAI writes it.
    """
    raw = parse_object(body)
    _bound_sizes(raw, _SIZES)
    _refuse_unserved(raw)
    request = _validate(_Completion, raw)
    _check_common(request, limits)
    if raw.get("prompt") is None:
        raise InvalidRequest(
            "Missing required parameter: 'prompt'.",
            param="prompt",
            code="missing_required_parameter",
        )
    prompt = completion_prompt(raw["prompt"], limits.max_prompts)
    return _parsed(request, prompt, request.max_tokens, _fields_for_engine(raw))


# How many entries a field may have, looked at before anything is validated.
_SIZES: Final[Mapping[str, int]] = {
    "tools": 128,
    "stop": 16,
    "metadata": 16,
    "logit_bias": 1024,
    "stop_token_ids": 1024,
    "allowed_token_ids": 262_144,
    "logprob_token_ids": 128,
    "bad_words": 1024,
    "documents": 1024,
}


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _without_nul(value: str) -> str:
    """Refuse what the ledger cannot keep: it would book another user than the one checked."""
    if "\0" in value:
        raise PydanticCustomError("nul", "it must not contain the character NUL")
    return value


Penalty = Annotated[float, Field(ge=-2, le=2)]
EndUser = Annotated[str, Field(max_length=64), AfterValidator(_without_nul)]


class _Wire(BaseModel):
    """Strict types; unknown fields are left to the engine's own layer."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False)


class _StreamOptions(_Wire):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _JsonSchema(_Wire):
    name: str = Field(min_length=1, max_length=64)
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class _ResponseFormat(_Wire):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: _JsonSchema | None = None


class _Common(_Wire):
    model: str = Field(min_length=1, max_length=256)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=_INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list), Field(max_length=16)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: _ResponseFormat | None = None
    service_tier: ServiceTier | None = None
    user: EndUser | None = None
    safety_identifier: EndUser | None = None
    metadata: (
        dict[
            Annotated[str, Field(min_length=1, max_length=64)],
            Annotated[str, Field(max_length=512)],
        ]
        | None
    ) = None
    prompt_cache_key: Annotated[str, Field(max_length=256)] | None = None
    session_id: Annotated[str, Field(max_length=256)] | None = None


class _ToolCallFunction(_Wire):
    name: str
    arguments: str | None = None


class _ToolCall(_Wire):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _ToolCallFunction


class _Message(_Wire):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[_ToolCall] | None = None
    refusal: str | None = None


class _Function(_Wire):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(_Wire):
    type: Literal["function"]
    function: _Function


class _Chat(_Common):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[_Tool], Field(min_length=1)] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class _Completion(_Common):
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None


def _validate(model: type[Model], raw: dict[str, Any]) -> Model:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise from_validation(error, raw) from None


def _bound_sizes(raw: dict[str, Any], sizes: Mapping[str, int]) -> None:
    for name, most in sizes.items():
        value = raw.get(name)
        if isinstance(value, list | dict) and len(value) > most:
            problem = f"at most {most} entries; got {len(value)}"
            refuse(name, problem, "array_above_max_length")


def _refuse_unserved(raw: dict[str, Any]) -> None:
    for name in sorted(REFUSED.keys() & raw.keys()):
        as_many_as_asked = name == "best_of" and raw[name] == (raw.get("n") or 1)
        if raw[name] not in HARMLESS and not as_many_as_asked:
            refuse(name, REFUSED[name], "unsupported_parameter")


def _check_common(request: _Common, limits: LimitSettings) -> None:
    _at_most("n", request.n, limits.max_choices)
    _at_most("max_tokens", request.max_tokens, limits.max_output_tokens)
    if isinstance(request, _Chat):
        most = limits.max_output_tokens
        _at_most("max_completion_tokens", request.max_completion_tokens, most)
    _at_most("min_tokens", request.min_tokens, limits.max_output_tokens)
    if request.stream_options is not None and not request.stream:
        refuse("stream_options", "it is allowed only when `stream` is true")
    form = request.response_format
    if form is not None and form.type == "json_schema" and form.json_schema is None:
        problem = "it is required when `response_format.type` is 'json_schema'"
        refuse("response_format.json_schema", problem, "missing_required_parameter")


def _at_most(name: str, value: int | None, most: int) -> None:
    if value is not None and value > most:
        problem = f"it must be at most {most} (got {value})"
        refuse(name, problem, "number_above_max_value")


def _check_tools(raw: dict[str, Any]) -> None:
    choice = raw.get("tool_choice")
    if choice is None or choice == "none":
        return
    if not raw.get("tools"):
        refuse("tool_choice", "it needs `tools`")
    if isinstance(choice, str):
        if choice not in ("auto", "required"):
            refuse("tool_choice", "it must be 'none', 'auto', 'required' or a named function")
        return
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        problem = 'it must look like {"type": "function", "function": {"name": "..."}}'
        refuse("tool_choice", problem, "invalid_type")
    if all(tool["function"]["name"] != name for tool in raw["tools"]):
        refuse("tool_choice.function.name", "no tool in `tools` has this name")


def _check_template_variables(raw: dict[str, Any]) -> None:
    for name in ("chat_template", "tokenize"):
        if name in (raw.get("chat_template_kwargs") or {}):
            refuse(f"chat_template_kwargs.{name}", "this variable is the server's")


def _parsed(
    request: _Common, prompt: Prompt, max_tokens: int | None, fields: bytes
) -> ParsedRequest:
    n = request.n or 1
    options = request.stream_options
    return ParsedRequest(
        model=request.model,
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        n=n,
        choices=n * prompt.count,
        max_tokens=max_tokens,
        prompt_bytes=prompt.text_bytes,
        prompt_token_ids=prompt.token_ids,
        prefix=prompt.prefix,
        service_tier=request.service_tier or "auto",
        user=request.safety_identifier or request.user or None,
        metadata=request.metadata or {},
        session=request.prompt_cache_key or request.session_id or None,
        sampling=_sampling(request),
        fields=fields,
    )


def _sampling(request: _Common) -> Sampling:
    if request.temperature == 0 or request.top_k == 1:
        return "greedy"
    return "random" if request.seed is None else "seeded"


def _fields_for_engine(raw: dict[str, Any]) -> bytes:
    left_out = DROPPED.keys() | REFUSED.keys() | {"model"}
    kept = {name: value for name, value in raw.items() if name not in left_out}
    try:
        return orjson.dumps(kept)
    except orjson.JSONEncodeError:
        refuse(None, "The body is nested too deeply", "invalid_json")
