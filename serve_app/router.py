"""The Router deployment: the only HTTP ingress, as many replicas as traffic wants.

It wires the gate, the fleet and the endpoints together on its event loop. Pools and
aliases come by ``reconfigure`` and change in place.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from serve_app import ray_env
from serve_app.books import Books
from serve_app.completions import Completions
from serve_app.config import ChannelSettings, GatewayArgs, RouterConfig
from serve_app.control_link import HandleControlLink
from serve_app.core.controller import Controller
from serve_app.core.exchange import RouterId
from serve_app.core.routing import RoutingSettings, routing_by_policy, uses_prefixes
from serve_app.core.scaling import ScalingPolicy
from serve_app.core.types import PoolName
from serve_app.engine.api import Endpoint
from serve_app.engine.channel_router import RouterChannel
from serve_app.engine.replica_directory import DIRECTORY
from serve_app.engine.transport import ChannelTransport, HandleTransport, Transport
from serve_app.fleet import Fleet
from serve_app.gate import Gate
from serve_app.gateway.admin import KeyAdministration
from serve_app.gateway.admin_audit import AuditAdministration
from serve_app.gateway.admin_budgets import BudgetAdministration
from serve_app.gateway.admin_costs import CostAdministration
from serve_app.gateway.admin_prices import PriceAdministration
from serve_app.gateway.admin_usage import UsageAdministration
from serve_app.gateway.front import Front
from serve_app.gateway.http import exception_handlers
from serve_app.keys import KeyTable
from serve_app.limiter import RouterLimits
from serve_app.money import Money
from serve_app.observer import RouterObserver
from serve_app.operations import MetricsCopy, Operations, Readiness
from serve_app.overload import Overload, open_descriptors
from serve_app.peers import Peers
from serve_app.purse_link import PurseLink
from serve_app.rules import Rules, limits_by_path
from serve_app.slices_link import SlicesLink
from serve_app.telemetry.exposition import Family
from serve_app.telemetry.logs import RequestLog, configure, process_stderr
from serve_app.telemetry.uplink import Heartbeat, Tables, Uplink
from serve_app.tickets import Tickets
from serve_app.token_counts import TokenCounter
from serve_app.usage_log import UsageLog

logger = logging.getLogger("headrace.router")

# Without keys a router can only refuse. If Control stays away for longer than this, refusing in
# our own words is better than not being there.
KEYS_WAIT_S = 20.0


class Router:
    """One replica of the gateway."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        stderr = process_stderr()
        configure(stderr)
        self._args = GatewayArgs.model_validate(args)
        self._name = serve.get_replica_context().replica_id.unique_id
        self._shortcomings = ray_env.shortcomings(os.environ)
        for shortcoming in self._shortcomings:
            logger.warning(shortcoming)
        self._observer = RouterObserver(self._name, RequestLog(stderr), time.time)
        self._routing = routing_by_policy(
            RoutingSettings(),
            random.Random(),  # noqa: S311 - a coin toss
        )
        core = Controller(self._routing, RouterId(self._name))
        self._gate = Gate(core, time.monotonic, self._observer.notice)
        self._channel = _channel(self._args.channel)
        self._peers = Peers(self._gate, self._channel)
        self._fleet = Fleet(self._gate, self._connect, DIRECTORY)
        self._control = HandleControlLink(self._args.control.app)
        self._counter = TokenCounter()
        self._tickets = Tickets(
            self._gate, self._counter, self._args.limits, self._observer.prompt_counted
        )
        self._slices = SlicesLink(self._name, self._control, time.monotonic)
        self._rates = RouterLimits(
            time.monotonic,
            self._observer.rate_limited,
            self._slices,
            self._observer.limit_fetched,
        )
        self._usage = UsageLog(
            self._args.journal,
            f"router-{self._name}",
            self._record_usage,
            on_lost=self._usage_lost,
        )
        self._books = Books(
            self._usage, time.monotonic, self._observer.metrics.usage_durable_seconds.observe
        )
        self._purses = PurseLink(self._name, self._control, time.monotonic, time.time)
        self._money = Money(self._purses, self._books, self._observer.budget_refused)
        self._overload = Overload(self._args.limits.loop_lag_s, open_descriptors)
        self._completions = Completions(
            gate=self._gate,
            transport=self._fleet.transport,
            tickets=self._tickets,
            rates=self._rates,
            limits=self._args.limits,
            books=self._books,
            money=self._money,
            overload=self._overload,
            on_audit=self._observer.audit,
            clock=time.monotonic,
        )
        self._keys_known = asyncio.Event()
        self._config = RouterConfig()
        self._scaling: dict[PoolName, ScalingPolicy] = {}
        self._untold_limits: Mapping[str, Any] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._uplink = Uplink(
            self._control,
            beat=self._beat,
            families=self._families,
            heartbeat_period_s=self._args.control.heartbeat_period_s,
            metrics_period_s=self._args.control.metrics_period_s,
            metrics=self._observer.metrics,
            clock=time.monotonic,
            on_tables=self._take_tables,
            on_lag=self._overload.note_lag,
        )
        self._fleet.start()
        self._uplink.start()
        self._slices.start()
        self._usage.start()
        self._purses.start()
        # Serve sends nothing here before this returns; other routers know the keys.
        try:
            async with asyncio.timeout(KEYS_WAIT_S):
                await self._keys_known.wait()
        except TimeoutError:
            logger.warning("control is away, no keys are known: every request is refused")

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take new pools and aliases; nothing in flight is touched.

        A coroutine although it awaits nothing: Serve runs a plain method on a thread.
        """
        config = RouterConfig.model_validate(user_config)
        pools = {PoolName(name): policy.to_core() for name, policy in config.pools.items()}
        self._fleet.connect(pools)
        self._gate.configure(pools)
        prefixes = {name: uses_prefixes(self._routing(pool)) for name, pool in pools.items()}
        rules = Rules.of(config, prefixes)
        self._counter.configure(
            {name: rule.tokenizer for name, rule in rules.pools.items() if rule.tokenizer}
        )
        self._completions.configure(rules)
        for name in self._config.pools.keys() - config.pools.keys():
            self._observer.metrics.forget_pool(PoolName(name))
        self._config = config
        self._scaling = {
            PoolName(name): pool.scaling.to_core(pool.max_concurrency_per_replica)
            for name, pool in config.pools.items()
        }
        self._untold_limits = limits_by_path(config)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Build the HTTP application; Serve calls this once, after the constructor."""
        operations = Operations(
            completions=self._completions,
            readiness=self._readiness,
            metrics=MetricsCopy(self._control.scrape, time.monotonic),
            metrics_public=self._args.metrics_public,
            started_at_s=time.time(),
        )
        administration = KeyAdministration(self._completions.caller, self._control)
        usage = UsageAdministration(self._completions.caller, self._control)
        costs = CostAdministration(self._completions.caller, self._control)
        budgets = BudgetAdministration(self._completions.caller, self._control)
        prices = PriceAdministration(self._completions.caller, self._control)
        audit = AuditAdministration(self._completions.caller, self._control)
        posts: dict[str, ASGIApp] = {
            "/v1/chat/completions": self._completions.endpoint(Endpoint.CHAT),
            "/v1/completions": self._completions.endpoint(Endpoint.COMPLETIONS),
        }
        application = Starlette(
            routes=[
                *(Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()),
                Route("/v1/models", operations.models, methods=["GET"]),
                Route("/v1/models/{name:path}", operations.model, methods=["GET"]),
                Route("/health", operations.health, methods=["GET"]),
                Route("/ready", operations.ready, methods=["GET"]),
                Route("/metrics", operations.metrics, methods=["GET"]),
                *administration.routes(),
                *usage.routes(),
                *costs.routes(),
                *budgets.routes(),
                *prices.routes(),
                *audit.routes(),
            ],
            exception_handlers=exception_handlers(),
        )
        # A redirected POST would have to send its body twice; an unknown path is a 404.
        application.router.redirect_slashes = False
        # What the process is made of by now stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        return Front(posts, application)

    async def check_health(self) -> None:
        """Serve's probe; answering at all is the check."""

    async def __del__(self) -> None:
        if self._telling is not None:
            self._telling.cancel()
        await self._uplink.stop()
        await self._slices.stop()
        await self._fleet.stop()
        await self._peers.stop()
        self._channel.close()
        self._gate.close()
        self._counter.close()
        await self._usage.stop()
        await self._purses.stop()

    async def _record_usage(self, payloads: list[bytes]) -> None:
        await self._control.record_usage(payloads)
        self._money.acknowledge(payloads)

    def _usage_lost(self, payloads: Sequence[bytes]) -> None:
        self._money.lose(payloads)

    def _connect(self, pool: PoolName) -> Transport:
        """Return a transport to a pool's engines, which need not be deployed yet."""
        handle = serve.get_deployment_handle("Engine", app_name=f"pool-{pool}", _check_exists=False)
        # Serve builds a handle's request router lazily; the fleet needs the replica set now.
        handle._init()
        if self._args.channel.transport == "handle":
            return HandleTransport(handle)
        return ChannelTransport(handle, self._channel)

    def _readiness(self) -> Readiness:
        keys = self._completions.keys
        return Readiness(
            keys_loaded=keys is not None,
            limits_loaded=self._slices.known,
            pools={name: self._gate.replicas(PoolName(name)) for name in self._config.pools},
            fast_path=ray_env.fast_path(os.environ),
            notes=self._shortcomings,
            control_away=self._uplink.control_is_away,
            sleeping=frozenset(
                name for name, pool in self._config.pools.items() if pool.scaling.to_zero
            ),
        )

    def _beat(self) -> Heartbeat:
        self._fleet.wake_empty()
        keys = self._completions.keys
        version = -1 if keys is None else keys.version
        address = self._channel.address
        return Heartbeat(
            process=self._name,
            role="router",
            keys_version=version,
            channel=(address.endpoint, address.server_key),
            # Keys and prices come together: nobody is served before there are both.
            prices_version=-1 if keys is None else self._books.prices.version,
            budgets_version=self._purses.list.version,
            demand={
                pool: (self._gate.demand(pool), policy) for pool, policy in self._scaling.items()
            },
        )

    def _families(self) -> Mapping[str, Family]:
        for name in self._config.pools:
            pool = PoolName(name)
            self._observer.pool(pool, self._gate, self._tickets.error_ratio(pool))
        self._observer.metrics.router_peers.set(self._peers.count)
        self._observer.metrics.usage_backlog.set(self._usage.backlog)
        self._observer.metrics.bodies_bytes.set(self._completions.bodies.held_bytes)
        self._observer.metrics.open_descriptors.set(self._overload.open_descriptors)
        return self._observer.families()

    async def _tell_limits(self, limits: Mapping[str, Any]) -> None:
        """Tell Control what limits are in force, for the audit trail; again if it fails."""
        try:
            await self._control.note_limits(limits)
        except Exception as error:  # noqa: BLE001  # away in whatever way
            logger.info("limits are not in the audit trail yet: %.200s", error)
            return
        if self._untold_limits is limits:
            self._untold_limits = None

    def _take_tables(self, tables: Tables) -> None:
        if self._untold_limits is not None and (self._telling is None or self._telling.done()):
            self._telling = asyncio.create_task(self._tell_limits(self._untold_limits))
        self._peers.know(tables.routers)
        if tables.budgets is not None:
            self._purses.list = tables.budgets
        if tables.prices is not None:
            self._books.prices = tables.prices
        if tables.keys is not None:
            self._completions.keys = KeyTable(tables.keys, tables.keys_version)
            self._keys_known.set()


def _channel(settings: ChannelSettings) -> RouterChannel:
    """Return this router's end of the channel; the other routers use it in any case."""
    first, last = settings.ports
    host = ray.util.get_node_ip_address()
    ports = range(first, last + 1)
    return RouterChannel(host, ports, settings.stream_buffer_bytes, coalesce=settings.coalesce)
