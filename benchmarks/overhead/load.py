"""The load: closed and open loops of checked requests, and the figures they give."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from serve_app.load_client import DONE, EVENT, BadAnswer, Exchange, LoadClient

REQUEST_TIMEOUT_S = 120.0
ERRORS_SHOWN = 3
_NUMBER = b"00000000"
_CONTENT = re.compile(rb'"content": ?"((?:[^"\\]|\\.)*)"')
_COUNTED = re.compile(rb'"completion_tokens": ?(\d+)')
_FINISHED = re.compile(rb'"finish_reason": ?"')


@dataclass(frozen=True, slots=True)
class Workload:
    """One measurement. Closed loop with ``concurrency`` clients, or open with a rate.

    ``model`` chooses the engine: ``sim`` takes no time, ``paced`` 20 ms per step.
    """

    name: str
    model: str
    stream: bool
    output_tokens: int
    concurrency: int
    rate_per_s: float | None = None


@dataclass(slots=True)
class Tally:
    """What one run of a workload saw. Times in seconds.

    ``chunks`` are events with content; an engine whose reader lags puts several of its
    ``tokens`` into one. ``events`` are all of them, roles, finish reasons and ends included.
    """

    latencies_s: array[float] = field(default_factory=lambda: array("d"))
    first_s: array[float] = field(default_factory=lambda: array("d"))
    gaps_s: array[float] = field(default_factory=lambda: array("d"))
    chunks: int = 0
    tokens: int = 0
    events: int = 0
    reads: int = 0
    failures: int = 0
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0


class Generator:
    """Sends one workload's requests to one server.

    ``simulated``: its tokens are words, which shows that none is missing. A real model's are
    counted by its own word, and it is told not to end before their number.
    """

    def __init__(self, url: str, key: str, workload: Workload, *, simulated: bool = True) -> None:
        self._workload = workload
        self._simulated = simulated
        self._client = LoadClient(url, key)
        self._before, self._after = _request(self._client, workload, simulated)
        self._sent = 0
        self.tally = Tally()

    async def run(self, duration_s: float) -> Tally:
        """Send for ``duration_s``, wait for the last answers, and return what was seen."""
        gc.collect()
        gc.disable()
        began_s = time.perf_counter()
        try:
            if self._workload.rate_per_s is None:
                await self._closed(began_s + duration_s)
            else:
                await self._open(self._workload.rate_per_s, began_s, duration_s)
        finally:
            gc.enable()
            self._client.close()
        self.tally.wall_s = time.perf_counter() - began_s
        return self.tally

    def idle(self) -> int:
        """Return how many connections are open and carry no request."""
        return self._client.idle()

    async def _closed(self, until_s: float) -> None:
        async def client() -> None:
            while True:
                await self.one(time.perf_counter())
                if time.perf_counter() >= until_s:
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(self._workload.concurrency):
                group.create_task(client())

    async def _open(self, rate_per_s: float, began_s: float, duration_s: float) -> None:
        """Send at even times whatever the answers do; latency counts from the due time."""
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate_per_s * duration_s)):
                due_s = began_s + number / rate_per_s
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                group.create_task(self.one(due_s))

    async def one(self, due_s: float) -> None:
        """Send one request that was due then, and count what comes of it."""
        self._sent += 1
        request = b"%b%08d%b" % (self._before, self._sent, self._after)
        try:
            answer = await self._client.send(request, REQUEST_TIMEOUT_S)
            self._count(answer, due_s)
        except (BadAnswer, OSError) as error:
            self.tally.failures += 1
            if len(self.tally.errors) < ERRORS_SHOWN:
                self.tally.errors.append(f"{type(error).__name__}: {error}"[:500])
            await asyncio.sleep(0.01)

    def _count(self, answer: Exchange, due_s: float) -> None:
        status, body = answer.body()
        if status != 200:
            raise BadAnswer(f"status {status}: {body[:300].decode(errors='replace')}")
        tally, ended_s = self.tally, answer.times_s[-1]
        if not self._workload.stream:
            check_whole(body, self._workload.output_tokens, words=self._simulated)
            tally.latencies_s.append(ended_s - due_s)
            return
        chunks = check_stream(body, self._workload.output_tokens, words=self._simulated)
        arrivals_s, _ = answer.arrivals()
        tally.latencies_s.append(ended_s - due_s)
        tally.first_s.append(arrivals_s[0] - due_s)
        last_s = arrivals_s[0]
        for at_s in arrivals_s[1:]:
            tally.gaps_s.append(at_s - last_s)
            last_s = at_s
        tally.chunks += chunks
        tally.tokens += self._workload.output_tokens
        tally.events += body.count(EVENT)
        tally.reads += len(arrivals_s)


def check_stream(body: bytes, output_tokens: int, *, words: bool = True) -> int:
    """Return how many chunks with content a complete stream has.

    The simulated engine's tokens are ``words``: their number shows that none is missing. Others
    are counted by the usage at the end.

    Raises:
        BadAnswer: it has no or more than one finish reason, no [DONE] at its end, or not
            as many tokens as were asked for.
    """
    if not body.endswith(DONE) or body.count(DONE) != 1:
        raise BadAnswer(f"the stream does not end with one [DONE]: {body[-200:]!r}")
    contents = [content for content in _CONTENT.findall(body) if content]
    counted = [int(number) for number in _COUNTED.findall(body)]
    came = len(b"".join(contents).split()) if words else max(counted, default=0)
    if came != output_tokens:
        raise BadAnswer(f"{came} {'words' if words else 'tokens'} came, not {output_tokens}")
    if len(_FINISHED.findall(body)) != 1:
        raise BadAnswer(f"not one finish reason: {body[-400:]!r}")
    return len(contents)


def check_whole(body: bytes, output_tokens: int, *, words: bool = True) -> None:
    """Check that a plain answer is complete, by its usage and, if they are tokens, its ``words``.

    Raises:
        BadAnswer: it is not the JSON of an answer of ``output_tokens``.
    """
    try:
        answer = json.loads(body)
        counted = answer["usage"]["completion_tokens"]
        said = len(answer["choices"][0]["message"]["content"].split())
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadAnswer(f"not an answer: {body[:200]!r}") from error
    if counted != output_tokens or (words and said != output_tokens):
        raise BadAnswer(f"{counted} tokens, {said} words came, not {output_tokens}")


def percentile(values: Sequence[float], ratio: float) -> float | None:
    """Return the value at ``ratio`` of the sorted values, None without any."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(ratio * len(ordered)))]


def _request(client: LoadClient, workload: Workload, simulated: bool) -> tuple[bytes, bytes]:
    """Return what stands before and after a request's number; no two requests are equal."""
    content = "Tell me about the sea and the ships on it, number 00000000."
    request = {
        "model": workload.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": workload.output_tokens,
        "stream": workload.stream,
    }
    if not simulated:
        request |= {"ignore_eos": True}
        if workload.stream:
            request |= {"stream_options": {"include_usage": True}}
    body = json.dumps(request).encode()
    before, number, after = client.request("/v1/chat/completions", body).partition(_NUMBER)
    assert number
    return before, after
