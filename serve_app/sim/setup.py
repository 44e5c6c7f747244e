"""What is simulated: pools and their engines, clients, faults, and the times of things."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from serve_app.core.engine_model import EngineParams
from serve_app.core.policy import PoolPolicy
from serve_app.core.routing import HeavyPool, RoutingSettings
from serve_app.core.types import PoolName, PriorityClass

CHAT_POOL = PoolName("chat")


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


def _ttft_slos() -> Mapping[PriorityClass, float]:
    return dict.fromkeys(PriorityClass, 1.0)


@dataclass(frozen=True, slots=True)
class Slo:
    """What counts as good: first token within ``ttft_s`` of its class, then ``tpot_s`` a token."""

    ttft_s: Mapping[PriorityClass, float] = field(default_factory=_ttft_slos)
    tpot_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Setup:
    """A whole simulated system.

    ``warmup_s`` to ``duration_s`` is measured, by time of arrival; afterwards the system
    runs on without arrivals until it is empty or ``drain_s`` have passed.
    ``prompt_estimate_ratio`` is the router's upper estimate of prompt tokens over the
    engine's count. ``engine_priority`` hands the class to the engine's own scheduler.
    ``progress_period_s`` is how often running generations' tokens are reported.
    """

    pools: tuple[PoolSetup, ...]
    duration_s: float
    warmup_s: float = 20.0
    drain_s: float = 300.0
    clients: Clients = Clients()
    faults: tuple[Fault, ...] = ()
    slo: Slo = field(default_factory=Slo)
    heavy: HeavyPool | None = None
    routing: RoutingSettings = field(default_factory=RoutingSettings)
    snapshot_period_s: float = 0.1
    progress_period_s: float = 1.0
    prompt_estimate_ratio: float = 1.1
    engine_priority: bool = True
    routers: int = 1
    exchange_period_s: float = 0.25
