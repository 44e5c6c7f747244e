"""What a simulated engine reads and writes: OpenAI bodies, pretend tokens.

A token is four bytes of the rendered prompt; an answer's token is a three-letter word
and a space, so an answer that comes back in the next turn's prompt counts the same.
Answers depend only on the prompt, the request's ``seed`` and the engine's: the same
request gets the same answer on every replica, and any suffix of it can be continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from serve_app.engine.api import RESUME_UNSUPPORTED, Endpoint, GenerateCall, Refusal

BYTES_PER_TOKEN = 4
# A prime, so that any stride visits every word before one repeats.
VOCABULARY = 1021
MAX_CHOICES = 1024


def _words() -> tuple[str, ...]:
    first, vowel, last = "bdfghjklmnprstvw", "aeiou", "bdgklmnprstvx"
    words = [a + b + c for a in first for b in vowel for c in last]
    return tuple(words[:VOCABULARY])


WORDS = _words()
_PIECES = tuple(b" " + word.encode() for word in WORDS)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the engine sees it: ``hashes`` chain over its full segments.

    ``rendered`` is None for a prompt given as token ids without text.
    """

    tokens: int
    rendered: bytes
    seed: int


@dataclass(frozen=True, slots=True)
class Job:
    """One request, understood. ``output_tokens`` counts resumed tokens too.

    ``finish_reason`` is what ends an answer that reaches ``output_tokens``. ``model`` is
    the client's name for the model, which the answer repeats.
    """

    endpoint: Endpoint
    prompts: tuple[Prompt, ...]
    choices_per_prompt: int
    output_tokens: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    stops: tuple[str, ...]
    include_usage: bool
    model: str

    def answer(self, prompt: int, choice: int) -> Answer:
        """Return what a prompt gets as its ``choice``-th answer, both counted from 0."""
        return Answer(
            self.prompts[prompt].seed + choice * 0x9E3779B1,
            self.output_tokens[prompt],
            self.finish_reasons[prompt],
            self.stops,
        )


class Answer:
    """The text a prompt gets, addressable by token. ASCII, nothing to escape in JSON."""

    __slots__ = ("_start", "_stride", "cut", "finish_reason", "tokens")

    def __init__(self, seed: int, tokens: int, finish_reason: str, stops: tuple[str, ...]) -> None:
        self._start = seed % VOCABULARY
        self._stride = 1 + (seed >> 16) % (VOCABULARY - 1)
        self.tokens = tokens
        self.finish_reason = finish_reason
        self.cut: int | None = None
        if stops:
            self._apply_stops(stops)

    def token_ids(self, first: int, last: int) -> tuple[int, ...]:
        """Return the ids of tokens ``first`` up to, not including, ``last``."""
        start, stride = self._start, self._stride
        if last == first + 1:
            return ((start + stride * first) % VOCABULARY,)
        return tuple((start + stride * index) % VOCABULARY for index in range(first, last))

    def text(self, first: int, last: int) -> bytes:
        """Return the bytes these tokens add to the answer."""
        if last == first + 1 and first and self.cut is None:
            return _PIECES[(self._start + self._stride * first) % VOCABULARY]
        text = b"".join(_PIECES[token] for token in self.token_ids(first, last))
        if first == 0:
            text = text[1:]
        if self.cut is not None:
            text = text[: max(0, self.cut - _offset(first))]
        return text

    def _apply_stops(self, stops: tuple[str, ...]) -> None:
        """End where the first stop string is complete; its text is not part of the answer."""
        text = self.text(0, self.tokens).decode()
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        if found:
            end, self.cut = min(found)
            self.tokens = (end + BYTES_PER_TOKEN) // BYTES_PER_TOKEN
            self.finish_reason = "stop"


def _offset(token: int) -> int:
    """Return where a token begins in the answer: the first one has no space before it."""
    return max(0, BYTES_PER_TOKEN * token - 1)


def prefix_hashes(text: bytes, segment_tokens: int, salt: str) -> tuple[int, ...]:
    """Return chained hashes of every full segment of ``text``, shortest prefix first."""
    size = segment_tokens * BYTES_PER_TOKEN
    chain = blake2b(digest_size=8, key=blake2b(salt.encode(), digest_size=16).digest())
    hashes = []
    for end in range(size, len(text) + 1, size):
        chain.update(text[end - size : end])
        hashes.append(int.from_bytes(chain.digest(), "little"))
    return tuple(hashes)


