"""What a pool is asked for, counted by its routers and put together; what is then wanted.

Routers count upwards from their start. Whoever adds them up takes the growth of each, so that a
router that starts anew, or is heard of late, is not counted twice.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from serve_app.core.scaling import Demand
from serve_app.core.types import PoolName


@dataclass(frozen=True, slots=True)
class PoolDemand:
    """A router's counts of one pool since its start, and what it has now.

    ``offered`` requests came, refused ones included; ``ended`` completed after staying
    ``stay_s`` at engines in all. ``queued`` and ``in_flight`` are present numbers.
    """

    offered: int = 0
    ended: int = 0
    stay_s: float = 0.0
    queued: int = 0
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class EngineNews:
    """One engine replica as its heartbeat shows it; ``bounds`` None: it is not scaled."""

    pool: PoolName
    kv_usage_ratio: float
    bounds: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The size wanted of a pool, and when that was decided, in seconds since the epoch."""

    replicas: int
    decided_at_s: float


@dataclass(slots=True)
class _Counts:
    offered: int = 0
    ended: int = 0
    stay_s: float = 0.0


class DemandCounter:
    """One router's counting, for all its pools."""

    def __init__(self) -> None:
        self._counts: defaultdict[PoolName, _Counts] = defaultdict(_Counts)

    def offered(self, pool: PoolName) -> None:
        """A request came for the pool."""
        self._counts[pool].offered += 1

    def ended(self, pool: PoolName, stay_s: float) -> None:
        """A request completed that had been at the pool's engines for ``stay_s``."""
        counts = self._counts[pool]
        counts.ended += 1
        counts.stay_s += max(0.0, stay_s)

    def read(self, pool: PoolName, *, queued: int, in_flight: int) -> PoolDemand:
        """Return the pool's counts with what there is now."""
        counts = self._counts[pool]
        return PoolDemand(counts.offered, counts.ended, counts.stay_s, queued, in_flight)


class DemandSum:
    """One pool's demand over all routers, since it was asked last."""

    def __init__(self) -> None:
        self._latest: dict[str, PoolDemand] = {}
        self._offered = self._ended = 0
        self._stay_s = 0.0

    def hear(self, router: str, told: PoolDemand) -> None:
        """Take a router's counts; those lower than before are of a router that began anew."""
        before = self._latest.get(router)
        if before is None or told.offered < before.offered or told.ended < before.ended:
            before = PoolDemand()
        self._latest[router] = told
        self._offered += told.offered - before.offered
        self._ended += told.ended - before.ended
        self._stay_s += max(0.0, told.stay_s - before.stay_s)

    def keep(self, routers: Mapping[str, object]) -> None:
        """Forget the routers that are not among these."""
        for router in self._latest.keys() - routers.keys():
            del self._latest[router]

    def take(self, now_s: float, ready: int, starting: int, kv_usage_ratio: float) -> Demand:
        """Return what came since the last ``take`` and what there is now."""
        demand = Demand(
            now_s,
            ready,
            starting,
            offered=self._offered,
            queued=sum(each.queued for each in self._latest.values()),
            in_flight=sum(each.in_flight for each in self._latest.values()),
            stay_s=self._stay_s / self._ended if self._ended else None,
            kv_usage_ratio=kv_usage_ratio,
        )
        self._offered = self._ended = 0
        self._stay_s = 0.0
        return demand
