"""A pool's state in numbers, for metrics, the console and tests. Read only."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TypeVar

from serve_app.core.pool import Pool
from serve_app.core.types import TenantId

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One router's view of one pool. Triples are by class: Critical, Standard, Sheddable.

    ``saturation_ratio`` is the mean over live replicas of load over knee (stale replicas
    count as 1). ``*_error_*`` are recent mean absolute errors of the predictors.
    ``tenants_known`` bounds the fairness tables' size.
    """

    waiting: tuple[int, int, int]
    in_flight: tuple[int, int, int]
    in_flight_tokens: tuple[int, int, int]
    service_cost_per_s: tuple[float, float, float]
    replicas_live: int
    replicas_open_breaker: int
    saturation_ratio: float
    kv_usage_ratio: float
    kv_prediction_ratio: float
    rung: int
    ttft_error_s: float
    output_error_ratio: float
    retry_balance: float
    tenants_active: int
    tenants_known: int
    clients_known: int


def pool_figures(pool: Pool, now_s: float) -> PoolFigures:
    """Return the figures of ``pool`` at ``now_s``."""
    load, live = pool.load, pool.load.live
    saturations = [each.saturation_ratio(pool.policy, now_s) for each in live]
    count = max(1, len(live))
    return PoolFigures(
        waiting=_triple([len(queue) for queue in pool.queues]),
        in_flight=_triple(load.shares.requests),
        in_flight_tokens=_triple(load.shares.tokens),
        service_cost_per_s=_triple([rate.per_s(now_s) or 0.0 for rate in pool.rates]),
        replicas_live=len(live),
        replicas_open_breaker=sum(each.breaker.is_open for each in live),
        saturation_ratio=sum(1.0 if each == inf else each for each in saturations) / count,
        kv_usage_ratio=load.kv_usage_ratio() or 0.0,
        kv_prediction_ratio=sum(each.kv_prediction_ratio for each in live) / count,
        rung=pool.ladder.rung,
        ttft_error_s=pool.ttft.error_s,
        output_error_ratio=pool.outputs.error_ratio(),
        retry_balance=pool.retries.balance,
        tenants_active=len(load.tenants),
        tenants_known=sum(queue.tenants for queue in pool.queues),
        clients_known=len(pool.throttle),
    )


def noisiest_tenants(pool: Pool, limit: int, now_s: float) -> list[tuple[TenantId, float]]:
    """Return the active tenants furthest ahead of their fair share, with their debts."""
    debts = [
        (tenant, sum(queue.debt(tenant, now_s) for queue in pool.queues))
        for tenant in pool.load.tenants
    ]
    debts.sort(key=lambda item: -item[1])
    return debts[:limit]


def _triple(values: list[T]) -> tuple[T, T, T]:
    critical, standard, sheddable = values
    return critical, standard, sheddable
