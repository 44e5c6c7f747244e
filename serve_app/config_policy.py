"""How routers admit to a pool and route within it: a pool's part of the Router's config."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from serve_app.config_base import Name, Ratio, Strict
from serve_app.core import policy
from serve_app.core.routing import pools as core_pools
from serve_app.core.routing import settings as core_settings
from serve_app.core.scaling import ScalingPolicy
from serve_app.core.types import PoolName

Rising = tuple[float, float, float, float]

# What is not the admission core's: settled before it sees a request, or by Control.
_ROUTERS_OWN = frozenset({"heavy", "prompt", "scaling", "spot"})
FORECAST_BUCKETS = 96


class ClassPolicy(Strict):
    """How one priority class is treated in a pool."""

    ttft_slo_s: float = Field(gt=0, description="Target from offer to first token.")
    queue_wait_slos: float = Field(
        2.0, gt=0, description="A request waits at most this many TTFT targets."
    )
    queue_capacity: int | None = Field(None, ge=0, description="Own bound; null: the pool's.")
    kv_limit_ratio: float = Field(
        0.97, gt=0, le=4, description="KV use, by prediction, up to which the class is admitted."
    )
    minimum_share_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of dispatched cost owed while waiting."
    )
    aged_share_ratio: float = Field(
        0.0, ge=0, lt=1, description="The same once the next request waited longer than its target."
    )

    def to_core(self) -> policy.ClassPolicy:
        """Return the settings as core reads them."""
        return policy.ClassPolicy(**self.model_dump())


class CriticalPolicy(ClassPolicy):
    """Critical, as it is unless told otherwise."""

    ttft_slo_s: float = Field(1.0, gt=0, description="Target from offer to first token.")


class StandardPolicy(ClassPolicy):
    """Standard, as it is unless told otherwise."""

    ttft_slo_s: float = Field(2.0, gt=0, description="Target from offer to first token.")
    kv_limit_ratio: float = Field(0.92, gt=0, le=4, description="As in ClassPolicy.")
    minimum_share_ratio: float = Field(0.1, ge=0, lt=1, description="As in ClassPolicy.")
    aged_share_ratio: float = Field(0.2, ge=0, lt=1, description="As in ClassPolicy.")


class SheddablePolicy(ClassPolicy):
    """Sheddable, as it is unless told otherwise."""

    ttft_slo_s: float = Field(10.0, gt=0, description="Target from offer to first token.")
    kv_limit_ratio: float = Field(0.80, gt=0, le=4, description="As in ClassPolicy.")
    aged_share_ratio: float = Field(0.05, ge=0, lt=1, description="As in ClassPolicy.")


class FairnessPolicy(Strict):
    """What a request costs its tenant, and how long a tenant's debt is remembered."""

    input_weight: float = Field(1.0, ge=0, description="Cost of a prompt token.")
    cached_input_weight: float = Field(0.1, ge=0, description="Cost of a cached prompt token.")
    output_weight: float = Field(2.0, ge=0, description="Cost of an output token.")
    request_cost: float = Field(16.0, ge=0, description="Fixed cost of a request.")
    by_engine_seconds: bool = Field(
        False, description="Reconcile by measured engine time where engines report it."
    )
    debt_half_life_s: float = Field(60.0, gt=0, description="An idle tenant's debt halves in this.")
    sparse_cost: float = Field(
        8192.0, ge=0, description="Cost waiting or owed up to which a tenant counts as sparse."
    )
    tenants_max: int = Field(10_000, ge=1, description="Bound of the tables by tenant.")

    @model_validator(mode="after")
    def _costs_something(self) -> FairnessPolicy:
        if self.input_weight + self.output_weight + self.request_cost <= 0:
            raise ValueError("one of input_weight, output_weight and request_cost must be above 0")
        return self

    def to_core(self) -> policy.FairnessPolicy:
        """Return the settings as core reads them."""
        return policy.FairnessPolicy(**self.model_dump())


