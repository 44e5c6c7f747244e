"""What goes into vLLM's OpenAI layer and how its refusals read. No vLLM is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from serve_app.engine.api import Endpoint, GenerateCall, Refusal

# Fields of vLLM's request models that steer the engine and not the answer, or read what
# is not the caller's. The edge removes them too.
ENGINE_ONLY_FIELDS = frozenset(
    {
        "cache_salt",
        "chat_template",
        "ec_transfer_params",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_payload",
        "mm_processor_kwargs",
        "priority",
        "prompt_embeds",
        "request_id",
        "return_mm_kwargs",
        "routed_experts_prompt_start",
        "session_id",
        "stream_interval",
        "use_beam_search",
        "vllm_xargs",
        "watermarking",
    }
)
# What vLLM calls the prompt in its errors, whatever the client's field is called.
_PROMPT_PARAMS = frozenset({"input_text", "input_tokens"})
_PROMPT_FIELD = {Endpoint.CHAT: "messages", Endpoint.COMPLETIONS: "prompt"}
_CONTEXT_OVERFLOW = re.compile(r"maximum context length|cannot be greater than max_model_len")
_DEFAULT_COMPLETION_TOKENS = 16


def request_body(call: GenerateCall, context_tokens: int | None = None) -> dict[str, Any]:
    """Return the body for vLLM: the client's, less what steers the engine, plus what we set.

    vLLM refuses a limit above ``context_tokens``; no limit of ours is.

    Raises:
        ValueError: the body is not a JSON object.
    """
    body = orjson.loads(call.body)
    if not isinstance(body, dict):
        raise ValueError("the request body must be a JSON object")
    for name in ENGINE_ONLY_FIELDS.intersection(body):
        del body[name]
    body["stream"] = call.stream
    body["priority"] = int(call.priority_class)
    if call.cache_salt:
        body["cache_salt"] = call.cache_salt
    caps = [cap for cap in (call.max_tokens, call.paid_tokens) if cap is not None]
    if caps:
        if context_tokens is not None:
            caps.append(context_tokens)
        _cap_output(body, call.endpoint, min(caps))
    return body


def most_tokens(call: GenerateCall) -> int | None:
    """Return the most output tokens of each choice if all were paid for, None without a limit."""
    body = request_body(replace(call, paid_tokens=None))
    wanted = body.get("max_completion_tokens") if call.endpoint is Endpoint.CHAT else None
    wanted = body.get("max_tokens") if wanted is None else wanted
    if wanted is None and call.endpoint is Endpoint.COMPLETIONS:
        return _DEFAULT_COMPLETION_TOKENS
    return wanted if isinstance(wanted, int) else None


def refusal(endpoint: Endpoint, status: int, message: str, param: str | None) -> Refusal:
    """Word a refusal of vLLM's as OpenAI does; ``status`` is 4xx or 503."""
    if status == 503:
        return Refusal(status, message, type="server_error", code="engine_overloaded")
    if param in _PROMPT_PARAMS:
        param = _PROMPT_FIELD[endpoint]
    code = "context_length_exceeded" if _CONTEXT_OVERFLOW.search(message) else None
    return Refusal(status, message, param=param, code=code)


def validation_error(path: Sequence[str | int], message: str) -> tuple[str | None, str]:
    """Return the field that a request model refused, in OpenAI's spelling, and why.

    ``path`` and ``message`` are pydantic's ``loc`` and ``msg``.
    """
    param = ""
    for part in path:
        if isinstance(part, int):
            param += f"[{part}]"
        elif part.isidentifier() and part.islower():
            param += f".{part}" if param else part
        else:
            # The name of a union's member: below it the path differs per member.
            break
    message = message.removeprefix("Value error, ")
    return (param, f"{param}: {message}") if param else (None, message)


def _cap_output(body: dict[str, Any], endpoint: Endpoint, cap_tokens: int) -> None:
    """Lower the body's output limit to ``cap_tokens`` per choice; a wrong type stays wrong."""
    name = "max_tokens"
    if endpoint is Endpoint.CHAT and body.get("max_completion_tokens") is not None:
        name = "max_completion_tokens"
    wanted = body.get(name)
    if wanted is None:
        wanted = cap_tokens if endpoint is Endpoint.CHAT else _DEFAULT_COMPLETION_TOKENS
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        body[name] = min(wanted, cap_tokens)
