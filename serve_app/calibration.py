"""Driving a live pool to its knee: closed loops of streaming clients, level after level.

A level starts its clients one after another over the time that an answer takes, so that they
do not move in step, waits until each has had an answer, and then measures until enough have
come. The load stays on until the last one measured.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Protocol

from serve_app.core.knee import Level, Served, Slo, goes_on_rising, next_load, requests_to_measure
from serve_app.load_client import BadAnswer, Exchange
from serve_app.terminal import CommandFailed

_REFUSED: Final = (429, 503)
_PAUSE_S: Final = 0.2
_WORDS: Final = (
    *("river", "bridge", "winter", "paper", "garden", "engine", "silver", "market", "window"),
    *("letter", "forest", "summer", "copper", "island", "mirror", "planet", "harbour", "circle"),
)


@dataclass(frozen=True, slots=True)
class Shape:
    """What every request is like, in tokens; ``shared_ratio`` of its prompt is the same in all."""

    model: str
    prompt_tokens: int
    output_tokens: int
    shared_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How the sweep goes. ``precision_ratio`` is how closely the knee is looked for."""

    most: int
    least_requests: int
    level_s_max: float
    precision_ratio: float = 0.03


class Loaded(Protocol):
    """What can be put under a load and measured."""

    async def level(
        self, concurrency: int, plan: Plan, stay_s: float, on_answer: Callable[[int, int], None]
    ) -> Level:
        """Measure one concurrency; ``stay_s`` is about how long an answer takes there.

        ``on_answer`` is told how many of how many answers have come.
        """


class Client(Protocol):
    """Posts a request and returns the whole answer, with the times of its reads."""

    async def post(self, path: str, body: bytes) -> Exchange:
        """See load_client.LoadClient."""


class Endpoint:
    """One model behind the endpoint, asked as any client asks it."""

    def __init__(self, client: Client, shape: Shape, chance: Random | None = None) -> None:
        """``client`` knows the URL and the key; by ``chance`` prompts differ."""
        self._client = client
        self._shape = shape
        self._chance = chance or Random()  # noqa: S311 - words, not secrets
        self._words_per_token = 1.0
        self._template_tokens = 0.0
        self._began_s = time.perf_counter()
        self._shared = ""

    async def learn_lengths(self) -> None:
        """Learn how many words make a prompt of the shape's length.

        Raises:
            CommandFailed: the endpoint does not answer, or not as an endpoint does.
        """
        counts = []
        for words in (20, 220):
            body = self._body(self._text(words), max_tokens=1)
            try:
                counts.append((await self._one(body)).prompt_tokens)
            except _Refused:
                raise CommandFailed("the pool refuses even one request at a time") from None
        self._words_per_token = 200 / max(1, counts[1] - counts[0])
        self._template_tokens = counts[0] - 20 / self._words_per_token
        self._shared = self._text(self._words(self._shape.shared_ratio * self._shape.prompt_tokens))

    async def level(
        self, concurrency: int, plan: Plan, stay_s: float, on_answer: Callable[[int, int], None]
    ) -> Level:
        """See Loaded."""
        wanted = requests_to_measure(concurrency, plan.least_requests)
        run = _Run(concurrency, wanted, on_answer)

        async def client(number: int) -> None:
            await asyncio.sleep(stay_s * number / concurrency)
            while not run.is_over:
                try:
                    served = await self._one(self._body(self._prompt()))
                except _Refused:
                    run.refused(number, time.perf_counter())
                    await asyncio.sleep(_PAUSE_S)
                    continue
                run.served(number, served, time.perf_counter())

        try:
            async with asyncio.TaskGroup() as group:
                clients = [group.create_task(client(number)) for number in range(concurrency)]
                try:
                    async with asyncio.timeout(plan.level_s_max):
                        await run.over.wait()
                except TimeoutError:
                    run.end(time.perf_counter())
                for each in clients:
                    each.cancel()
        except* CommandFailed as failures:
            raise failures.exceptions[0] from None
        return run.level()

    def _words(self, tokens: float) -> int:
        return max(0, round(tokens * self._words_per_token))

    def _prompt(self) -> str:
        own = (1.0 - self._shape.shared_ratio) * self._shape.prompt_tokens - self._template_tokens
        return f"{self._shared} {self._text(max(4, self._words(own)))}"

    def _text(self, words: int) -> str:
        return " ".join(self._chance.choices(_WORDS, k=words))

    def _body(self, text: str, max_tokens: int | None = None) -> dict[str, Any]:
        return {
            "model": self._shape.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens or self._shape.output_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "service_tier": "priority",
        }

    async def _one(self, body: dict[str, Any]) -> Served:
        """Send one request and read its stream to the end.

        Raises:
            _Refused: there is no room for it, or its stream ended with an error.
            CommandFailed: any other answer, or none.
        """
        data = json.dumps(body).encode()
        sent_s = time.perf_counter()
        try:
            exchange = await self._client.post("/v1/chat/completions", data)
            status, stream = exchange.body()
        except (BadAnswer, OSError) as error:
            raise CommandFailed(f"the endpoint does not answer: {_words_of(error)}") from error
        if status != 200:
            _refuse(status, stream)
        usage = _usage(stream)
        if usage is None:
            raise _Refused
        ended_s = exchange.ended_s
        first_s = exchange.first_text_s()
        return Served(
            ttft_s=(ended_s if first_s is None else first_s) - sent_s,
            total_s=ended_s - sent_s,
            ended_s=ended_s - self._began_s,
            prompt_tokens=usage["prompt_tokens"],
            cached_prompt_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            output_tokens=usage["completion_tokens"],
        )