class BrownoutPolicy(Strict):
    """When a pool gives up what: 1 Sheddable, 2 long answers, 3 the model, 4 Standard."""

    kv_ratios: Rising = Field(
        (0.85, 0.90, 0.95, 0.97), description="KV use of rungs 1 to 4; above 1: never."
    )
    queue_ratios: Rising = Field(
        (0.5, 0.7, 0.85, 0.95), description="Fill of the queues at rungs 1 to 4; above 1: never."
    )
    storm_preemptions_per_s: float = Field(
        2.0, gt=0, description="Preemptions per replica that count as rung 4."
    )
    hysteresis_ratio: float = Field(0.05, ge=0, le=1, description="Margin below to step down.")
    stable_s: float = Field(10.0, gt=0, description="Time below before each step down.")
    shed_sheddable: bool = Field(True, description="Rung 1 acts.")
    cap_output: bool = Field(True, description="Rung 2 acts.")
    use_fallback: bool = Field(True, description="Rung 3 acts.")
    critical_only: bool = Field(True, description="Rung 4 acts.")
    output_cap_tokens: int = Field(512, ge=1, description="max_tokens of Standard at rung 2.")
    fallback_pool: Name | None = Field(None, description="Where Standard goes at rung 3.")

    @field_validator("kv_ratios", "queue_ratios")
    @classmethod
    def _rising(cls, ratios: Rising) -> Rising:
        if ratios[0] <= 0 or list(ratios) != sorted(ratios):
            raise ValueError("must be four rising thresholds above 0")
        return ratios

    def to_core(self) -> policy.BrownoutPolicy:
        """Return the settings as core reads them."""
        return policy.BrownoutPolicy(**self.model_dump())


class BreakerPolicy(Strict):
    """When a replica is left alone, and how many retries a pool may cause."""

    failures: int = Field(5, ge=1, description="Failures in a row that open the breaker.")
    open_s: float = Field(5.0, gt=0, description="Time until a probe; doubles if that fails.")
    open_max_s: float = Field(60.0, gt=0)
    retry_ratio: float = Field(0.2, ge=0, le=1, description="Retries earned per dispatch.")
    retry_reserve: float = Field(32.0, ge=0, description="Retries saved up at most.")

    @model_validator(mode="after")
    def _ordered(self) -> BreakerPolicy:
        if self.open_s > self.open_max_s:
            raise ValueError("open_s must be at most open_max_s")
        return self

    def to_core(self) -> policy.BreakerPolicy:
        """Return the settings as core reads them."""
        return policy.BreakerPolicy(**self.model_dump())


class RoutingSettings(Strict):
    """Numbers of the routing policies; those that the pool's ``routing`` does not read rest."""

    prefix_capacity_blocks: int = Field(
        26_313, ge=1, le=10**7, description="Prompt blocks of 16 tokens remembered per replica."
    )
    prefill_tokens_per_s: float = Field(
        33_000, gt=0, description="New prompt tokens a replica computes per second."
    )
    tokens_per_s: float = Field(
        15_000, gt=0, description="Prompt and output tokens a replica serves per second."
    )
    balance_tokens_per_s: float = Field(
        200_000, gt=0, description="Tokens in flight that weigh as much as a second of waiting."
    )
    kv_barrier_s: float = Field(0.15, ge=0, description="Cost of a half-full KV cache.")
    sticky_hit_ratio: float = Field(
        0.8, gt=0, le=1, description="Share of a prompt cached that makes it stick."
    )
    sticky_gap_s: float = Field(0.3, ge=0, description="Longer wait accepted to stick.")
    session_load_factor: float = Field(
        1.25, ge=1, description="Load over the mean up to which a session keeps its replica."
    )
    adapter_slots: int = Field(4, ge=1, description="Adapters an engine holds at once.")
    adapter_gap_requests: int = Field(16, ge=0)
    imbalance_requests: int = Field(64, ge=0)
    imbalance_factor: float = Field(1.5, ge=1)
    cache_hit_ratio: float = Field(0.5, gt=0, le=1)
    abandon_gap_requests: int = Field(16, ge=0)
    abandon_sigmas: float = Field(2.0, ge=0)
    long_prompt_tokens: int = Field(1_500, ge=1, description="From here on a prompt is long.")
    length_gap_requests: int = Field(24, ge=0)
    queue_weight: float = Field(2.0, ge=0)
    kv_weight: float = Field(2.0, ge=0)
    prefix_weight: float = Field(3.0, ge=0)

    def to_core(self) -> core_settings.RoutingSettings:
        """Return the settings as core reads them."""
        return core_settings.RoutingSettings(**self.model_dump())


