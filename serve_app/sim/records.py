"""What happened to each question, and the figures drawn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.core.quantile import quantile
from serve_app.core.types import Outcome, PriorityClass, RejectReason
from serve_app.sim.workload import Arrival

PROMPT_WEIGHT, OUTPUT_WEIGHT = 1.0, 2.0


class Question:
    """One arrival's fate over all its attempts.

    ``ttft_s`` counts from ``asked_s``: its first attempt since it was last refused. Time
    spent with a replica that died or never answered counts, time a client was told to
    stay away does not. ``engine_s`` is the engine time of the attempt that completed, where
    it is measured.
    """

    __slots__ = (
        "arrival",
        "asked_s",
        "attempts",
        "cached_tokens",
        "degraded",
        "ended_s",
        "engine_s",
        "outcome",
        "output_tokens",
        "refusal",
        "refused",
        "restarts",
        "tpot_s",
        "ttft_s",
    )

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.asked_s: float | None = None
        self.attempts = 0
        self.refused = 0
        self.refusal: RejectReason | None = None
        self.restarts = 0
        self.outcome: Outcome | None = None
        self.ttft_s: float | None = None
        self.tpot_s = 0.0
        self.ended_s = 0.0
        self.output_tokens = 0
        self.cached_tokens = 0
        self.degraded = False
        self.engine_s = 0.0


@dataclass(slots=True)
class Sample:
    """The system at one moment, for the plots."""

    at_s: float
    queued: int
    in_flight: int
    kv_usage_ratio: float
    replicas: int
    rung: int


@dataclass(slots=True)
class Run:
    """Everything one simulation produced.

    ``over_admitted_max`` is by how many requests a replica ever held more than its cap:
    several routers may fill the same free places between two snapshots.
    ``over_bound_requests`` counts requests sent beyond the bound that core states for that.
    ``critical_passed_s`` is the longest any Critical request had waited, in any router,
    when a Sheddable one was sent.
    """

    questions: list[Question] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    notices: Counter[str] = field(default_factory=Counter)
    offered_attempts: int = 0
    rejects: Counter[tuple[PriorityClass, RejectReason]] = field(default_factory=Counter)
    preemptions: Counter[PriorityClass] = field(default_factory=Counter)
    processed_tokens: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    duplicated_tokens: int = 0
    lost_requests: int = 0
    over_admitted_max: int = 0
    over_bound_requests: int = 0
    critical_passed_s: float = 0.0
    replica_s: float = 0.0
    ended_at_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0


def percentile(values: Iterable[float], ratio: float) -> float | None:
    """Return the value at ``ratio`` (nearest rank) of the values; None if there are none."""
    seen = list(values)
    return quantile(seen, ratio) if seen else None


def jain_index(values: Sequence[float]) -> float:
    """Return Jain's fairness index, (sum x)^2 / (n sum x^2): 1 is even, 1/n one takes all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def max_min_shares(demands: Mapping[str, float], capacity: float) -> dict[str, float]:
    """Divide ``capacity`` max-min fairly: nobody gets more than its demand, the rest evenly."""
    shares: dict[str, float] = {}
    left = capacity
    for place, (name, demand) in enumerate(sorted(demands.items(), key=lambda each: each[1])):
        shares[name] = min(demand, left / (len(demands) - place))
        left -= shares[name]
    return shares


def service_cost(prompt_tokens: int, output_tokens: int) -> float:
    """Return the cost units of fair queueing: prompt + 2 x output tokens."""
    return PROMPT_WEIGHT * prompt_tokens + OUTPUT_WEIGHT * output_tokens
