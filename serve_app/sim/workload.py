"""What clients ask for: arrivals drawn from seeded distributions.

Lengths are lognormal with the medians and spreads of published traces; arrivals are
Poisson, thinned from a peak rate where the rate varies. Every stream has a random
source of its own, so changing one tenant leaves the others' draws untouched.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from math import cos, exp, inf, pi

from serve_app.core.types import PriorityClass, TenantId

RateShape = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One question of one client.

    ``max_tokens`` is what the client asks at most, ``output_tokens`` where the model would
    stop. ``prefix_hashes`` name whole segments of the prompt, shortest prefix first.
    """

    arrival_s: float
    tenant: TenantId
    priority_class: PriorityClass
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    prefix_hashes: tuple[int, ...] = ()
    session: str | None = None
    kind: str = "chat"


@dataclass(frozen=True, slots=True)
class Lengths:
    """A lognormal of whole tokens: median, sigma of the logarithm, bounds included."""

    median_tokens: float
    sigma: float
    least_tokens: int
    most_tokens: int

    def draw(self, source: random.Random) -> int:
        """Return one length within the bounds."""
        tokens = int(self.median_tokens * exp(self.sigma * source.gauss(0.0, 1.0)))
        return min(max(tokens, self.least_tokens), self.most_tokens)


CHAT_PROMPTS = Lengths(757, 0.99, 16, 8_192)
"""Context tokens of the Azure LLM inference trace 2023, conversation (mean 1,155)."""

CHAT_OUTPUTS = Lengths(151, 0.86, 2, 1_000)
"""Generated tokens of the same trace (mean 211)."""

EQUAL_CLASSES: Mapping[PriorityClass, float] = {PriorityClass.STANDARD: 1.0}


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Shared beginnings: ``groups`` of prompts whose first ``shared_tokens`` are equal.

    ``segment_tokens`` is how many tokens one hash stands for; groups are drawn with
    popularity 1 / rank ** ``skew``.
    """

    groups: int
    shared_tokens: int
    segment_tokens: int
    skew: float = 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """One stream of requests: who, how many, how long, in which classes.

    ``rate_per_s`` is the peak; ``shape`` (values in [0, 1]) scales it over time.
    ``tenants`` share the stream evenly, or in proportion to ``tenant_weights``.
    """

    name: str
    rate_per_s: float
    tenants: tuple[str, ...] = ("tenant",)
    tenant_weights: tuple[float, ...] | None = None
    prompts: Lengths = CHAT_PROMPTS
    outputs: Lengths = CHAT_OUTPUTS
    classes: Mapping[PriorityClass, float] = field(default_factory=lambda: EQUAL_CLASSES)
    prefixes: Prefixes | None = None
    start_s: float = 0.0
    end_s: float = inf
    shape: RateShape | None = None
    max_tokens: int | None = None


def arrivals(streams: Iterable[Traffic], duration_s: float, seed: int) -> Iterator[Arrival]:
    """Yield the arrivals of all streams before ``duration_s``, in order of time.

    The same seed yields the same arrivals.
    """
    yield from heapq.merge(
        *(_stream(each, duration_s, seed) for each in streams), key=lambda each: each.arrival_s
    )


def _stream(traffic: Traffic, duration_s: float, seed: int) -> Iterator[Arrival]:
    source = random.Random(f"{seed}:{traffic.name}")
    tenants = [TenantId(each) for each in traffic.tenants]
    classes, class_weights = list(traffic.classes), list(traffic.classes.values())
    prompts = _Prompts(traffic, source)
    now_s, end_s = traffic.start_s, min(duration_s, traffic.end_s)
    if traffic.rate_per_s <= 0:
        return
    while True:
        now_s += source.expovariate(traffic.rate_per_s)
        if now_s >= end_s:
            return
        if traffic.shape is not None and source.random() >= traffic.shape(now_s):
            continue
        tenant = source.choices(tenants, traffic.tenant_weights)[0]
        chosen = classes[0]
        if len(classes) > 1:
            chosen = source.choices(classes, class_weights)[0]
        prompt_tokens, prefix_hashes = prompts.draw()
        output_tokens = traffic.outputs.draw(source)
        max_tokens = traffic.max_tokens or traffic.outputs.most_tokens
        yield Arrival(
            now_s,
            tenant,
            chosen,
            prompt_tokens,
            min(output_tokens, max_tokens),
            max_tokens,
            prefix_hashes,
            kind=traffic.name,
        )


class _Prompts:
    """Draws prompts: their length, and the hashes of what they share."""

    def __init__(self, traffic: Traffic, source: random.Random) -> None:
        self._lengths = traffic.prompts
        self._source = source
        self._prefixes = traffic.prefixes
        self._fresh = count(1)
        self._groups: list[tuple[int, ...]] = []
        self._weights: list[float] = []
        prefixes = traffic.prefixes
        if prefixes is None:
            return
        segments = prefixes.shared_tokens // prefixes.segment_tokens
        for group in range(prefixes.groups):
            named = random.Random(f"{traffic.name}:{group}")
            self._groups.append(tuple(named.getrandbits(62) for _ in range(segments)))
            self._weights.append(1.0 / (group + 1) ** prefixes.skew)

    def draw(self) -> tuple[int, tuple[int, ...]]:
        """Return a prompt's tokens and its hashes; the unshared tail has hashes of its own."""
        own_tokens = self._lengths.draw(self._source)
        if self._prefixes is None:
            return own_tokens, ()
        shared = self._source.choices(self._groups, self._weights)[0]
        shared_tokens = len(shared) * self._prefixes.segment_tokens
        tail = tuple(
            self._source.getrandbits(62) | 1 << 62
            for _ in range(own_tokens // self._prefixes.segment_tokens)
        )
        return shared_tokens + own_tokens, shared + tail


def day_shape(day_s: float, low: float, high: float) -> RateShape:
    """Return a day's traffic scaled to ``day_s``, from ``low`` at night to 1 at the peak.

    ``high`` is the peak in the same unit as ``low``; the shape is low/high at 04:00 and 1
    at 16:00, a raised cosine sharpened to the working day.
    """
    floor = low / high

    def shape(now_s: float) -> float:
        hour = now_s / day_s * 24.0
        wave = 0.5 - 0.5 * cos((hour - 4.0) / 24.0 * 2.0 * pi)
        return floor + (1.0 - floor) * wave * wave

    return shape
