"""Clients of a drill: requests at a rate, clients in a closed loop, streams that stay open."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from serve_app.drills.frame import Stage
from serve_app.drills.target import Target

ANSWER_S: Final = 90.0
BEGUN_S: Final = 60.0
# As the openai client does by itself.
RETRIES: Final = 2
RETRY_S: Final = 0.5
BYTES_PER_TOKEN: Final = 4


def body(model: str, tokens: int, prompt: str = "tell me", **fields: Any) -> dict[str, Any]:
    """Return a completion request for so many tokens."""
    return {"model": model, "prompt": prompt, "max_tokens": tokens, **fields}


@dataclass(slots=True)
class Load:
    """Requests that are not streamed. ``retries`` are those of the client itself."""

    target: Target
    model: str
    tokens: int = 10
    retries: int = 0
    answered: int = 0
    retried: int = 0
    slowest_s: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)

    @asynccontextmanager
    async def at_rate(self, per_s: float) -> AsyncIterator[None]:
        """Send at a rate while the block runs; wait for every answer when it ends."""
        asking: list[asyncio.Task[bool]] = []
        sending = asyncio.create_task(self._send(asking, per_s))
        try:
            yield
        finally:
            # No TaskGroup: what ends the block early has to be raised as it is.
            sending.cancel()
            await asyncio.gather(sending, *asking, return_exceptions=True)
        for task in asking:
            task.result()

    async def _send(self, asking: list[asyncio.Task[bool]], per_s: float) -> None:
        while True:
            asking.append(asyncio.create_task(self.ask()))
            await asyncio.sleep(1 / per_s)

    async def ask(self, **fields: Any) -> bool:
        """Send one request, again if it fails and may be; tell whether it was answered."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        why = ""
        for left in range(self.retries, -1, -1):
            why = await self._once(fields) or ""
            if not why:
                self.answered += 1
                self.slowest_s = max(self.slowest_s, loop.time() - began_s)
                return True
            if left:
                self.retried += 1
                await asyncio.sleep(RETRY_S)
        self.failures[why] += 1
        return False

    async def _once(self, fields: dict[str, Any]) -> str | None:
        """Return None, or why there was no answer."""
        request = body(self.model, self.tokens, **fields)
        try:
            answer = await self.target.client.post(
                "/v1/completions", json=request, timeout=ANSWER_S
            )
        except httpx.HTTPError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return str(answer.status_code)
        made: int = answer.json()["usage"]["completion_tokens"]
        return None if made == self.tokens else f"{made} of {self.tokens} tokens"

    def described(self) -> str:
        """Return what failed, in words."""
        return ", ".join(f"{count} x {why}" for why, count in self.failures.items()) or "none"


@dataclass(slots=True)
class Stream:
    """How one stream went: ``ended`` is done, error, cut or left; None while it runs."""

    tokens: int = 0
    ended: str | None = None
    status: int = 0


@dataclass(slots=True)
class Streams:
    """Streams that are read to their end, or until they are left."""

    target: Target
    model: str
    tokens: int
    all: list[Stream] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def open(self, count: int, prompt_tokens: int = 2, **fields: Any) -> None:
        """Begin so many more; no two prompts begin alike."""
        for _ in range(count):
            number = len(self.all)
            prompt = f"{number:<6} ".ljust(BYTES_PER_TOKEN * prompt_tokens, "x")
            stream = Stream()
            self.all.append(stream)
            request = body(self.model, self.tokens, prompt, stream=True, **fields)
            self._tasks.append(asyncio.create_task(self._read(stream, request)))

    async def leave(self) -> None:
        """Hang up on those that run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ended(self, within_s: float) -> bool:
        """Wait until all have ended; tell whether they have."""
        _, running = await asyncio.wait(self._tasks, timeout=within_s)
        return not running

    def began(self) -> int:
        """Return how many have a token."""
        return sum(bool(each.tokens) for each in self.all)

    def count(self, ended: str) -> int:
        """Return how many ended so."""
        return sum(each.ended == ended for each in self.all)

    async def _read(self, stream: Stream, request: dict[str, Any]) -> None:
        try:
            async with self.target.client.stream(
                "POST", "/v1/completions", json=request, timeout=ANSWER_S
            ) as answer:
                stream.status = answer.status_code
                if answer.status_code != 200:
                    stream.ended = "refused"
                    return
                async for line in answer.aiter_lines():
                    self._take(stream, line)
        except httpx.HTTPError:
            stream.ended = stream.ended or "cut"
        except asyncio.CancelledError:
            stream.ended = stream.ended or "left"
            raise
        finally:
            stream.ended = stream.ended or "cut"

    def _take(self, stream: Stream, line: str) -> None:
        if line == "data: [DONE]":
            stream.ended = stream.ended or "done"
        elif line.startswith('data: {"error"'):
            stream.ended = "error"
        elif line.startswith("data: {") and '"text":"' in line and '"text":""' not in line:
            # Words of the simulated engine are tokens; several may share a frame.
            text = line.partition('"text":"')[2].partition('"')[0]
            stream.tokens += max(1, len(text.split()))


async def running_streams(stage: Stage, count: int, tokens: int) -> Streams:
    """Open streams of the drill's pool and wait until every one has a token.

    Raises:
        NotSeen: one has none after a minute.
    """
    streams = Streams(stage.target, stage.target.names.model, tokens)
    streams.open(count)

    async def all_began() -> bool:
        return streams.began() == count

    await stage.until(all_began, "every stream has a token", BEGUN_S)
    return streams
