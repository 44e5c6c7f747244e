"""What replicas' time cost, and what each part of it did: whole nano-dollars that add up.

A replica-hour costs its time at its price. That amount is split over what the time went to,
in whole nano-dollars, so that

    requests + cut off + idle + start-up + drain + unattributed + open = what the hour cost

holds exactly, whatever the price. A price that is not known makes no cost: such time is
counted and said to be without a price, and never taken for free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fractions import Fraction
from typing import Final

from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS
from serve_app.core.reconciliation import NodeBill, Rate, cost_nanousd

_ENDED: Final = (Use.USEFUL, Use.CANCELLED, Use.PREEMPTED, Use.FAILED)


class Overhead(StrEnum):
    """What a replica's time went to beside requests' own.

    ``CUT_OFF`` is time of requests that is in no record of theirs: of the step that a
    cancelled one left in the middle, or of records that were lost. ``OPEN`` is of requests
    that had not ended when the hour's account did, less what the hour took over as such.
    """

    CUT_OFF = "cut_off"
    IDLE = "idle"
    START_UP = "start_up"
    DRAIN = "drain"
    UNATTRIBUTED = "unattributed"
    OPEN = "open"


_OF_REQUESTS: Final = (Overhead.CUT_OFF, Overhead.OPEN)


@dataclass(frozen=True, slots=True)
class ReplicaHour:
    """One replica's account of one hour; ``hour`` in wall seconds, the rest nanoseconds.

    ``provisional_ns`` of it was split over requests by default coefficients.
    """

    hour: int
    replica: str
    pool: str
    node: str
    instance: str
    gpus: float
    from_ns: int
    until_ns: int
    uses_ns: Mapping[Use, int]
    provisional_ns: int = 0


@dataclass(frozen=True, slots=True)
class InstancePrice:
    """What an instance costs an hour: ``rates`` in the order of time, each once.

    ``per_gpu`` prices one GPU of it, else the whole of it. Before the first rate there is
    no price; a rate of zero is one.
    """

    rates: tuple[Rate, ...]
    per_gpu: bool = False

    def cost_nanousd(self, hour: ReplicaHour, until_ns: int) -> int | None:
        """Return what the replica's time cost; None if a part of it has no price."""
        if not self.rates or hour.from_ns < self.rates[0].from_ns:
            return None
        if not self.per_gpu:
            return cost_nanousd(self.rates, hour.from_ns, until_ns)
        gpus = Fraction(hour.gpus).limit_denominator(1000)
        rates = [Rate(rate.from_ns, rate.hourly_nanousd * gpus.numerator) for rate in self.rates]
        return cost_nanousd(rates, hour.from_ns, until_ns) // gpus.denominator


@dataclass(frozen=True, slots=True)
class NodePrices:
    """Where a replica-hour's price comes from.

    An instance that is listed costs what the list says. Any other replica pays for its
    GPUs' part of what its node was billed for the hour, by the GPU-hours of the bill.
    """

    instances: Mapping[str, InstancePrice] = field(default_factory=dict)
    bills: Mapping[tuple[int, str], NodeBill] = field(default_factory=dict)

    def cost_nanousd(self, hour: ReplicaHour, until_ns: int) -> int | None:
        """Return what a replica cost up to ``until_ns`` of its account; None: no price."""
        listed = self.instances.get(hour.instance)
        if listed is not None:
            return listed.cost_nanousd(hour, until_ns)
        bill = self.bills.get((hour.hour, hour.node))
        if bill is None or bill.total_nanousd is None or not bill.gpu_hours or not hour.gpus:
            return None
        lasted = Fraction(until_ns - hour.from_ns, HOUR_NS)
        gpus = Fraction(hour.gpus).limit_denominator(1000)
        return int(bill.total_nanousd * gpus * lasted / bill.gpu_hours)


@dataclass(frozen=True, slots=True)
class Part:
    """A row's part of a replica-hour: of the requests under ``key`` or of an overhead.

    ``provisional_ns`` is its part of what default coefficients split, by its time: which
    requests were in those steps is not written down.
    """

    key: tuple[object, ...] | Overhead
    time_ns: int
    cost_nanousd: int | None
    provisional_ns: int = 0


@dataclass(frozen=True, slots=True)
class HourCost:
    """A replica-hour split completely. ``cost_nanousd`` is None where there is no price."""

    hour: ReplicaHour
    lasted_ns: int
    cost_nanousd: int | None
    parts: tuple[Part, ...]


def split(amount: int, weights: Sequence[int]) -> list[int]:
    """Split an amount by whole weights, which may be negative, into whole parts.

    The parts sum to the amount exactly; each is within one of its exact share. Without
    any weight all of it is in the last part.
    """
    whole = sum(weights)
    if not whole:
        return [0] * (len(weights) - 1) + [amount] if weights else []
    parts: list[int] = []
    reached = given = 0
    for weight in weights:
        reached += weight
        upto = reached * amount // whole
        parts.append(upto - given)
        given = upto
    return parts


def split_hour(
    hour: ReplicaHour, requests: Iterable[tuple[tuple[object, ...], int]], prices: NodePrices
) -> HourCost:
    """Split a replica-hour over its requests, by ``(key, engine nanoseconds)``, and the rest.

    Requests whose records say more than the account does prove time that a replica did not
    live to report: its account is longer by that.
    """
    rows = sorted(requests, key=lambda row: tuple(map(str, row[0])))
    recorded_ns = sum(time_ns for _, time_ns in rows)
    uses = hour.uses_ns
    cut_off_ns = sum(uses.get(use, 0) for use in _ENDED) - recorded_ns
    proved_ns = max(0, -cut_off_ns)
    until_ns = hour.until_ns + proved_ns
    lasted_ns = until_ns - hour.from_ns
    # A period that was lost with its disk lies between others: the replica lived through it.
    lost_ns = hour.until_ns - hour.from_ns - sum(uses.values())
    over = {
        Overhead.CUT_OFF: max(0, cut_off_ns),
        Overhead.IDLE: uses.get(Use.IDLE, 0),
        Overhead.START_UP: uses.get(Use.START_UP, 0),
        Overhead.DRAIN: uses.get(Use.DRAIN, 0),
        Overhead.UNATTRIBUTED: uses.get(Use.UNATTRIBUTED, 0) + lost_ns,
        Overhead.OPEN: uses.get(Use.OPEN, 0),
    }
    keys: list[tuple[object, ...] | Overhead] = [key for key, _ in rows]
    times = [time_ns for _, time_ns in rows]
    keys += over
    times += over.values()
    cost = prices.cost_nanousd(hour, until_ns)
    costs: Sequence[int | None] = [None] * len(times)
    if cost is not None:
        costs = split(cost, times)
    # Of requests' time only: what ended, and what was open at the end.
    in_steps = [
        0 if key in over and key not in _OF_REQUESTS else max(0, time_ns)
        for key, time_ns in zip(keys, times, strict=True)
    ]
    parts = tuple(map(Part, keys, times, costs, split(hour.provisional_ns, in_steps)))
    return HourCost(hour, lasted_ns, cost, parts)


def price_at(price: InstancePrice, at_ns: int) -> int | None:
    """Return the nano-dollars an hour in force at a time; None before the first rate."""
    place = bisect_right([rate.from_ns for rate in price.rates], at_ns)
    return price.rates[place - 1].hourly_nanousd if place else None
