"""Where a replica's time went, as metrics. Tenants and requests are in the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge

from serve_app.core.attribution import ReplicaUse, StepCoefficients, Use
from serve_app.core.calendar import NS_PER_S, PS_PER_S
from serve_app.core.types import TenantId

_PS: Final = "_ps"


class EngineCosts(Protocol):
    """What an engine that measures its steps says of them."""

    @property
    def use(self) -> ReplicaUse: ...
    @property
    def fit_error_ratio(self) -> float: ...
    @property
    def coefficients(self) -> StepCoefficients: ...
    @property
    def kv_block_s(self) -> Mapping[TenantId, float]: ...


class CostMetrics:
    """Set from an engine's costs when its registry is rendered.

    All uses and the open time together are the replica's life, up to the last step.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.engine_time_seconds_total = Counter(
            "headrace_engine_time_seconds_total",
            "The replica's time by use: start_up, useful, cancelled, preempted, failed, idle, "
            "drain, unattributed.",
            ("use",),
            registry=registry,
        )
        self.engine_open_seconds = Gauge(
            "headrace_engine_open_seconds",
            "Engine time so far of requests that have not ended.",
            registry=registry,
        )
        self.engine_provisional_seconds_total = Counter(
            "headrace_engine_provisional_seconds_total",
            "Engine time split over requests by default coefficients, before enough steps.",
            registry=registry,
        )
        self.engine_coefficients_provisional = Gauge(
            "headrace_engine_coefficients_provisional",
            "1 while steps are split by default coefficients, 0 once they are fitted.",
            registry=registry,
        )
        self.engine_step_fit_error_ratio = Gauge(
            "headrace_engine_step_fit_error_ratio",
            "Mean error of the predicted time of a step over the mean time of a step.",
            registry=registry,
        )
        self.engine_kv_block_seconds_total = Counter(
            "headrace_engine_kv_block_seconds_total",
            "KV blocks times how long requests that ended held them; no part of the time.",
            registry=registry,
        )
        self.engine_step_cost_seconds = Gauge(
            "headrace_engine_step_cost_seconds",
            "What a step takes as such, per prefill token, decoding sequence and KV token read, "
            "by the coefficients that split its time.",
            ("part",),
            registry=registry,
        )
        self._uses_ns = dict.fromkeys(Use, 0)
        self._provisional_ns = 0
        self._kv_block_s = 0.0

    def record(self, costs: EngineCosts) -> None:
        """Count up to ``costs``, which never count less than those before them."""
        for use, time_ns in costs.use.uses.items():
            if use is not Use.OPEN:
                grown_ns = time_ns - self._uses_ns[use]
                self.engine_time_seconds_total.labels(use.value).inc(grown_ns / NS_PER_S)
                self._uses_ns[use] = time_ns
        self.engine_open_seconds.set(costs.use.uses[Use.OPEN] / NS_PER_S)
        provisional_ns = costs.use.provisional_ns
        self.engine_provisional_seconds_total.inc(
            (provisional_ns - self._provisional_ns) / NS_PER_S
        )
        self._provisional_ns = provisional_ns
        self.engine_coefficients_provisional.set(costs.coefficients.provisional)
        for part in fields(StepCoefficients):
            if part.name.endswith(_PS):
                cost_s = getattr(costs.coefficients, part.name) / PS_PER_S
                self.engine_step_cost_seconds.labels(part.name.removesuffix(_PS)).set(cost_s)
        self.engine_step_fit_error_ratio.set(costs.fit_error_ratio)
        kv_block_s = sum(costs.kv_block_s.values())
        # Sums of floats in another order may be smaller by their last bit.
        self.engine_kv_block_seconds_total.inc(max(0.0, kv_block_s - self._kv_block_s))
        self._kv_block_s = kv_block_s
