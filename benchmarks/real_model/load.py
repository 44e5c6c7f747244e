"""A closed loop of streaming clients, and what they see."""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.load_client import DONE, LoadClient

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
    async with LoadClient(base_url, key) as client:

        async def work() -> None:
            while waiting:
                body = json.dumps(_body(model, waiting.pop(), output_tokens)).encode()
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


async def _answer(client: LoadClient, request: bytes, output_tokens: int) -> Answer:
    started_at_s = time.perf_counter()
    exchange = await client.post("/v1/chat/completions", request)
    status, body = exchange.body()
    if status != 200:
        raise RuntimeError(f"status {status}: {body.decode(errors='replace'):.500}")
    if not body.endswith(DONE):
        raise RuntimeError(f"the stream does not end with [DONE]: {body[-500:]!r}")
    counted = 0
    for line in body.split(b"\n"):
        if b'"usage"' in line or b'"error"' in line:
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise RuntimeError(f"the stream ended with {event['error']}")
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    first_at_s = exchange.first_text_s()
    if counted != output_tokens or first_at_s is None:
        raise RuntimeError(f"{counted} output tokens came, {output_tokens} were asked for")
    return Answer(
        first_token_s=first_at_s - started_at_s,
        total_s=exchange.ended_s - started_at_s,
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
