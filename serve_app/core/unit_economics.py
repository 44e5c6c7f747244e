"""What a pool's million tokens and thousand requests truly cost, and what its waste does.

    $ per million X = the pool's cost, idle and waste in it / (X / 1e6)     X: input, output, total

At a higher use of the same replicas a token costs less: ``busy`` is what it would cost if
nothing were ever idle, the best that this pool can do. At the SLO only those tokens count
whose request had its first token in time: the rest cost money and were worth less.

Cost and X are of the same hours: one that has no price yet is in neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS
from serve_app.core.true_cost import split

_WASTE = (Use.CANCELLED, Use.PREEMPTED, Use.FAILED)
_NOT_BUSY = (Use.IDLE, Use.START_UP, Use.DRAIN)
_OF_REQUESTS = (Use.USEFUL, *_WASTE, Use.OPEN)
# As much of an hour's time may lack a price: its unit costs are too low by no more.
_UNPRICED_MAX_RATIO = Fraction(1, 100)


@dataclass(frozen=True, slots=True)
class Product:
    """What came out: requests and their tokens."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(slots=True)
class PoolUse:
    """A pool over some hours: its replicas' time and cost by use, and what it produced.

    ``good`` is the part of that whose first token came within its class's SLO.

    ``hours`` counts the hours it was there in; ``peak_busy`` is how many replicas' worth of
    busy time its busiest hour had. ``provisional_ns`` of its time was split over requests by
    default coefficients.
    """

    pool: str
    time_ns: dict[Use, int] = field(default_factory=lambda: dict.fromkeys(Use, 0))
    cost_nanousd: dict[Use, int] = field(default_factory=lambda: dict.fromkeys(Use, 0))
    unpriced_ns: int = 0
    provisional_ns: int = 0
    hours: int = 0
    peak_busy: Fraction = Fraction()
    requests: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    amount_nanousd: int = 0
    good: Product = Product()

    def add(self, uses_ns: Mapping[Use, int], cost_nanousd: int | None) -> None:
        """Take in a replica-hour, whose cost is split over its uses exactly."""
        names = list(uses_ns)
        times = [uses_ns[name] for name in names]
        for name, time_ns in zip(names, times, strict=True):
            self.time_ns[name] += time_ns
        if cost_nanousd is None:
            self.unpriced_ns += sum(times)
            return
        for name, part in zip(names, split(cost_nanousd, times), strict=True):
            self.cost_nanousd[name] += part

    def add_hour(self, hour: PoolUse) -> None:
        """Take in an hour of the pool, with all of its replicas; what it produced is not in it."""
        for use in Use:
            self.time_ns[use] += hour.time_ns[use]
            self.cost_nanousd[use] += hour.cost_nanousd[use]
        self.unpriced_ns += hour.unpriced_ns
        self.provisional_ns += hour.provisional_ns
        self.hours += 1
        self.peak_busy = max(self.peak_busy, Fraction(hour.busy_ns, HOUR_NS))

    @property
    def priced(self) -> bool:
        """Whether its time has a price, but for so little that it hardly changes a unit cost."""
        return self.unpriced_ns <= _UNPRICED_MAX_RATIO * self.total_ns

    @property
    def product(self) -> Product:
        """All that came out."""
        return Product(self.requests, self.input_tokens, self.output_tokens)

    @property
    def total_ns(self) -> int:
        """All of the replicas' time."""
        return sum(self.time_ns.values())

    @property
    def total_nanousd(self) -> int:
        """All of the replicas' cost."""
        return sum(self.cost_nanousd.values())

    @property
    def busy_ratio(self) -> float:
        """The part of the time in which there was work."""
        return self.busy_ns / self.total_ns if self.total_ns else 0.0

    @property
    def busy_ns(self) -> int:
        """The time in which there was work."""
        return self.total_ns - sum(self.time_ns[use] for use in _NOT_BUSY)

    @property
    def unpriced_ratio(self) -> float:
        """The part of the time whose price nobody knows."""
        return self.unpriced_ns / self.total_ns if self.total_ns else 0.0

    @property
    def provisional_ratio(self) -> float:
        """The part of the time of requests that default coefficients split."""
        steps = sum(time for use, time in self.time_ns.items() if use in _OF_REQUESTS)
        return self.provisional_ns / steps if steps > 0 else 0.0

    @property
    def busy_nanousd(self) -> int:
        """What the time with work cost."""
        return self.total_nanousd - sum(self.cost_nanousd[use] for use in _NOT_BUSY)

    @property
    def waste_nanousd(self) -> int:
        """What was computed for nobody, or twice."""
        return sum(self.cost_nanousd[use] for use in _WASTE)


@dataclass(frozen=True, slots=True)
class UnitCost:
    """Dollars per million tokens, or per thousand requests; None where there were none."""

    input_usd: float | None
    output_usd: float | None
    total_usd: float | None
    requests_usd: float | None


def unit_cost(product: Product, nanousd: int) -> UnitCost:
    """Return what an amount is per unit of what was produced for it."""

    def per(count: int, unit: int) -> float | None:
        return float(Fraction(nanousd * unit, count * 10**9)) if count else None

    million = 10**6
    return UnitCost(
        per(product.input_tokens, million),
        per(product.output_tokens, million),
        per(product.input_tokens + product.output_tokens, million),
        per(product.requests, 1000),
    )
