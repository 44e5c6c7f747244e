"""Control's part in sizing pools: it hears all routers, decides, and says why.

A decision goes to the pool's engines with their heartbeats' answers, and from them to Ray Serve
(``serve_app/autoscaling.py``). Who decides is one process with everything before it; that it is
away leaves every size as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from serve_app.core.calendar import DAY_S
from serve_app.core.demand import DemandSum, EngineNews, PoolDemand, Wanted
from serve_app.core.scaling import Decision, ScalingPolicy, ScalingState, decide
from serve_app.core.start_times import StartTimes
from serve_app.core.types import PoolName

logger = logging.getLogger("headrace.scaling")

PERIOD_S: Final = 1.0


@dataclass(slots=True)
class _Pool:
    policy: ScalingPolicy
    demand: DemandSum = field(default_factory=DemandSum)
    state: ScalingState = field(default_factory=ScalingState)
    starts: StartTimes = field(default_factory=StartTimes)
    bounds: tuple[int, int] | None = None
    decision: Decision | None = None
    wanted: Wanted | None = None


class Scaler:
    """Decides for every pool that is scaled, once a second. On Control's event loop only."""

    def __init__(
        self,
        clock: Callable[[], float],
        wall: Callable[[], float],
        on_decision: Callable[[PoolName, Decision, float], None],
    ) -> None:
        """``clock`` is monotonic, ``wall`` seconds since the epoch.

        ``on_decision`` also hears how long a replica is taken to start, seconds.
        """
        self._clock = clock
        self._wall = wall
        self._on_decision = on_decision
        self._pools: dict[PoolName, _Pool] = {}
        self._decided_s = clock()

    def hear(
        self, router: str, demand: Mapping[PoolName, tuple[PoolDemand, ScalingPolicy]]
    ) -> None:
        """Take what a router tells of its pools: what was asked for, and how they are scaled."""
        for name, (told, policy) in demand.items():
            pool = self._pools.setdefault(name, _Pool(policy))
            pool.policy = policy
            pool.demand.hear(router, told)

    def wanted(self, pool: PoolName) -> Wanted | None:
        """Return what was decided for a pool last, None if nothing ever was."""
        known = self._pools.get(pool)
        return None if known is None else known.wanted

    @property
    def due(self) -> bool:
        """Whether a period has passed since the last decision."""
        return self._clock() - self._decided_s >= PERIOD_S

    def decide(self, routers: Mapping[str, object], engines: Mapping[str, EngineNews]) -> None:
        """Decide anew. Both are those that were heard of lately."""
        now_s = self._decided_s = self._clock()
        for name, pool in self._pools.items():
            pool.demand.keep(routers)
            own = {replica: each for replica, each in engines.items() if each.pool == name}
            self._decide(now_s, name, pool, own)

    def _decide(
        self, now_s: float, name: PoolName, pool: _Pool, own: Mapping[str, EngineNews]
    ) -> None:
        engines = own.values()
        bounds = next((each.bounds for each in engines if each.bounds is not None), pool.bounds)
        if bounds is None:
            return
        pool.bounds = bounds
        # Replicas that leave are heard of for a while: what was decided is what there will be.
        size = len(engines) if pool.wanted is None else pool.wanted.replicas
        ready = min(len(engines), size)
        kv_usage_ratio = sum(each.kv_usage_ratio for each in engines) / max(1, len(engines))
        wall_s = self._wall()
        demand = pool.demand.take(now_s, ready, size - ready, kv_usage_ratio)
        cold_start_s = pool.starts.estimate_s(pool.policy.cold_start_s)
        policy = replace(pool.policy, least=bounds[0], most=bounds[1], cold_start_s=cold_start_s)
        decision = decide(policy, pool.state, replace(demand, day_s=wall_s % DAY_S))
        pool.state = decision.state
        pool.decision = decision
        if pool.wanted is None or decision.replicas != pool.wanted.replicas:
            logger.info(
                "pool sized",
                extra={"pool": name, "replicas": decision.replicas, "reason": decision.reason},
            )
        pool.wanted = Wanted(decision.replicas, wall_s)
        pool.starts.look(now_s, decision.replicas, own)
        self._on_decision(name, decision, cold_start_s)
