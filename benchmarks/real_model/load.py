"""A closed loop of streaming clients, and what they see."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

TOPICS = (
    *("the tides", "bread", "glaciers", "the printing press", "bees", "railways", "chess"),
    *("volcanoes", "paper", "the compass", "rain", "windmills", "salt", "maps", "clocks"),
    *("bridges", "coffee", "the moon", "forests", "glass", "harbours", "silk", "comets", "soil"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer, seconds from its request."""

    first_token_s: float
    total_s: float
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Level:
    """What was seen at one concurrency. Rates in output tokens per second of wall time."""

    concurrency: int
    requests: int
    output_tokens: int
    tokens_per_s: float
    time_to_first_token_p50_s: float
    time_to_first_token_p99_s: float
    time_per_output_token_p50_s: float


async def measure(
    base_url: str,
    key: str,
    model: str,
    *,
    concurrency: int,
    requests: int,
    output_tokens: int,
) -> Level:
    """Send ``requests`` from ``concurrency`` clients, each waiting for its answer.

    Raises:
        RuntimeError: an answer was not what was asked for.
    """
    waiting = list(range(requests))
    answers: list[Answer] = []
    limits = httpx.Limits(max_connections=concurrency)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(
        base_url=base_url, headers=headers, timeout=600, limits=limits
    ) as client:

        async def work() -> None:
            while waiting:
                body = _body(model, waiting.pop(), output_tokens)
                answers.append(await _answer(client, body, output_tokens))

        started_at_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
        wall_s = time.perf_counter() - started_at_s
    return _level(concurrency, answers, wall_s)


def _body(model: str, number: int, output_tokens: int) -> dict[str, object]:
    """A request whose prompt no other of this run begins with: no prefix cache helps."""
    topic = TOPICS[number % len(TOPICS)]
    question = f"Question {number}: tell me in detail about {topic} and their history."
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _answer(client: httpx.AsyncClient, body: dict[str, object], output_tokens: int) -> Answer:
    started_at_s = time.perf_counter()
    first_at_s: float | None = None
    counted = 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode(errors="replace")
            raise RuntimeError(f"status {response.status_code}: {text:.500}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"the stream ended with {event['error']}")
            if event.get("usage"):
                counted = event["usage"]["completion_tokens"]
            has_text = event["choices"] and event["choices"][0]["delta"].get("content")
            if first_at_s is None and has_text:
                first_at_s = time.perf_counter()
    if counted != output_tokens or first_at_s is None:
        raise RuntimeError(f"{counted} output tokens came, {output_tokens} were asked for")
    return Answer(
        first_token_s=first_at_s - started_at_s,
        total_s=time.perf_counter() - started_at_s,
        output_tokens=counted,
    )


def _level(concurrency: int, answers: Sequence[Answer], wall_s: float) -> Level:
    first = sorted(answer.first_token_s for answer in answers)
    tokens = sum(answer.output_tokens for answer in answers)
    intervals = [
        (answer.total_s - answer.first_token_s) / (answer.output_tokens - 1) for answer in answers
    ]
    return Level(
        concurrency=concurrency,
        requests=len(answers),
        output_tokens=tokens,
        tokens_per_s=tokens / wall_s,
        time_to_first_token_p50_s=statistics.median(first),
        time_to_first_token_p99_s=first[math.ceil(0.99 * len(first)) - 1],
        time_per_output_token_p50_s=statistics.median(intervals),
    )
