"""Every metric of Headrace, declared once.

Names begin with ``headrace_`` and end in their unit; labels come from closed sets (pools
of the configuration, classes, outcomes, reasons). Tenants are in the ledger, not here.
What a process is (``pool``, ``replica``, ``process``) is added when it renders its
registry, so an engine's metrics carry no such label themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from serve_app.core.scaling import Decision
from serve_app.core.types import Outcome, PoolName, PriorityClass, ReplicaView, Usage
from serve_app.telemetry.cost_metrics import CostMetrics, EngineCosts
from serve_app.telemetry.policy_metrics import PolicyMetrics

LATENCY_BUCKETS_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0),
)
DURATION_BUCKETS_S = (
    *(0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    *(20.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
TOKEN_INTERVAL_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04),
    *(0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0),
)
LOOP_LAG_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

NO_POOL = ""
"""The ``pool`` of a request that was refused before its pool was known."""


class EngineStarted(Protocol):
    """What a started engine says of itself. Times in seconds, by stage."""

    @property
    def kv_tokens_capacity(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def start_s(self) -> float: ...
    @property
    def stages_s(self) -> Mapping[str, float]: ...


class EngineMetered(Protocol):
    """What an engine generated for one request, however it ended."""

    @property
    def usage(self) -> Usage: ...
    @property
    def outcome(self) -> Outcome: ...


class ProcessMetrics:
    """What every process says of itself, in the registry it is given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.build_info = Gauge(
            "headrace_build_info",
            "1, labelled with the versions that run.",
            ("version", "ray_version", "role"),
            registry=registry,
        )
        self.event_loop_lag_seconds = Histogram(
            "headrace_event_loop_lag_seconds",
            "How late the process's event loop woke a timer.",
            buckets=LOOP_LAG_BUCKETS_S,
            registry=registry,
        )
        self.control_heartbeat_age_seconds = Gauge(
            "headrace_control_heartbeat_age_seconds",
            "Time since this process last reached Control.",
            registry=registry,
        )
        self.usage_backlog = Gauge(
            "headrace_usage_backlog",
            "Usage records of this process that the ledger has not committed yet.",
            registry=registry,
        )


