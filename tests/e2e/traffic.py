"""Requests sent at a rate while a test does something to the stack."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from tests.stack import Stack


@dataclass
class Answer:
    """How one request ended, and when. ``error`` is what the client saw of a failure."""

    sent_at_s: float
    ended_at_s: float | None = None
    status: int | None = None
    words: int = 0
    error: str | None = None
    request_id: str | None = None


@dataclass
class Load:
    """Requests of one kind, each on a connection of its own; ``running`` sends at a rate."""

    stack: Stack
    model: str
    words: int
    rate_per_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Have ``ask`` work while the block runs."""
        self._client = httpx.AsyncClient(
            base_url=self.stack.url,
            headers={"authorization": f"Bearer {self.stack.key}"},
            timeout=240,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
        )
        async with self._client:
            yield

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Send while the block runs; wait for all answers when it ends."""
        async with self.connected(), asyncio.TaskGroup() as group:
            sending = group.create_task(self._send(group))
            try:
                yield
            finally:
                sending.cancel()

    async def _send(self, group: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            group.create_task(self.ask())
            due_s += 1 / self.rate_per_s
            await asyncio.sleep(max(0.0, due_s - loop.time()))

    async def ask(self) -> None:
        answer = Answer(time.monotonic())
        self.answers.append(answer)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"hello {len(self.answers)}"}],
            "max_tokens": self.words,
        }
        try:
            response = await self._client.post("/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            answer.error = f"{type(error).__name__}: {error}"
            return
        finally:
            answer.ended_at_s = time.monotonic()
        answer.status = response.status_code
        if response.status_code == 200:
            answer.words = response.json()["usage"]["completion_tokens"]
            answer.request_id = response.headers["x-headrace-request-id"]
        else:
            answer.error = response.text

    def open(self) -> int:
        """Return how many have not ended yet."""
        return sum(each.ended_at_s is None for each in self.answers)

    def failures(self) -> list[Answer]:
        return [each for each in self.answers if each.words != self.words]


async def wait_s(seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Let traffic run for a while: its amount is what a test is about, not its timing."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        await asyncio.to_thread(meanwhile)
        await asyncio.sleep(0.2)
