"""The Engine deployment: one engine per replica, its load pushed to every router.

Routers subscribe with a call that stays open. Control hears from the replica through
heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
from prometheus_client import REGISTRY
from ray import serve

from serve_app import __version__, models
from serve_app.autoscaling import statistics
from serve_app.config import PoolArgs, SimSettings
from serve_app.control_link import HandleControlLink
from serve_app.core.calendar import NS_PER_S
from serve_app.core.demand import EngineNews, Wanted
from serve_app.core.types import Outcome, PoolName, ReplicaId, ReplicaView
from serve_app.engine.api import (
    Engine,
    EngineInfo,
    GenerateCall,
    GenerateItem,
    Metered,
    WatchCall,
)
from serve_app.engine.channel_engine import EngineChannel
from serve_app.engine.drain import Drain
from serve_app.engine.eviction import EvictionNotice, EvictionWatch, sources_of
from serve_app.engine.health import EngineHealth
from serve_app.engine.load_publisher import LoadPublisher
from serve_app.engine.period_reporter import PeriodReporter, Place
from serve_app.engine.ray_node import RayNode
from serve_app.telemetry.exposition import Family, render_families
from serve_app.telemetry.logs import configure, process_stderr
from serve_app.telemetry.metrics import EngineMetrics
from serve_app.telemetry.uplink import Heartbeat, Tables, Uplink
from serve_app.usage import Charge, UsageRecord, Witness
from serve_app.usage_log import UsageLog

logger = logging.getLogger("headrace.engine")

NODE_VARIABLE = "HEADRACE_NODE"
NODE_POLL_S = 1.0
TELL_RAY_TRIES = 5
TELL_RAY_AGAIN_S = 1.0


def build_engine(args: PoolArgs, replica: ReplicaId) -> Engine:
    """Build the engine that ``args.engine`` describes; it is not started.

    Raises:
        ValueError: the model cannot be found; the message says how to get it.
    """
    pool = PoolName(args.name)
    if isinstance(args.engine, SimSettings):
        from serve_app.engine.sim import SimEngine

        return SimEngine(args.engine, pool, replica, time.monotonic)
    from serve_app.engine.vllm import VllmEngine

    path = models.resolve(args.engine.model, models.default_cache_dir())
    return VllmEngine(args.engine, Path(path), pool, replica, time.monotonic)


def _whole_start(info: EngineInfo, process_s: float) -> EngineInfo:
    """Return an engine's start with what its process took before: Python, Ray and our modules.

    A worker that Ray had kept ready was born before it was wanted; so long it then counts.
    """
    stages_s = {"process": process_s, **info.stages_s}
    return replace(info, start_s=process_s + info.start_s, stages_s=stages_s)


class EngineReplica:
    """One replica of a pool. Its methods are called through Serve handles only."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the engine; Serve sends requests once this returns."""
        configure(process_stderr())
        self._process_s = max(0.0, time.time() - psutil.Process().create_time())
        self._args = PoolArgs.model_validate(args)
        self._replica = ReplicaId(serve.get_replica_context().replica_id.unique_id)
        # The default registry, since vLLM registers its own metrics there.
        self._metrics = EngineMetrics(REGISTRY)
        self._metrics.build_info.labels(__version__, ray.__version__, "engine").set(1)
        born_s = time.monotonic()
        self._engine = build_engine(self._args, self._replica)
        link = HandleControlLink(self._args.control.app)
        self._usage = UsageLog(self._args.journal, f"engine-{self._replica}", link.record_usage)
        self._engine.on_metered(self._record)
        self._metrics.engine_started(await self._start_engine())
        self._metrics.engine_simulated.set(isinstance(self._args.engine, SimSettings))
        self._health = EngineHealth(self._engine, self._args.stalled_after_s, time.monotonic)
        self._periods = PeriodReporter(
            self._place(),
            self._engine.costs,
            self._usage.note,
            clock=time.monotonic,
            wall_ns=time.time_ns,
            born_s=born_s,
        )
        self._channel = self._open_channel()
        self._load = LoadPublisher(
            self._engine, self._health.check, self._channel, self._args.snapshot_period_s
        )
        self._load.start()
        self._node = RayNode()
        self._drain = Drain(
            self._engine, tell=self._announce, settle=self._settle, clock=time.monotonic
        )
        self._evictions = self._watch_node()
        self._uplink = Uplink(
            link,
            beat=self._beat,
            families=self._families,
            heartbeat_period_s=self._args.control.heartbeat_period_s,
            metrics_period_s=self._args.control.metrics_period_s,
            metrics=self._metrics,
            clock=time.monotonic,
            on_tables=self._take_tables,
        )
        self._wanted: Wanted | None = None
        self._uplink.start()
        self._usage.start()
        self._periods.start()
        self._evictions.start()

    async def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        """Run one request on this replica's engine; see Engine.generate."""
        async with aclosing(self._engine.generate(call)) as items:
            async for item in items:
                yield item

    async def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        """Yield this replica's load until the router goes away; see LoadPublisher."""
        async with aclosing(self._load.watch()) as views:
            async for view in views:
                yield view

    async def attend(self, call: WatchCall) -> None:
        """Send this replica's load to ``call.router`` until either goes away."""
        await self._load.attend(call)

    async def wake(self) -> None:
        """Do nothing: a router that waits for a first replica calls this, so that one starts."""

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve how many replicas Control wants of this pool."""
        wanted = self._wanted
        if wanted is None:
            return statistics(None, 0.0)
        return statistics(wanted.replicas, wanted.decided_at_s)

    async def check_health(self) -> None:
        """Serve's health probe: raises when the engine can no longer generate."""
        await self._health.check()

    async def __del__(self) -> None:
        await self._evictions.stop()
        await self._drain.stop()
        await self._load.stop()
        await self._channel.close()
        await self._engine.stop()
        await self._uplink.stop()
        await self._periods.stop()
        await self._usage.stop()

    async def _start_engine(self) -> EngineInfo:
        """Start the engine, saying in the log what comes of it: Serve says it late and long."""
        pool = self._args.name
        try:
            info = _whole_start(await self._engine.start(), self._process_s)
        except Exception as error:
            hopeless = isinstance(error, ValueError)
            fields = {"pool": pool, "reason": str(error), "hopeless": hopeless}
            logger.error("engine failed to start", extra=fields)
            raise
        stages_s = {stage: round(each_s, 3) for stage, each_s in info.stages_s.items()}
        started = {"stages_s": stages_s, "kv_tokens": info.kv_tokens_capacity}
        logger.info("engine started", extra={"pool": pool, "slots": info.slots, **started})
        return info

    def _open_channel(self) -> EngineChannel:
        """Take calls from routers: as many as Serve would let through."""
        first, last = self._args.channel_ports
        return EngineChannel(
            self._replica,
            ray.util.get_node_ip_address(),
            range(first, last + 1),
            self._engine.generate,
            calls_max=self._args.calls_max,
            extend=self._engine.extend,
        )

    def _watch_node(self) -> EvictionWatch:
        spot = self._args.spot
        sources = [] if spot is None else sources_of(spot, time.time)
        poll_s = NODE_POLL_S if spot is None else spot.poll_s
        return EvictionWatch([self._node, *sources], self._on_eviction, poll_s)

    def _on_eviction(self, notice: EvictionNotice) -> None:
        left_s = self._args.drain_timeout_s
        if notice.gone_at_s is not None:
            left_s = notice.gone_at_s - time.time()
        if self._args.spot is not None:
            # Ray knows how long it would wait, not when the pod or the machine is killed.
            left_s = min(left_s, self._args.spot.notice_s)
        self._drain.begin(left_s, notice.source)

    async def _announce(self, notice_s: float, source: str) -> None:
        """Tell routers that this replica takes nothing new, and Ray if it does not know."""
        await self._load.tell()
        if source == self._node.name:
            return
        for left in reversed(range(TELL_RAY_TRIES)):
            try:
                await self._node.drain(notice_s, f"evicted, says {source}")
                return
            except Exception as error:  # noqa: BLE001  # what runs here is drained all the same
                logger.warning("Ray was not told of the eviction: %.200s", error)
            if left:
                await asyncio.sleep(TELL_RAY_AGAIN_S)

    async def _settle(self, timeout_s: float) -> int:
        """Have what is known of requests and of this replica's time in the ledger."""
        self._periods.report()
        return await self._usage.flush(timeout_s)

    def _record(self, metered: Metered) -> None:
        self._metrics.engine_metered(metered)
        if metered.charge is not None:
            self._usage.note(self._witness(metered, metered.charge))
        if metered.outcome is not Outcome.COMPLETED:
            # The engine's word on what it generated for nobody, and on when it stopped.
            logger.info(
                "generation ended early",
                extra={
                    "request_id": metered.request_id,
                    "outcome": metered.outcome.value,
                    "generated_tokens": metered.usage.completion_tokens,
                },
            )

    def _witness(self, metered: Metered, charge: Charge) -> UsageRecord:
        """Return this engine's own account of what it generated."""
        usage, timings = metered.usage, metered.timings
        return UsageRecord(
            charge=charge,
            witness=Witness.ENGINE,
            attempt=metered.attempt,
            outcome=metered.outcome.value,
            ended_at_s=time.time(),
            prompt_tokens=usage.prompt_tokens,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            output_tokens=usage.completion_tokens,
            replica=self._replica,
            queued_s=timings.queued_s,
            first_token_s=timings.first_token_s,
            duration_s=timings.total_s,
            engine_ns=round(usage.engine_s * NS_PER_S),
            engine_hour=self._periods.hour,
            kv_block_us=usage.kv_block_us,
        )

    def _place(self) -> Place:
        args = self._args
        return Place(
            self._replica,
            args.name,
            # Kubernetes' name of the node, which bills bear, is not the pod's own.
            os.environ.get(NODE_VARIABLE) or platform.node(),
            args.instance or args.name,
            args.replicas.num_gpus,
        )

    def _beat(self) -> Heartbeat:
        view = self._engine.snapshot()
        news = EngineNews(view.pool, view.kv_usage_ratio, self._args.replicas.bounds)
        return Heartbeat(process=self._replica, role="engine", pool=self._args.name, engine=news)

    def _take_tables(self, tables: Tables) -> None:
        self._wanted = tables.wanted

    def _families(self) -> Mapping[str, Family]:
        self._metrics.engine_load(self._engine.snapshot())
        self._metrics.engine_step_wait_seconds.set(self._health.waited_s)
        self._metrics.engine_costs(self._engine.costs())
        return render_families(REGISTRY, {"pool": self._args.name, "replica": self._replica})


class Pool:
    """The pool application's ingress: it has no replicas and serves nothing.

    Serve refuses a custom request router on an application's ingress deployment, and
    gives the ingress HTTP ports; the engines must be neither.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