async def sweep(
    loaded: Loaded,
    slo: Slo,
    plan: Plan,
    on_level: Callable[[Level], None],
    on_answer: Callable[[int, int, int], None],
) -> list[Level]:
    """Measure levels until the knee is found; return them in the order they were measured.

    The first one that fails is measured again, and counts as it is then.

    Raises:
        CommandFailed: the endpoint failed.
    """
    levels: list[Level] = []
    tried: dict[float, bool] = {}
    stay_s = 1.0
    while True:
        load = next_load(
            tried, low=1.0, most=plan.most, precision_ratio=plan.precision_ratio, whole=True
        )
        if load is None or (all(tried.values()) and not goes_on_rising(levels, slo)):
            return levels
        concurrency = int(load)

        def told(come: int, of: int, concurrency: int = concurrency) -> None:
            on_answer(concurrency, come, of)

        level = await loaded.level(concurrency, plan, stay_s, told)
        if not level.holds(slo) and all(tried.values()):
            # What bounds the whole search must be more than a moment's trouble of the machine.
            level = await loaded.level(concurrency, plan, stay_s, told)
        if level.served:
            stay_s = sum(each.total_s for each in level.served) / len(level.served)
        levels.append(level)
        tried[load] = level.holds(slo)
        on_level(level)


class _Refused(Exception):
    """A request that the endpoint had no room for."""


class _Run:
    """One level under way: warm-up until each client had an answer, then the window."""

    def __init__(
        self, concurrency: int, wanted: int, on_answer: Callable[[int, int], None]
    ) -> None:
        self.over = asyncio.Event()
        self._concurrency = concurrency
        self._wanted = wanted
        self._on_answer = on_answer
        self._warm: set[int] = set()
        self._began_s: float | None = None
        self._ended_s = 0.0
        self._served: list[Served] = []
        self._refused = 0

    @property
    def is_over(self) -> bool:
        return self.over.is_set()

    def served(self, client: int, served: Served, now_s: float) -> None:
        if self._counts(client, now_s):
            self._served.append(served)
            self._told(now_s)

    def refused(self, client: int, now_s: float) -> None:
        if self._counts(client, now_s):
            self._refused += 1
            self._told(now_s)

    def end(self, now_s: float) -> None:
        self._ended_s = now_s
        self.over.set()

    def level(self) -> Level:
        began_s = self._ended_s if self._began_s is None else self._began_s
        window_s = max(1e-9, self._ended_s - began_s)
        return Level(self._concurrency, window_s, tuple(self._served), self._refused)

    def _counts(self, client: int, now_s: float) -> bool:
        if self._began_s is not None:
            return not self.is_over
        self._warm.add(client)
        if len(self._warm) == self._concurrency:
            self._began_s = now_s
        return False

    def _told(self, now_s: float) -> None:
        come = len(self._served) + self._refused
        self._on_answer(come, self._wanted)
        if come >= self._wanted:
            self.end(now_s)


def _refuse(status: int, body: bytes) -> None:
    try:
        error = json.loads(body)["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace")
    if status in _REFUSED and "quota" not in message:
        raise _Refused
    hint = "; give a key with --key" if status == 401 else ""
    raise CommandFailed(f"the endpoint answers {status}: {message}{hint}")


def _usage(stream: bytes) -> dict[str, Any] | None:
    """Return the usage that the stream's last event but [DONE] has; None if it was cut."""
    place = stream.rfind(b"data: {")
    try:
        usage = json.loads(stream[place + 6 :].partition(b"\n")[0]).get("usage")
    except ValueError:
        return None
    return usage if isinstance(usage, dict) else None


def _words_of(error: Exception) -> str:
    return str(error) or type(error).__name__
