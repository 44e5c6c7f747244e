"""What a pool's operator decides: the frozen settings every policy in core reads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How one router admits to and routes within one pool.

    ``max_concurrency_per_replica`` caps what is sent to a replica at once (the engine's
    own ``slots`` cap it too). ``queue_capacity`` counts waiting requests; zero means
    dispatch at once or refuse. A waiting request is refused after ``queue_timeout_s``,
    or after ``hold_without_replica_s`` while the pool has no replica at all. A replica
    not heard of for ``stale_after_s`` (three missed snapshots) counts as saturated, and
    is dropped after ``lost_after_s``. ``retry_after_*`` bound the advice to refused
    clients. ``routing`` names the ranking; the controller's constructor resolves it.
    """

    max_concurrency_per_replica: int = 64
    queue_capacity: int = 256
    queue_timeout_s: float = 30.0
    hold_without_replica_s: float = 5.0
    stale_after_s: float = 0.3
    lost_after_s: float = 60.0
    retry_after_min_s: float = 1.0
    retry_after_max_s: float = 60.0
    routing: str = "least_loaded"

    def __post_init__(self) -> None:
        assert self.max_concurrency_per_replica >= 1
        assert self.queue_capacity >= 0
        assert self.queue_timeout_s > 0
        assert self.hold_without_replica_s >= 0
        assert 0 < self.stale_after_s <= self.lost_after_s
        assert 0 < self.retry_after_min_s <= self.retry_after_max_s