class RouterMetrics(ProcessMetrics):
    """The metrics of a router: requests, admission, delivery."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.usage_durable_seconds = Histogram(
            "headrace_usage_durable_seconds",
            "How long the end of a completed response waited for its usage to be on the disk.",
            buckets=LOOP_LAG_BUCKETS_S,
            registry=registry,
        )
        self.bodies_bytes = Gauge(
            "headrace_bodies_bytes",
            "Bytes of the request bodies that this router holds.",
            registry=registry,
        )
        self.open_descriptors = Gauge(
            "headrace_open_descriptors",
            "Descriptors that this process has open.",
            registry=registry,
        )
        self._declare_requests()
        self._declare_load()
        self.policies = PolicyMetrics(registry)

    def _declare_requests(self) -> None:
        registry, by_class = self.registry, ("pool", "class")
        self.requests_total = Counter(
            "headrace_requests_total",
            "Requests that ended, by outcome: completed, cancelled, failed, rejected.",
            (*by_class, "outcome"),
            registry=registry,
        )
        self.responses_total = Counter(
            "headrace_responses_total",
            "HTTP responses of the completion endpoints by status; 499 is a client that left.",
            ("endpoint", "status"),
            registry=registry,
        )
        self.rejected_total = Counter(
            "headrace_rejected_total",
            "Requests refused before an engine saw them, by reason.",
            (*by_class, "reason"),
            registry=registry,
        )
        self.request_duration_seconds = Histogram(
            "headrace_request_duration_seconds",
            "From the request's arrival to the last byte of a completed response.",
            by_class,
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )
        self.time_to_first_token_seconds = Histogram(
            "headrace_time_to_first_token_seconds",
            "From the request's arrival to the first byte of its output.",
            by_class,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.time_per_output_token_seconds = Histogram(
            "headrace_time_per_output_token_seconds",
            "Mean interval between the output tokens of a completed request.",
            by_class,
            buckets=TOKEN_INTERVAL_BUCKETS_S,
            registry=registry,
        )
        self.queue_wait_seconds = Histogram(
            "headrace_queue_wait_seconds",
            "From a request's arrival in the queue to its dispatch to an engine.",
            by_class,
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.tokens_total = Counter(
            "headrace_tokens_total",
            "Tokens by kind: input, cached_input (a part of input), output (delivered), "
            "wasted (generated for requests that did not complete).",
            ("pool", "kind"),
            registry=registry,
        )
        self.client_disconnects_total = Counter(
            "headrace_client_disconnects_total",
            "Clients that went away before their response ended.",
            ("pool",),
            registry=registry,
        )
        self.stream_errors_total = Counter(
            "headrace_stream_errors_total",
            "Responses that had begun and ended with an error.",
            ("pool",),
            registry=registry,
        )
        self.retries_total = Counter(
            "headrace_retries_total",
            "Requests moved to another replica before their first byte.",
            ("pool",),
            registry=registry,
        )
        self.continuations_total = Counter(
            "headrace_continuations_total",
            "Streams cut by the loss of their engine: `continued` elsewhere, or why not.",
            ("pool", "outcome"),
            registry=registry,
        )
        self.notices_total = Counter(
            "headrace_notices_total",
            "Events of the admission core that an operator wants to see, by kind.",
            ("pool", "kind"),
            registry=registry,
        )

    def _declare_load(self) -> None:
        registry = self.registry
        self.queue_depth = Gauge(
            "headrace_queue_depth",
            "Requests waiting in this router for an engine.",
            ("pool", "class"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "headrace_in_flight",
            "Requests of this router that an engine is serving.",
            ("pool",),
            registry=registry,
        )
        self.replicas = Gauge(
            "headrace_replicas",
            "Engine replicas that this router can dispatch to.",
            ("pool",),
            registry=registry,
        )
        self.router_peers = Gauge(
            "headrace_router_peers",
            "Other routers that this one shares capacity with.",
            registry=registry,
        )
        self.snapshot_age_seconds = Gauge(
            "headrace_snapshot_age_seconds",
            "Age of the oldest load snapshot that this router holds of a pool's replicas.",
            ("pool",),
            registry=registry,
        )

    def pool_load(
        self,
        pool: PoolName,
        *,
        queued: Mapping[PriorityClass, int],
        in_flight: int,
        replicas: int,
        snapshot_age_s: float = 0.0,
    ) -> None:
        """Set a router's gauges of one pool; classes not in ``queued`` have nobody waiting."""
        for priority_class in PriorityClass:
            depth = queued.get(priority_class, 0)
            self.queue_depth.labels(pool, class_label(priority_class)).set(depth)
        self.in_flight.labels(pool).set(in_flight)
        self.replicas.labels(pool).set(replicas)
        self.snapshot_age_seconds.labels(pool).set(snapshot_age_s)

    def forget_pool(self, pool: PoolName) -> None:
        """Drop the gauges of a pool that is no longer configured; counters stay."""
        for priority_class in PriorityClass:
            self.queue_depth.remove(pool, class_label(priority_class))
        for gauge in (self.in_flight, self.replicas, self.snapshot_age_seconds):
            gauge.remove(pool)
        self.policies.forget_pool(pool)