def read_job(
    call: GenerateCall,
    *,
    served_model: str,
    max_model_len: int,
    default_output_tokens: int,
    seed: int,
) -> Job | Refusal:
    """Understand a request, or say what is wrong with it as the client's error."""
    try:
        body = orjson.loads(call.body)
    except orjson.JSONDecodeError as error:
        return Refusal(400, f"the body is not JSON: {error}")
    if not isinstance(body, dict):
        return Refusal(400, "the body must be a JSON object")
    try:
        seed_bytes = b"%d %d" % (seed, _count(body, "seed", 0, minimum=-(2**63)))
        prompts = _prompts(call.endpoint, body, seed_bytes)
        choices = _count(body, "n", 1)
        requested = _count(body, "max_completion_tokens", 0) or _count(body, "max_tokens", 0)
        stops = _stops(body)
        include_usage = _include_usage(body)
    except _BadField as error:
        return Refusal(400, str(error), param=error.field)
    if choices * len(prompts) > MAX_CHOICES:
        return Refusal(400, f"n times prompts must be at most {MAX_CHOICES}", param="n")
    outputs, reasons = [], []
    for prompt in prompts:
        room = max_model_len - prompt.tokens
        if room < 1:
            return _overflow(prompt.tokens, max_model_len)
        limits = [room]
        if requested:
            limits.append(requested)
        if call.max_tokens is not None:
            limits.append(call.max_tokens)
        limit = max(1, min(limits))
        natural = limit if requested else min(limit, default_output_tokens)
        outputs.append(natural)
        reasons.append("length" if natural == limit else "stop")
    job = Job(
        call.endpoint,
        prompts,
        choices,
        tuple(outputs),
        tuple(reasons),
        stops,
        include_usage,
        str(body.get("model") or served_model),
    )
    problem = _resume_problem(call, job)
    return job if problem is None else Refusal(400, problem, code=RESUME_UNSUPPORTED)


def _resume_problem(call: GenerateCall, job: Job) -> str | None:
    """Return why a generation cannot go on after the tokens the call comes with.

    A model would go on after whatever it is given; here that can only be a mistake.
    """
    resumed = call.resume_token_ids
    if not resumed:
        return None
    if len(job.prompts) * job.choices_per_prompt > 1:
        return "only a request with one choice can be continued"
    answer = job.answer(0, 0)
    if answer.token_ids(0, len(resumed)) != resumed:
        return "the tokens to go on after are not those of this answer"
    if len(resumed) >= answer.tokens:
        return "the answer to go on with has all its tokens already"
    return None


def _overflow(prompt_tokens: int, max_model_len: int) -> Refusal:
    return Refusal(
        400,
        f"This model's maximum context length is {max_model_len} tokens. However, your "
        f"prompt contains {prompt_tokens} input tokens, which exceeds this limit even "
        "without any output tokens. Please reduce the length of the input prompt.",
        param="input_tokens",
        code="context_length_exceeded",
    )


class _BadField(ValueError):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def _count(body: dict[str, Any], field: str, default: int, *, minimum: int = 1) -> int:
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise _BadField(field, f"{field} must be an integer of at least {minimum}")
    return value


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise _BadField("stop", "stop must be a string or a list of strings")
    return tuple(each for each in stops if each)


def _include_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _BadField("stream_options", "stream_options must be an object")
    return bool(options.get("include_usage"))


def _prompts(endpoint: Endpoint, body: dict[str, Any], seed: bytes) -> tuple[Prompt, ...]:
    if endpoint is Endpoint.CHAT:
        return (_prompt_of(_render_chat(body), seed),)
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return (_prompt_of(prompt.encode(), seed),)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return tuple(_prompt_of(each.encode(), seed) for each in prompt)
        if all(isinstance(each, int) for each in prompt):
            return (_prompt_of(_render_tokens(prompt), seed),)
        if all(isinstance(each, list) and each for each in prompt):
            return tuple(_prompt_of(_render_tokens(each), seed) for each in prompt)
    raise _BadField("prompt", "prompt must be a string, strings, token ids or lists of token ids")


def _prompt_of(rendered: bytes, seed: bytes) -> Prompt:
    digest = blake2b(rendered, digest_size=8, key=seed[:64]).digest()
    tokens = max(1, -(-len(rendered) // BYTES_PER_TOKEN))
    return Prompt(tokens, rendered, int.from_bytes(digest, "little"))


def _render_tokens(token_ids: list[Any]) -> bytes:
    """Token ids become the words they stand for here, so a continued text counts the same."""
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in token_ids):
        raise _BadField("prompt", "token ids must be integers")
    return b"".join(_PIECES[token % VOCABULARY] for token in token_ids)


def _render_chat(body: dict[str, Any]) -> bytes:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _BadField("messages", "messages must be a non-empty list")
    parts: list[bytes] = []
    if body.get("tools"):
        parts.append(orjson.dumps(body["tools"]))
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _BadField("messages", "every message must be an object with a role")
        parts.append(b"<|%s|>\n" % message["role"].encode())
        parts.append(_render_content(message.get("content")))
        if message.get("tool_calls"):
            parts.append(orjson.dumps(message["tool_calls"]))
        parts.append(b"\n")
    parts.append(b"<|assistant|>\n")
    return b"".join(parts)


def _render_content(content: Any) -> bytes:
    if content is None:
        return b""
    if isinstance(content, str):
        return content.encode()
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return b"".join(str(part.get("text") or "").encode() for part in content)
    raise _BadField("messages", "content must be a string or a list of parts")