class HeavyPool(Strict):
    """Where a pool's long contexts go."""

    pool: Name = Field(description="The pool that takes them; it must serve the same model.")
    threshold_tokens: int = Field(
        ge=1, description="Context above this goes there: prompt plus the output asked for."
    )

    def to_core(self) -> core_pools.HeavyPool:
        """Return the settings as core reads them."""
        return core_pools.HeavyPool(PoolName(self.pool), self.threshold_tokens)


class PromptSettings(Strict):
    """What a router may know of a pool's prompts. Without a tokenizer it uses upper bounds."""

    tokenizer: str | None = Field(
        None, description="A tokenizer.json, or the folder it lies in, on the routers' nodes."
    )
    context_tokens: int | None = Field(
        None, ge=16, description="The engine's max_model_len; null: what its KV cache holds."
    )
    exact_above_tokens: int = Field(
        8192, ge=1, description="Prompts estimated above this are counted with the tokenizer."
    )


class ScalingSettings(Strict):
    """How a pool that is scaled follows its demand; see core/scaling.py for what they do."""

    knee_concurrency: float | None = Field(
        None, gt=0, description="Requests a replica holds at its knee; null: the pool's cap."
    )
    safety_ratio: float = Field(0.85, gt=0, le=1, description="Share of the knee planned with.")
    slowdown_at_knee: float = Field(
        1.0, ge=1, description="How many times longer a request stays at the knee than alone."
    )
    headroom: int = Field(0, ge=0, description="Replicas kept warm above what is needed.")
    drain_s: float = Field(10, gt=0, description="What waits shall be worked off so soon.")
    kv_high_ratio: float = Field(0.9, gt=0, le=1, description="A KV cache this full asks for more.")
    cold_start_s: float = Field(
        120, ge=0, description="How long a replica takes to start, until starts have been seen."
    )
    fast_s: float = Field(15, gt=0, description="Time constant of the quick average of the rate.")
    slow_s: float = Field(60, gt=0, description="Time constant of the slow one.")
    panic_ratio: float = Field(
        2, gt=1, description="The quick average over the slow one that is a panic: no shrinking."
    )
    down_after_s: float = Field(300, gt=0, description="The largest size wanted so lately counts.")
    to_zero: bool = Field(
        False, description="An idle pool may have no replica; its autoscale.min_replicas is 0."
    )
    idle_s: float = Field(600, gt=0, description="An idle pool is put to sleep after so long.")
    forecast: bool = Field(False, description="Remember the rate by time of day, be ready for it.")

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSettings:
        if self.fast_s > self.slow_s:
            raise ValueError("fast_s must be at most slow_s")
        return self

    def to_core(self, cap: int) -> ScalingPolicy:
        """Return the settings as core reads them; ``cap`` is the pool's per replica."""
        given = dict(self)
        forecast, knee = given.pop("forecast"), given.pop("knee_concurrency")
        del given["to_zero"]  # the routers' to know; what the size may be is the engines' to say
        return ScalingPolicy(
            knee_concurrency=knee or float(cap),
            forecast_buckets=FORECAST_BUCKETS if forecast else 0,
            **given,
        )


class SpotLimits(Strict):
    """What may run on spot nodes: nothing that could not end within their notice."""

    max_output_tokens: int = Field(ge=1, description="An answer is cut to so many tokens.")
    max_stream_s: float = Field(
        gt=0, description="An answer may take this long, from its place in the pool on."
    )