class EngineMetrics(ProcessMetrics):
    """The metrics of an engine replica, vLLM's own aside.

    A class of their own: a gauge without labels shows 0 from the moment it is declared,
    and a router has no engine to show.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self._declare_engine()
        # Every request counts in them: finding a metric's child costs more than counting.
        self._requests = cache(self.engine_requests_total.labels)
        self._tokens = cache(self.engine_tokens_total.labels)
        self._preemptions_seen = 0
        self._costs: CostMetrics | None = None

    def _declare_engine(self) -> None:
        registry = self.registry
        self.engine_running = Gauge(
            "headrace_engine_running", "Requests in the engine's batch.", registry=registry
        )
        self.engine_waiting = Gauge(
            "headrace_engine_waiting", "Requests in the engine's own queue.", registry=registry
        )
        self.engine_slots = Gauge(
            "headrace_engine_slots", "Requests the engine runs at once.", registry=registry
        )
        self.engine_kv_usage_ratio = Gauge(
            "headrace_engine_kv_usage_ratio", "Used share of the KV cache.", registry=registry
        )
        self.engine_kv_capacity_tokens = Gauge(
            "headrace_engine_kv_capacity_tokens",
            "Tokens of context that the KV cache holds.",
            registry=registry,
        )
        self.engine_in_flight_tokens = Gauge(
            "headrace_engine_in_flight_tokens",
            "Tokens of the requests in the engine, by class.",
            ("class",),
            registry=registry,
        )
        self.engine_preemptions_total = Counter(
            "headrace_engine_preemptions_total",
            "Requests the engine interrupted because the KV cache was full.",
            registry=registry,
        )
        self.engine_requests_total = Counter(
            "headrace_engine_requests_total",
            "Requests that ended in the engine, by outcome.",
            ("outcome",),
            registry=registry,
        )
        self.engine_tokens_total = Counter(
            "headrace_engine_tokens_total",
            "Tokens as the engine counted them, by kind: input, cached_input, output, wasted.",
            ("kind",),
            registry=registry,
        )
        self.start_seconds = Gauge(
            "headrace_start_seconds",
            "How long the engine's start took, by stage; stage `total` is the whole.",
            ("stage",),
            registry=registry,
        )
        self.engine_step_wait_seconds = Gauge(
            "headrace_engine_step_wait_seconds",
            "How long requests have been in the engine without a step of it; 0 as a rule.",
            registry=registry,
        )
        self.engine_draining = Gauge(
            "headrace_engine_draining",
            "1 while the replica takes nothing new since its node is taken away.",
            registry=registry,
        )
        self.engine_simulated = Gauge(
            "headrace_engine_simulated", "1 for the simulated engine.", registry=registry
        )
        self.replica_up = Gauge(
            "headrace_replica_up", "1 while the engine can generate.", registry=registry
        )

    def engine_started(self, started: EngineStarted) -> None:
        """Record what an engine turned out to be and how long each stage of its start took."""
        for stage, duration_s in started.stages_s.items():
            self.start_seconds.labels(stage).set(duration_s)
        self.start_seconds.labels("total").set(started.start_s)
        self.engine_slots.set(started.slots)
        self.engine_kv_capacity_tokens.set(started.kv_tokens_capacity)
        self.replica_up.set(1)

    def engine_load(self, view: ReplicaView) -> None:
        """Set the engine's gauges from a load snapshot.

        The view counts preemptions for the engine's life; a count below the last one is
        a restarted engine, whose preemptions are all new.
        """
        self.engine_running.set(view.running)
        self.engine_waiting.set(view.waiting)
        self.engine_draining.set(view.draining)
        self.engine_kv_usage_ratio.set(view.kv_usage_ratio)
        for priority_class, tokens in zip(PriorityClass, view.in_flight_tokens, strict=True):
            self.engine_in_flight_tokens.labels(class_label(priority_class)).set(tokens)
        restarted = view.preemptions_total < self._preemptions_seen
        before = 0 if restarted else self._preemptions_seen
        self.engine_preemptions_total.inc(view.preemptions_total - before)
        self._preemptions_seen = view.preemptions_total

    def engine_costs(self, costs: EngineCosts | None) -> None:
        """Record where the engine's time went.

        An engine that does not measure it (None) shows no such metric, instead of zeros.
        """
        if costs is None:
            return
        if self._costs is None:
            self._costs = CostMetrics(self.registry)
        self._costs.record(costs)

    def engine_metered(self, metered: EngineMetered) -> None:
        """Count a request that ended in the engine, and its tokens."""
        usage = metered.usage
        completed = metered.outcome is Outcome.COMPLETED
        self._requests(metered.outcome.value).inc()
        self._tokens("input").inc(usage.prompt_tokens)
        self._tokens("cached_input").inc(usage.cached_prompt_tokens)
        self._tokens("output" if completed else "wasted").inc(usage.completion_tokens)


class ControlMetrics(ProcessMetrics):
    """The metrics of Control: who reports to it, what it hands out."""

    def __init__(self, registry: CollectorRegistry) -> None:
        super().__init__(registry)
        self.processes = Gauge(
            "headrace_control_processes",
            "Processes that report to Control, by role.",
            ("role",),
            registry=registry,
        )
        self.keys = Gauge(
            "headrace_control_keys",
            "API keys in the table that routers are given, revoked ones included.",
            registry=registry,
        )

        self.pool_replicas_wanted = Gauge(
            "headrace_pool_replicas_wanted",
            "Replicas decided for a pool that is scaled, starting ones included.",
            ("pool",),
            registry=registry,
        )
        self.pool_cold_start_seconds = Gauge(
            "headrace_pool_cold_start_seconds",
            "From a replica being wanted to its being there: seen, or scaling.cold_start_s.",
            ("pool",),
            registry=registry,
        )
        self.pool_replicas_needed = Gauge(
            "headrace_pool_replicas_needed",
            "Replicas the demand asks for, by Little's law, before windows, steps and bounds.",
            ("pool",),
            registry=registry,
        )

    def sized(self, pool: PoolName, decision: Decision, cold_start_s: float) -> None:
        """Set the gauges of a pool's size and of how long it is taken to grow by one."""
        self.pool_cold_start_seconds.labels(pool).set(cold_start_s)
        self.pool_replicas_wanted.labels(pool).set(decision.replicas)
        self.pool_replicas_needed.labels(pool).set(decision.needed)

    def known(self, roles: Iterable[str], keys: int) -> None:
        """Set the gauges: the role of every process that reports, and how many keys there are."""
        self.processes.clear()
        for role in roles:
            self.processes.labels(role).inc()
        self.keys.set(keys)


def class_label(priority_class: PriorityClass | None) -> str:
    """Return the ``class`` label of a class; empty where the class was never known."""
    return "" if priority_class is None else priority_class.name.lower()
