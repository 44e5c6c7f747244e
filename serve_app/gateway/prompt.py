"""The text of a prompt: checked in place, measured, and laid out for prefix hashing."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any, Final

import orjson

from serve_app.gateway.fields import FORBIDDEN_PART_KEYS, MEDIA_URL_PARTS, TEXT_PARTS
from serve_app.gateway.invalid import path, refuse

# An index of prefixes needs no more than the start of a prompt; it is copied per request.
PREFIX_BYTES: Final = 2**20
MAX_CONTENT_PARTS: Final = 16_384
MAX_PROMPT_TOKEN_IDS: Final = 2**20
_TOKEN_ID_LIMIT: Final = 2**31
ROLE_MARK: Final = b"\x1e"
TEXT_MARK: Final = b"\x1f"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the policies see it.

    ``text_bytes`` is the UTF-8 size of all text in it, media included as they were sent.
    ``token_ids`` is the exact number of prompt tokens when the client sent ids, else
    None. ``prefix`` is what two prompts share if their first tokens are the same, at
    most PREFIX_BYTES. ``count`` is the number of prompts.
    """

    text_bytes: int
    token_ids: int | None
    prefix: bytes
    count: int = 1


class _Text:
    """Collects the text of a prompt: all of its size, the first PREFIX_BYTES of itself."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self.parts_left = MAX_CONTENT_PARTS
        self._kept = bytearray()

    def add(self, mark: bytes, text: bytes) -> None:
        self.size_bytes += len(text)
        room = PREFIX_BYTES - len(self._kept)
        if room > 0:
            self._kept += (mark + text)[:room]

    def prefix(self) -> bytes:
        return bytes(self._kept)


def chat_prompt(messages: list[dict[str, Any]], tools: list[Any] | None) -> Prompt:
    """Measure a conversation whose messages are objects with a known role.

    Tools come first, for chat templates write them before the first message.

    Raises:
        InvalidRequest: content of a wrong type, an unknown part, media by reference.
    """
    text = _Text()
    if tools:
        text.add(ROLE_MARK, orjson.dumps(tools))
    for index, message in enumerate(messages):
        text.add(ROLE_MARK, str(message["role"]).encode())
        _add_content(text, message, index)
        if message.get("tool_calls"):
            text.add(TEXT_MARK, orjson.dumps(message["tool_calls"]))
    return Prompt(text.size_bytes, None, text.prefix())


def completion_prompt(prompt: object, max_prompts: int) -> Prompt:
    """Measure the prompt of a completion: a text, token ids, or a list of either.

    Raises:
        InvalidRequest: another type, an empty list, too many prompts or token ids.
    """
    if isinstance(prompt, str):
        encoded = prompt.encode()
        return Prompt(len(encoded), None, encoded[:PREFIX_BYTES])
    if not isinstance(prompt, list):
        problem = "it must be a string, a list of strings, or lists of token ids"
        refuse("prompt", problem, "invalid_type")
    if not prompt:
        refuse("prompt", "it must not be empty", "empty_array")
    if type(prompt[0]) is int:
        prefix = _token_ids(prompt, "prompt")
        return Prompt(4 * len(prompt), len(prompt), prefix)
    if len(prompt) > max_prompts:
        problem = f"at most {max_prompts} prompts in one request; got {len(prompt)}"
        refuse("prompt", problem, "array_above_max_length")
    if isinstance(prompt[0], list):
        return _many_token_ids(prompt)
    return _many_texts(prompt)


def _many_texts(prompts: list[Any]) -> Prompt:
    size_bytes = 0
    for index, text in enumerate(prompts):
        if not isinstance(text, str):
            refuse(path("prompt", index), "every prompt must be a string", "invalid_type")
        size_bytes += len(text.encode())
    return Prompt(size_bytes, None, prompts[0].encode()[:PREFIX_BYTES], len(prompts))


def _many_token_ids(prompts: list[Any]) -> Prompt:
    total = 0
    for index, ids in enumerate(prompts):
        where = path("prompt", index)
        if not isinstance(ids, list) or not ids:
            refuse(where, "every prompt must be a non-empty list of token ids", "invalid_type")
        _token_ids(ids, where)
        total += len(ids)
    first = array("I", prompts[0]).tobytes()[:PREFIX_BYTES]
    return Prompt(4 * total, total, first, len(prompts))


def _token_ids(ids: list[Any], where: str) -> bytes:
    """Check token ids and return the prefix that stands for them."""
    if len(ids) > MAX_PROMPT_TOKEN_IDS:
        problem = f"at most {MAX_PROMPT_TOKEN_IDS} token ids; got {len(ids)}"
        refuse(where, problem, "array_above_max_length")
    if set(map(type, ids)) != {int}:
        refuse(where, "token ids must be integers", "invalid_type")
    if min(ids) < 0 or max(ids) >= _TOKEN_ID_LIMIT:
        refuse(where, "token ids must be at least 0 and below 2^31")
    return array("I", ids).tobytes()[:PREFIX_BYTES]


def _add_content(text: _Text, message: dict[str, Any], index: int) -> None:
    content = message.get("content")
    if isinstance(content, str):
        text.add(TEXT_MARK, content.encode())
    elif isinstance(content, list):
        if not content:
            where = path("messages", index, "content")
            refuse(where, "it must not be an empty array", "empty_array")
        for number, part in enumerate(content):
            _add_part(text, part, ("messages", index, "content", number))
    elif content is not None:
        where = path("messages", index, "content")
        refuse(where, "it must be a string or an array of content parts", "invalid_type")
    elif message["role"] != "assistant":
        where = path("messages", index, "content")
        refuse(where, "it is required for this role", "missing_required_parameter")


def _add_part(text: _Text, part: object, where: tuple[str | int, ...]) -> None:
    text.parts_left -= 1
    if text.parts_left < 0:
        problem = f"at most {MAX_CONTENT_PARTS} content parts in one request"
        refuse("messages", problem, "array_above_max_length")
    if isinstance(part, str):
        text.add(TEXT_MARK, part.encode())
        return
    if not isinstance(part, dict):
        refuse(path(*where), "a content part must be an object", "invalid_type")
    for key in FORBIDDEN_PART_KEYS & part.keys():
        refuse(path(*where, key), "this field is not accepted from clients")
    kind = part.get("type")
    if not isinstance(kind, str):
        refuse(path(*where, "type"), "a content part needs a type", "missing_required_parameter")
    if kind in TEXT_PARTS:
        value = part.get(TEXT_PARTS[kind])
        if not isinstance(value, str):
            refuse(path(*where, TEXT_PARTS[kind]), "it must be a string", "invalid_type")
        text.add(TEXT_MARK, value.encode())
    elif kind in MEDIA_URL_PARTS:
        text.add(TEXT_MARK, _inline_media(part.get(kind), (*where, kind)))
    elif kind == "input_audio":
        text.add(TEXT_MARK, _inline_audio(part.get(kind), (*where, kind)))
    else:
        known = ", ".join(sorted({*TEXT_PARTS, *MEDIA_URL_PARTS, "input_audio"}))
        refuse(path(*where, "type"), f"unknown content part type; known are {known}")


def _inline_media(media: object, where: tuple[str | int, ...]) -> bytes:
    url = media.get("url") if isinstance(media, dict) else None
    if not isinstance(url, str):
        refuse(path(*where, "url"), "it must be a string", "invalid_type")
    if not url.startswith("data:"):
        refuse(path(*where, "url"), "only data: URLs are served; send the media inline")
    return url.encode()


def _inline_audio(audio: object, where: tuple[str | int, ...]) -> bytes:
    data = audio.get("data") if isinstance(audio, dict) else None
    if not isinstance(data, str):
        refuse(path(*where, "data"), "it must be base64 text", "invalid_type")
    return data.encode()