class PoolPolicy(Strict):
    """How routers admit to and route within a pool."""

    max_concurrency_per_replica: int = Field(
        64, ge=1, le=4096, description="The knee: requests in flight per replica."
    )
    prefill_knee_tokens: int = Field(
        4096, ge=1, description="The knee: prompt tokens sent to a replica and not yet computed."
    )
    knee_tokens_per_replica: int | None = Field(
        None, ge=1, description="The knee: tokens in flight; null: the KV cache's capacity."
    )
    critical_reserve_ratio: float = Field(
        0.3, ge=0, lt=1, description="Share of the knee kept for Critical."
    )
    sheddable_share_ratio: Ratio = Field(0.2, description="Share of the knee open to Sheddable.")
    sparse_headroom_ratio: float = Field(
        0.125, ge=0, lt=1, description="Share kept for tenants served less than their fair share."
    )
    tenant_concurrency_ratio: float = Field(
        1.0, gt=0, le=1, description="Slots one tenant may hold while others are active."
    )
    tenant_kv_ratio: float = Field(
        0.5, gt=0, le=1, description="KV cache one tenant may hold while others are active."
    )
    queue_capacity: int = Field(256, ge=0, description="Requests of a class waiting in one router.")
    queue_timeout_s: float = Field(30, gt=0, description="A request waits at most this long.")
    hold_without_replica_s: float = Field(
        5, ge=0, description="Requests are held this long while the pool has no replica."
    )
    stale_after_s: float = Field(
        0.3, gt=0, le=30, description="A replica silent for this long counts as saturated."
    )
    lost_after_s: float = Field(60, gt=0, description="A replica silent for this long is dropped.")
    retry_after_min_s: float = Field(1, gt=0)
    retry_after_max_s: float = Field(60, gt=0)
    expected_output_tokens: int = Field(
        256, ge=1, description="Length of an answer before any has been seen."
    )
    early_rejection: bool = Field(
        True, description="Refuse at once what would miss its TTFT target."
    )
    client_throttle: bool = Field(True, description="Refuse clients that ignore Retry-After.")
    ordering: Literal["fair", "arrival"] = Field(
        "fair", description="`arrival`: first come, first served, no classes: the baseline."
    )
    routing: Literal[
        "round_robin",
        "least_loaded",
        "power_of_two",
        "kv_queue",
        "prefix_affinity",
        "session_affinity",
        "adapter_locality",
        "length_groups",
        "cache_aware",
        "abandon_affinity",
        "weighted_score",
    ] = "least_loaded"
    routing_settings: RoutingSettings = RoutingSettings()
    heavy: HeavyPool | None = Field(None, description="Long contexts go to another pool.")
    prompt: PromptSettings = PromptSettings()
    scaling: ScalingSettings = ScalingSettings()
    spot: SpotLimits | None = Field(None, description="Bounds for a pool on spot nodes.")
    critical: CriticalPolicy = CriticalPolicy()
    standard: StandardPolicy = StandardPolicy()
    sheddable: SheddablePolicy = SheddablePolicy()
    fairness: FairnessPolicy = FairnessPolicy()
    brownout: BrownoutPolicy = BrownoutPolicy()
    breaker: BreakerPolicy = BreakerPolicy()

    @model_validator(mode="after")
    def _ordered(self) -> PoolPolicy:
        if self.stale_after_s > self.lost_after_s:
            raise ValueError("stale_after_s must be at most lost_after_s")
        if self.retry_after_min_s > self.retry_after_max_s:
            raise ValueError("retry_after_min_s must be at most retry_after_max_s")
        return self

    def to_core(self) -> policy.PoolPolicy:
        """Return the settings as core reads them."""
        return policy.PoolPolicy(
            **{
                name: value.to_core() if hasattr(value, "to_core") else value
                for name, value in dict(self).items()
                if name not in _ROUTERS_OWN
            }
        )
