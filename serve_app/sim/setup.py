"""What is simulated: pools and their engines, clients, faults, and the times of things."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf
from typing import Protocol

from serve_app.core.engine_model import EngineParams
from serve_app.core.exchange import EXCHANGE_PERIOD_S
from serve_app.core.policy import PoolPolicy
from serve_app.core.routing import HeavyPool, RoutingSettings
from serve_app.core.types import PoolName

CHAT_POOL = PoolName("chat")
TPOT_SLO_S = 0.05
COOLDOWN_MOST_RATIO = 0.25


@dataclass(frozen=True, slots=True)
class PoolSetup:
    """One pool: its policy, and ``replicas`` engines of the same size and speed.

    ``cold_start_s`` is how long a new replica takes until it serves.
    """

    name: PoolName
    policy: PoolPolicy
    engine: EngineParams = field(default_factory=EngineParams)
    replicas: int = 8
    cold_start_s: float = 120.0


class Scaler(Protocol):
    """Decides a pool's size; asked every ``period_s``."""

    period_s: float

    def replicas(self, load: PoolLoad, now_s: float) -> int:
        """Return how many replicas there shall be, starting ones included."""


@dataclass(frozen=True, slots=True)
class PoolLoad:
    """What a scaler sees: counts now, and what was offered and ended since it was asked last.

    ``stay_s`` is how long those that completed since stayed at an engine on average, None if
    none did.
    """

    ready: int
    starting: int
    queued: int
    in_flight: int
    kv_usage_ratio: float
    offered: int
    ended: int
    since_s: float
    stay_s: float | None = None


@dataclass(frozen=True, slots=True)
class Clients:
    """How clients behave.

    A client waits ``patience_s`` for the first token, then goes away. Refused, failed or
    out of patience, it asks again up to ``retries_max`` times: after the advised
    Retry-After if it is one of the ``obedient_ratio``, else after ``backoff_s``; both
    times 0.5 to 1.5 at random.
    """

    retries_max: int = 0
    patience_s: float = inf
    backoff_s: float = 0.5
    obedient_ratio: float = 1.0


class FaultKind(StrEnum):
    """What can happen to an engine.

    KILL: it is gone at once; a new replica is up after its cold start. DRAIN: notice of
    ``duration_s``, then gone; the replacement starts with the notice. HANG: it sends
    snapshots but generates nothing, until killed after ``duration_s`` and replaced.
    PREFILL: for ``duration_s`` every request without a first token fails there at once,
    while decoding ones go on.
    """

    KILL = "kill"
    DRAIN = "drain"
    HANG = "hang"
    PREFILL = "prefill"


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of the replica at place ``replica`` of the first pool."""

    at_s: float
    kind: FaultKind
    replica: int = 0
    duration_s: float = 120.0


@dataclass(frozen=True, slots=True)
class Slo:
    """What counts as good: first token within ``ttft_s`` of its class, then ``tpot_s`` a token."""

    ttft_s: tuple[float, float, float]
    tpot_s: float = TPOT_SLO_S


@dataclass(frozen=True, slots=True)
class Setup:
    """A whole simulated system.

    ``warmup_s`` to ``duration_s`` is measured, by time of arrival. Arrivals go on for
    ``cooldown_s`` more (a quarter of the duration at most), so that the last ones measured do
    not find an empty system when they retry; then the system runs until it is empty or
    ``drain_s`` have passed.
    ``prompt_estimate_ratio`` is the router's upper estimate of prompt tokens over the
    engine's count. ``engine_priority`` hands the class to the engine's own scheduler.
    ``progress_period_s`` is how often running generations' tokens are reported.
    ``reported_slots`` replaces the engines' slots in snapshots: a router without
    admission sends an engine more than it can run. ``routers`` share the arrivals in turn;
    each knows its own requests at once, the others' from snapshots and from what they tell each
    other every ``exchange_period_s``, in turn. ``scaler`` builds
    what sizes the first pool; None keeps it as it is. ``measure_cost`` has every question's
    engine time measured, as is done anyway where a pool's fairness goes by it.
    """

    pools: tuple[PoolSetup, ...]
    duration_s: float
    warmup_s: float = 20.0
    cooldown_s: float = 0.0
    drain_s: float = 300.0
    clients: Clients = Clients()
    faults: tuple[Fault, ...] = ()
    target: Slo | None = None
    heavy: HeavyPool | None = None
    routing: RoutingSettings = field(default_factory=RoutingSettings)
    snapshot_period_s: float = 0.1
    progress_period_s: float = 1.0
    prompt_estimate_ratio: float = 1.1
    engine_priority: bool = True
    reported_slots: int | None = None
    routers: int = 1
    exchange_period_s: float = EXCHANGE_PERIOD_S
    scaler: Callable[[], Scaler] | None = None
    measure_cost: bool = False

    @property
    def arrivals_end_s(self) -> float:
        """When the last request arrives."""
        return self.duration_s + min(self.cooldown_s, COOLDOWN_MOST_RATIO * self.duration_s)

    def measures(self, arrival_s: float) -> bool:
        """Whether what arrives then counts."""
        return self.warmup_s <= arrival_s < self.duration_s

    @property
    def slo(self) -> Slo:
        """The first pool's own targets, which a contender without them is held to as well."""
        return self.target or Slo(ttft_of(self.pools[0].policy))


def ttft_of(policy: PoolPolicy) -> tuple[float, float, float]:
    """Return a policy's TTFT targets by class, in seconds."""
    critical, standard, sheddable = (each.ttft_slo_s for each in policy.classes)
    return critical, standard, sheddable
