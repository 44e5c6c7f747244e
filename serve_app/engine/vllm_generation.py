"""One request inside the vLLM engine: from vLLM's output steps to frames.

    engine step -> metered vLLM stream -> vLLM's OpenAI layer -> SSE strings -> Frame
                        |   ^
                        |   +-- asks for the next step: the last one's strings are complete
                        +-- counts tokens, keeps their ids

vLLM's OpenAI layer runs in a task of its own, owned by the request. It must: that layer
swallows a cancellation when it does not stream, and a request whose caller is cancelled
twice would leave its abort half sent. The caller reads frames; if it reads slowly, steps
join into one frame, so memory stays bounded by the length of the answer.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

import orjson

from serve_app.engine.api import Frame, GenerateCall, Refusal
from serve_app.engine.meter import RequestMeter

_FINISHED = '"finish_reason":"'
_ERROR = 'data: {"error":'
# A chunk's own member: nothing that a model or a client wrote comes before it.
_CREATED = re.compile(r'"created":\d+')


@dataclass(slots=True)
class Generation:
    """State of one request between vLLM's OpenAI layer and the reader of its frames.

    ``model`` is the client's name of it, which answers repeat. ``engine_errors`` are what
    vLLM's streams raised: its OpenAI layer turns them into SSE text, which loses their
    type. ``collectors`` are vLLM's output queues, by vLLM's
    request id. ``started`` turns true when vLLM has the request,
    ``aborted`` when somebody asked for its end, ``lost`` when the engine gives it up.
    ``replayed`` are outputs that another replica delivered, for the OpenAI layer to read
    before any of this one.
    """

    call: GenerateCall
    meter: RequestMeter
    model: str = ""
    task: asyncio.Task[None] | None = None
    refusal: Refusal | None = None
    finish_reason: str | None = None
    engine_errors: list[BaseException] = field(default_factory=list)
    collectors: dict[str, Any] = field(default_factory=dict)
    started: bool = False
    aborted: bool = False
    lost: bool = False
    replayed: list[Any] = field(default_factory=list)
    frames: int = 0
    _muted: bool = False
    _open_strings: list[str] = field(default_factory=list)
    _open_token_ids: list[int] = field(default_factory=list)
    _strings: list[str] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    def mute(self) -> None:
        """Drop what vLLM's OpenAI layer writes from now on."""
        self._muted = True

    def unmute(self) -> None:
        """Take again what is written."""
        self._muted = False

    def opened(self, vllm_id: str, collector: Any) -> None:
        """Note that vLLM has a prompt of this request, under this id of vLLM's."""
        self.started = True
        self.collectors[vllm_id] = collector

    def closed(self, vllm_id: str) -> None:
        """Note that vLLM is done with a prompt and its tokens are counted."""
        self.collectors.pop(vllm_id, None)
        self._closed.set()

    async def wait_closed(self) -> None:
        """Return when vLLM is done with every prompt.

        A cancelled request of several prompts has tasks inside vLLM's layer which learn
        of the cancellation after the layer has returned.
        """
        while self.collectors:
            self._closed.clear()
            await self._closed.wait()

    @property
    def has_output(self) -> bool:
        """Whether anything was generated that the reader got or can get."""
        return bool(self.frames or self._strings or self._open_strings)

    def write(self, text: str) -> None:
        """Add output of the step under way; it becomes readable when the step is complete."""
        if self._muted:
            return
        if self.call.resume_created_s is not None:
            text = _CREATED.sub(f'"created":{self.call.resume_created_s}', text, count=1)
        if _FINISHED in text:
            self.finish_reason = _finish_reason(text) or self.finish_reason
        self._open_strings.append(text)

    def hold(self, token_ids: list[int]) -> None:
        """Keep the ids of a last step: what the OpenAI layer adds at the end joins its frame."""
        self._open_token_ids.extend(token_ids)

    def complete_step(self, token_ids: list[int]) -> None:
        """Make the text written since the last step readable, with the ids it stands for.

        A step may have no text (a special token, half a character, a possible stop
        string): its ids travel with the next text.
        """
        self._open_token_ids.extend(token_ids)
        if not self._open_strings:
            return
        self._strings.extend(self._open_strings)
        self._token_ids.extend(self._open_token_ids)
        self._open_strings.clear()
        self._open_token_ids.clear()
        self._ready.set()

    def end(self) -> None:
        """Tell the reader that the task has ended and the request is accounted for."""
        self._ended = True
        self._ready.set()

    async def next_frame(self) -> Frame | None:
        """Return the next frame, or None when the request has ended and all was read."""
        while True:
            if self._strings:
                return self._take()
            if self._ended:
                return None
            self._ready.clear()
            await self._ready.wait()

    def _take(self) -> Frame:
        frame = Frame(
            sequence=self.frames,
            data="".join(self._strings).encode(),
            token_ids=tuple(self._token_ids),
        )
        self.frames += 1
        self._strings.clear()
        self._token_ids.clear()
        return frame


def stream_error(text: str) -> tuple[int, str] | None:
    """Return the status and message if an SSE event is vLLM's error object."""
    if not text.startswith(_ERROR):
        return None
    error = orjson.loads(text.removeprefix("data: "))["error"]
    return int(error.get("code") or 500), str(error.get("message") or "generation failed")


def _finish_reason(text: str) -> str | None:
    """Return OpenAI's finish reason if ``text`` ends the first choice."""
    for choice in orjson.loads(text.removeprefix("data: "))["choices"]:
        if choice["index"] == 0:
            reason = choice.get("finish_reason")
            return str(reason) if reason else None
    return None
