"""OpenAI's answers as bytes, from a simulated engine: SSE events and whole bodies.

The parts of an event that don't change within a request are rendered once; a token
costs one concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

from serve_app.core.types import Usage
from serve_app.engine.api import Endpoint


@dataclass(frozen=True, slots=True)
class Header:
    """What every chunk of one response repeats. ``created_s`` is Unix time."""

    endpoint: Endpoint
    id: str
    created_s: int
    model: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One finished answer of a response that doesn't stream."""

    index: int
    text: str
    finish_reason: str


class ChoiceEvents:
    """The SSE events of one choice."""

    __slots__ = ("_after", "_before", "_finish_after", "_finish_before", "role")

    def __init__(self, header: Header, index: int, include_usage: bool) -> None:
        chat = header.endpoint is Endpoint.CHAT
        kind = "chat.completion.chunk" if chat else "text_completion"
        start = (
            f'data: {{"id":{_json(header.id)},"object":"{kind}","created":{header.created_s},'
            f'"model":{_json(header.model)},"choices":[{{"index":{index},'
        )
        usage = ',"usage":null' if include_usage else ""
        end = f"}}]{usage}}}\n\n"
        content = '"delta":{"content":"' if chat else '"text":"'
        closing = '"},"logprobs":null' if chat else '","logprobs":null'
        self._before = (start + content).encode()
        self._after = (f'{closing},"finish_reason":null' + end).encode()
        empty = '"delta":{}' if chat else '"text":""'
        self._finish_before = (start + empty + ',"logprobs":null,"finish_reason":"').encode()
        self._finish_after = ('"' + end).encode()
        self.role = b""
        if chat:
            delta = '"delta":{"role":"assistant","content":""},"logprobs":null'
            self.role = (start + delta + ',"finish_reason":null' + end).encode()

    def text(self, text: bytes) -> bytes:
        """Return the event that adds ``text``: ASCII without quotes or backslashes."""
        return self._before + text + self._after

    def finish(self, reason: str) -> bytes:
        """Return the event that ends the choice."""
        return self._finish_before + reason.encode() + self._finish_after


def usage_event(header: Header, usage: Usage) -> bytes:
    """Return the usage event a client asked for with ``stream_options.include_usage``."""
    chunk = _envelope(header, "chat.completion.chunk")
    chunk["choices"] = []
    chunk["usage"] = _usage(usage)
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def whole_body(header: Header, choices: list[Choice], usage: Usage) -> bytes:
    """Return the JSON body of a response that doesn't stream."""
    body = _envelope(header, "chat.completion")
    body["choices"] = [_whole_choice(header.endpoint, choice) for choice in choices]
    body["usage"] = _usage(usage)
    return orjson.dumps(body)


def _envelope(header: Header, chat_object: str) -> dict[str, Any]:
    chat = header.endpoint is Endpoint.CHAT
    return {
        "id": header.id,
        "object": chat_object if chat else "text_completion",
        "created": header.created_s,
        "model": header.model,
    }


def _whole_choice(endpoint: Endpoint, choice: Choice) -> dict[str, Any]:
    rest = {"logprobs": None, "finish_reason": choice.finish_reason}
    if endpoint is Endpoint.CHAT:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {"index": choice.index, "message": message, **rest}
    return {"index": choice.index, "text": choice.text, **rest}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }


def _json(text: str) -> str:
    return orjson.dumps(text).decode()
