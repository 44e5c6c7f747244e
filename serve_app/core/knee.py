"""The knee of a replica: the load past which latency targets are lost, searched by trying.

A load is doubled until it fails, then the gap is halved. What is tried and how is the
caller's; here is only what to try next, and what the tries say.

Source: the serving playbook, section 5.3: raise the load until goodput peaks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, sqrt
from typing import Final

PEAK_RATIO: Final = 0.99


@dataclass(frozen=True, slots=True)
class Slo:
    """Targets of a request, seconds; ``good_ratio`` of a level's requests must meet both.

    ``tpot_s`` is the mean time per output token after the first.
    """

    ttft_s: float
    tpot_s: float
    good_ratio: float = 0.95

    def __post_init__(self) -> None:
        assert self.ttft_s > 0
        assert self.tpot_s > 0
        assert 0 < self.good_ratio <= 1


@dataclass(frozen=True, slots=True)
class Served:
    """One request that was answered. Seconds from its sending; tokens.

    ``ended_s`` is on the clock of the whole measurement.
    """

    ttft_s: float
    total_s: float
    ended_s: float
    prompt_tokens: int
    cached_prompt_tokens: int
    output_tokens: int

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; 0 with a single one."""
        return (self.total_s - self.ttft_s) / max(1, self.output_tokens - 1)

    def is_good(self, slo: Slo) -> bool:
        """Whether it met both targets."""
        return self.ttft_s <= slo.ttft_s and self.tpot_s <= slo.tpot_s


@dataclass(frozen=True, slots=True)
class Level:
    """What was seen at one concurrency for ``window_s``, warm-up excluded.

    ``refused`` requests got no answer: the endpoint said that it has no room, or failed.
    """

    concurrency: int
    window_s: float
    served: tuple[Served, ...]
    refused: int = 0

    def good(self, slo: Slo) -> int:
        """How many requests met the targets."""
        return sum(each.is_good(slo) for each in self.served)

    def goodput_per_s(self, slo: Slo) -> float:
        """Requests per second that met the targets."""
        return self.good(slo) / self.window_s

    def holds(self, slo: Slo) -> bool:
        """Whether enough of all that was asked for met the targets."""
        asked = len(self.served) + self.refused
        return asked > 0 and self.good(slo) >= slo.good_ratio * asked


@dataclass(frozen=True, slots=True)
class Knee:
    """The level where goodput peaks.

    ``bounded_by`` says what kept the search from going on: "targets" if a higher load
    missed them, "peak" if it met them and served no more, "bound" if nothing higher was
    to be tried.
    """

    level: Level
    bounded_by: str


def next_load(
    tried: Mapping[float, bool],
    *,
    low: float,
    most: float,
    precision_ratio: float,
    whole: bool = False,
) -> float | None:
    """Return the load to try next, None when the knee is known to ``precision_ratio``.

    ``tried`` says of loads whether they held. The lowest is ``low``, then they double up to
    ``most``. With ``whole`` loads are whole numbers.
    """
    assert 0 < low <= most
    if not tried:
        return low
    held = [load for load, holds in tried.items() if holds]
    failed = [load for load, holds in tried.items() if not holds]
    if not held:
        return None
    if not failed:
        highest = max(held)
        return min(2.0 * highest, most) if highest < most else None
    lowest_failed = min(failed)
    below = [load for load in held if load < lowest_failed]
    if not below:
        return None
    highest = max(below)
    if lowest_failed - highest <= max(precision_ratio * lowest_failed, 1.0 if whole else 0.0):
        return None
    middle = (highest + lowest_failed) / 2.0
    return float(floor(middle)) if whole else middle


def goes_on_rising(levels: Sequence[Level], slo: Slo) -> bool:
    """Whether the highest level still served more than the one below it.

    Doubling a saturated engine only lets requests wait longer: where targets are generous,
    goodput is flat long before they are missed.
    """
    if len(levels) < 2:
        return True
    below, highest = sorted(levels, key=lambda level: level.concurrency)[-2:]
    return highest.goodput_per_s(slo) > below.goodput_per_s(slo) / PEAK_RATIO


def find_knee(levels: Sequence[Level], slo: Slo) -> Knee | None:
    """Return the level with the largest goodput among those that held; None if none did.

    Of levels within a hundredth of the largest the least concurrency is the knee: more of
    it only makes everybody wait.
    """
    held = [level for level in levels if level.holds(slo)]
    if not held:
        return None
    peak = max(level.goodput_per_s(slo) for level in held)
    level = min(
        (each for each in held if each.goodput_per_s(slo) >= PEAK_RATIO * peak),
        key=lambda each: each.concurrency,
    )
    above = [each for each in levels if each.concurrency > level.concurrency]
    if not above:
        return Knee(level, "bound")
    return Knee(level, "peak" if any(each.holds(slo) for each in above) else "targets")


def requests_to_measure(concurrency: int, least: int) -> int:
    """Return how many answers make a level: two from each client, and enough for a p95."""
    return max(least, 2 * concurrency, 20 + floor(sqrt(concurrency)))
