"""What a pool's operator decides: the frozen settings every policy in core reads.

serve_app/config.py mirrors these as pydantic models and checks what users write; the
assertions here only guard against mistakes in code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from serve_app.core.types import PoolName

if TYPE_CHECKING:
    from serve_app.core.routing.settings import RoutingSettings

UNIT = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class ClassPolicy:
    """How one priority class is treated in a pool.

    ``ttft_slo_s`` is the target from offer to first token. A request waits at most
    ``queue_wait_slos`` times that (and the pool's ``queue_timeout_s``). ``queue_capacity``
    None means the pool's. ``kv_limit_ratio`` is how full a replica's KV cache may become,
    by prediction, through admitting this class; above 1 over-commits it. While the class
    waits behind more important work it still gets ``minimum_share_ratio`` of the
    dispatched cost, and ``aged_share_ratio`` once its next request has waited longer than
    its TTFT target.
    """

    ttft_slo_s: float
    queue_wait_slos: float = 2.0
    queue_capacity: int | None = None
    kv_limit_ratio: float = 0.97
    minimum_share_ratio: float = 0.0
    aged_share_ratio: float = 0.0

    def __post_init__(self) -> None:
        assert self.ttft_slo_s > 0
        assert self.queue_wait_slos > 0
        assert self.queue_capacity is None or self.queue_capacity >= 0
        assert self.kv_limit_ratio > 0
        assert 0 <= self.minimum_share_ratio < 1
        assert 0 <= self.aged_share_ratio < 1


@dataclass(frozen=True, slots=True)
class FairnessPolicy:
    """What a request costs its tenant, and how long a tenant's debt is remembered.

    Cost is ``request_cost`` plus each token times its weight. ``by_engine_seconds``
    replaces the estimate by measured engine time at completion, where engines report it.
    A debt halves every ``debt_half_life_s`` of idleness. A tenant is sparse while what it
    has waiting and what it is ahead of its fair share come to at most ``sparse_cost``.
    ``tenants_max`` bounds the tables.
    """

    input_weight: float = 1.0
    cached_input_weight: float = 0.1
    output_weight: float = 2.0
    request_cost: float = 16.0
    by_engine_seconds: bool = False
    debt_half_life_s: float = 60.0
    sparse_cost: float = 8192.0
    tenants_max: int = 10_000

    def __post_init__(self) -> None:
        assert self.input_weight >= 0
        assert self.cached_input_weight >= 0
        assert self.output_weight >= 0
        assert self.request_cost >= 0
        assert self.input_weight + self.output_weight + self.request_cost > 0
        assert self.debt_half_life_s > 0
        assert self.sparse_cost >= 0
        assert self.tenants_max >= 1


@dataclass(frozen=True, slots=True)
class BrownoutPolicy:
    """When a pool gives up what, rung by rung, and which rungs may act.

    Rung n is reached when the mean KV use is at least ``kv_ratios[n-1]`` or the Critical or
    Standard queue (for the last rung, the Critical one) is filled to
    ``queue_ratios[n-1]``; the last one also at ``storm_preemptions_per_s`` per replica. A
    rung is left, one at a time, after ``stable_s`` below its threshold less
    ``hysteresis_ratio``. ``fallback_pool`` takes Standard requests at rung 3. A rung
    switched off is passed through without acting.
    """

    kv_ratios: tuple[float, float, float, float] = (0.85, 0.90, 0.95, 0.97)
    queue_ratios: tuple[float, float, float, float] = (0.5, 0.7, 0.85, 0.95)
    storm_preemptions_per_s: float = 2.0
    hysteresis_ratio: float = 0.05
    stable_s: float = 10.0
    shed_sheddable: bool = True
    cap_output: bool = True
    use_fallback: bool = True
    critical_only: bool = True
    output_cap_tokens: int = 512
    fallback_pool: PoolName | None = None

    def __post_init__(self) -> None:
        assert list(self.kv_ratios) == sorted(self.kv_ratios)
        assert list(self.queue_ratios) == sorted(self.queue_ratios)
        assert self.storm_preemptions_per_s > 0
        assert self.hysteresis_ratio >= 0
        assert self.stable_s > 0
        assert self.output_cap_tokens >= 1


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a replica is left alone, and how many retries a pool may cause.

    ``failures`` in a row open a replica's breaker for ``open_s``, doubled at each failed
    probe up to ``open_max_s``. Each dispatch earns ``retry_ratio`` retries, up to
    ``retry_reserve``, which is also what a pool starts with.
    """

    failures: int = 5
    open_s: float = 5.0
    open_max_s: float = 60.0
    retry_ratio: float = 0.2
    retry_reserve: float = 32.0

    def __post_init__(self) -> None:
        assert self.failures >= 1
        assert 0 < self.open_s <= self.open_max_s
        assert 0 <= self.retry_ratio <= 1
        assert self.retry_reserve >= 0


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How one router admits to and routes within one pool.

    A replica's knee, past which latency targets are lost, has three sides: requests in
    flight (``max_concurrency_per_replica``; the engine's own slots cap it too), prompt
    tokens sent and not yet computed (``prefill_knee_tokens``), and tokens in flight
    (``knee_tokens_per_replica``, None for the KV cache's capacity). Of the knee,
    ``critical_reserve_ratio`` is kept for Critical, and Sheddable takes at most
    ``sheddable_share_ratio``. Of each share, ``sparse_headroom_ratio`` is open only to
    tenants that ask for little (FairnessPolicy), while several are active. While other
    tenants are active, one tenant holds at most ``tenant_concurrency_ratio`` of the slots
    and ``tenant_kv_ratio`` of the KV cache.

    ``queue_capacity`` counts waiting requests per class; zero means dispatch at once or
    refuse. A request is refused after ``queue_timeout_s`` of waiting, or after
    ``hold_without_replica_s`` while the pool has no replica at all. A replica not heard
    of for ``stale_after_s`` (three missed snapshots) counts as saturated, and is dropped
    after ``lost_after_s``. ``retry_after_*`` bound the advice to refused clients.
    ``early_rejection`` refuses what would miss its TTFT target, and enforces
    ``queue_wait_slos``. ``client_throttle`` refuses clients that ignore the advice.

    ``ordering`` "arrival" serves in order of arrival, without classes, reserves or
    fairness: the baseline. ``routing`` names the ranking, ``routing_settings`` its numbers
    (None: those that the controller was made with); the controller's constructor resolves
    both.
    """

    max_concurrency_per_replica: int = 64
    prefill_knee_tokens: int = 4096
    knee_tokens_per_replica: int | None = None
    critical_reserve_ratio: float = 0.3
    sheddable_share_ratio: float = 0.2
    sparse_headroom_ratio: float = 0.125
    tenant_concurrency_ratio: float = 1.0
    tenant_kv_ratio: float = 0.5
    queue_capacity: int = 256
    queue_timeout_s: float = 30.0
    hold_without_replica_s: float = 5.0
    stale_after_s: float = 0.3
    lost_after_s: float = 60.0
    retry_after_min_s: float = 1.0
    retry_after_max_s: float = 60.0
    expected_output_tokens: int = 256
    early_rejection: bool = True
    client_throttle: bool = True
    ordering: Literal["fair", "arrival"] = "fair"
    routing: str = "least_loaded"
    routing_settings: RoutingSettings | None = None
    critical: ClassPolicy = ClassPolicy(ttft_slo_s=1.0)
    standard: ClassPolicy = ClassPolicy(
        ttft_slo_s=2.0, kv_limit_ratio=0.92, minimum_share_ratio=0.1, aged_share_ratio=0.2
    )
    sheddable: ClassPolicy = ClassPolicy(
        ttft_slo_s=10.0, kv_limit_ratio=0.80, aged_share_ratio=0.05
    )
    fairness: FairnessPolicy = FairnessPolicy()
    brownout: BrownoutPolicy = BrownoutPolicy()
    breaker: BreakerPolicy = BreakerPolicy()

    def __post_init__(self) -> None:
        assert self.max_concurrency_per_replica >= 1
        assert self.prefill_knee_tokens >= 1
        assert self.knee_tokens_per_replica is None or self.knee_tokens_per_replica >= 1
        assert 0 <= self.critical_reserve_ratio < 1
        assert 0 <= self.sheddable_share_ratio <= UNIT
        assert 0 <= self.sparse_headroom_ratio < 1
        assert 0 < self.tenant_concurrency_ratio <= UNIT
        assert 0 < self.tenant_kv_ratio <= UNIT
        assert self.queue_capacity >= 0
        assert self.queue_timeout_s > 0
        assert self.hold_without_replica_s >= 0
        assert 0 < self.stale_after_s <= self.lost_after_s
        assert 0 < self.retry_after_min_s <= self.retry_after_max_s
        assert self.expected_output_tokens >= 1

    @property
    def classes(self) -> tuple[ClassPolicy, ClassPolicy, ClassPolicy]:
        """The class policies, indexed by PriorityClass."""
        return (self.critical, self.standard, self.sheddable)


def arrival_order(policy: PoolPolicy) -> PoolPolicy:
    """Return ``policy`` without classes, fairness, early rejection, brownout or breaker.

    A bounded queue in order of arrival with a concurrency cap per replica: what most
    gateways do, and the baseline the policies are measured against.
    """
    patient = ClassPolicy(ttft_slo_s=policy.queue_timeout_s, kv_limit_ratio=1e6)
    return replace(
        policy,
        ordering="arrival",
        early_rejection=False,
        client_throttle=False,
        prefill_knee_tokens=10**12,
        knee_tokens_per_replica=10**12,
        critical_reserve_ratio=0.0,
        sheddable_share_ratio=1.0,
        sparse_headroom_ratio=0.0,
        tenant_kv_ratio=1.0,
        critical=patient,
        standard=patient,
        sheddable=patient,
        brownout=BrownoutPolicy(kv_ratios=(2, 2, 2, 2), queue_ratios=(2, 2, 2, 2)),
        breaker=BreakerPolicy(failures=10**9, retry_ratio=1.0, retry_reserve=1e9),
    )
