"""How many replicas a load needs, by Little's law.

L = lambda x W: what arrives per second times how long each stays is what is in flight. A
replica carries its knee, of which a safety share is used and the rest absorbs bursts.
"""

from __future__ import annotations

from math import ceil, floor

ROUNDING = 1e-9


def service_s(ttft_s: float, output_tokens: float, tpot_s: float) -> float:
    """Return how long a request stays: W = E[TTFT] + E[output] x E[TPOT], at the knee."""
    return ttft_s + output_tokens * tpot_s


def in_flight(arrivals_per_s: float, stay_s: float) -> float:
    """Return how many requests are in flight on average: L = lambda x W."""
    return arrivals_per_s * stay_s


def replicas_needed(
    arrivals_per_s: float, stay_s: float, *, knee_concurrency: int, safety_ratio: float = 0.75
) -> int:
    """Return ceil(lambda x W / (C x safety)), at least 0.

    ``arrivals_per_s`` should be a high quantile of the rate, ``knee_concurrency`` >= 1 what one
    replica holds at its knee, ``safety_ratio`` in (0, 1].

    Source: the serving playbook, section 5.3.
    """
    assert knee_concurrency >= 1
    assert 0 < safety_ratio <= 1
    return max(
        0, ceil(in_flight(arrivals_per_s, stay_s) / (knee_concurrency * safety_ratio) - ROUNDING)
    )


def queue_threshold(knee_concurrency: int, safety_ratio: float = 0.75) -> int:
    """Return the queue length per replica that calls for another one: C x (1 - safety)."""
    assert 0 < safety_ratio <= 1
    return floor(knee_concurrency * (1.0 - safety_ratio) + ROUNDING)
