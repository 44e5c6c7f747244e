"""The Control deployment: what must be decided or kept once.

Today: the key table (read from the database, handed to routers by heartbeat) and the
metrics of the whole application (each process renders its own; Control concatenates).
No request waits for Control; when it is away, routers work on what they hold.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from serve_app.bill_reader import BillReader
from serve_app.changes import Actor, Change, ChangeQuery, Reversal, Via
from serve_app.config import ControlArgs
from serve_app.control_link import living_replicas
from serve_app.core.budget import Account, Balance, Budget, BudgetKey, Line
from serve_app.core.demand import EngineNews
from serve_app.core.pricing import PriceBook, RateCard
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.cost_watch import CostWatch
from serve_app.errors import StoreUnavailable
from serve_app.granter import GrantDesk
from serve_app.journal import Sweeper
from serve_app.keys import KeyRecord, KeyTable, KeyWish, bootstrap_record
from serve_app.ledger.budgets import BudgetStore
from serve_app.ledger.database import Database
from serve_app.ledger.grants import GrantStore
from serve_app.ledger.insights import insight
from serve_app.ledger.opencost import OpenCost
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.store import KeyStore
from serve_app.ledger.trail import Trail
from serve_app.ledger.usage import UsageLedger
from serve_app.ledger.writer import LedgerWriter
from serve_app.observer import describe_build
from serve_app.periodic import Periodic
from serve_app.price_file import BookLine
from serve_app.scaler import Scaler
from serve_app.telemetry.bill_metrics import BillMetrics
from serve_app.telemetry.exposition import Family, merge, render_families
from serve_app.telemetry.logs import configure, process_stderr
from serve_app.telemetry.metrics import ControlMetrics
from serve_app.telemetry.spending_metrics import SpendingMetrics
from serve_app.telemetry.uplink import Heartbeat, Tables
from serve_app.treasury import MoneyBell, Treasury
from serve_app.usage_log import journal_folder
from serve_app.usage_report import UsageQuery

logger = logging.getLogger("headrace.control")


@dataclass(slots=True)
class _Process:
    """What Control remembers of a process that reports to it."""

    beat: Heartbeat
    heard_at_s: float
    families: Mapping[str, Family]


# What a process told counts for so long where it is about now: three missed heartbeats.
SILENT_S = 3.5


class Control:
    """One replica; its methods are called through Serve handles."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        configure(process_stderr())
        self._args = ControlArgs.model_validate(args)
        database = self._database = Database(self._args.database)
        self._store = KeyStore(database)
        logger.info("keys are kept in %s", self._store.place)
        self._bootstrap = os.environ.get("HEADRACE_BOOTSTRAP_KEY")
        self._refreshing = asyncio.Lock()
        self._processes: dict[str, _Process] = {}
        self._metrics = ControlMetrics(CollectorRegistry())
        self._scaler = Scaler(time.monotonic, time.time, self._metrics.sized)
        describe_build(self._metrics, "control")
        self._table = await asyncio.to_thread(self._read_table)
        self._price_store = PriceStore(database)
        self._prices = await asyncio.to_thread(self._price_store.current)
        self._trail = Trail(database)
        self._ledger = UsageLedger(database, self._price_store)
        self._writer = LedgerWriter(self._ledger)
        # Journals of processes that died on this node, a router's or an engine's.
        self._sweeper = Sweeper(journal_folder(self._args.journal), self.record_usage)
        self._sweeper.start()
        self._grants = GrantDesk(
            GrantStore(database), time.monotonic, self._args.forget_after_s, living_replicas
        )
        await self._grants.begin()
        granter = self._grants.granter
        self._treasury = Treasury(
            BudgetStore(database),
            time.monotonic,
            granter.routers,
            lambda: granter.epoch,
            living_replicas,
        )
        await self._treasury.follow()
        # A look at every budget takes long where there are many; a revoked key does not wait.
        failed = "budgets cannot be read; they stay as they are"
        self._following = Periodic(
            self._treasury.follow, self._args.follow_period_s, logger, failed
        )
        self._following.start()
        self._bills = self._read_bills()
        spending = SpendingMetrics(self._metrics.registry)
        self._costs = CostWatch(database, self._args.costs, spending, time.time)
        self._costs.start()
        self._watch = asyncio.create_task(self._follow_store())

    async def heartbeat(self, beat: Heartbeat) -> Tables:
        """Take a process's heartbeat; return the key table if it holds another version."""
        known = self._processes.get(beat.process)
        families = known.families if known is not None else {}
        self._processes[beat.process] = _Process(beat, time.monotonic(), families)
        if beat.role == "router":
            self._grants.heard(beat.process)
        self._scaler.hear(beat.process, beat.demand)
        # Heartbeats come many times a second, and who was heard of is a look at every process.
        if self._scaler.due:
            self._scaler.decide(self._heard("router"), self._engines())
        routers = self._routers() if beat.channel is not None else {}
        keys, prices, budgets = self._table, self._prices, self._treasury.list
        return Tables(
            keys.version,
            None if beat.keys_version in (None, keys.version) else keys.records,
            routers,
            None if beat.prices_version in (None, prices.version) else prices,
            None if beat.budgets_version in (None, budgets.version) else budgets,
            None if beat.engine is None else self._scaler.wanted(beat.engine.pool),
        )

    async def record_usage(self, payloads: list[bytes]) -> None:
        """Return when the ledger has committed every record in ``payloads``."""
        await self._writer.write(payloads)

    async def exchange_slices(self, message: Message) -> Reply:
        """Give and take parts of limits; see core/slices.py."""
        return await self._grants.exchange(message)

    async def slices_bell(self, router: str) -> Bell:
        """Tell a router, as soon as there is something, what others want of its parts."""
        return await self._grants.bell(router)

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        """Lend a router money of budgets; see core/budget.py."""
        return await self._treasury.lend(router, accounts)

    async def money_bell(self, router: str) -> MoneyBell:
        """Tell a router, as soon as there is something, what others lack that it holds."""
        return await self._treasury.bell(router)

    async def report_metrics(self, process: str, families: Mapping[str, Family]) -> None:
        """Keep the latest rendered metrics of a process that has sent a heartbeat."""
        known = self._processes.get(process)
        if known is not None:
            known.families = families

    async def scrape(self) -> bytes:
        """Return the metrics of every live process in Prometheus' text format."""
        self._forget_silent()
        known = self._processes.values()
        self._metrics.known([process.beat.role for process in known], len(self._table))
        own = render_families(self._metrics.registry, {"process": "control"})
        return merge([own, *(process.families for process in known)])

    async def usage(self, query: UsageQuery) -> dict[str, Any]:
        """Return a report of what was used; see ledger.report."""
        costs = self._args.costs
        return await asyncio.to_thread(
            report, self._database, query, costs.prices(), costs.idle_rules()
        )

    async def reverse_usage(self, request_id: str, reason: str, by: Actor) -> Reversal | None:
        """Take back what a request was billed; None if there is no such request."""
        return await asyncio.to_thread(self._ledger.reverse, request_id, reason, by)

    async def insight(self, name: str, query: UsageQuery) -> dict[str, Any]:
        """Return a report on cost; see ledger.insights."""
        return await asyncio.to_thread(insight, self._database, name, query, self._args.costs)

    async def list_budgets(self) -> Sequence[Balance]:
        """Return every budget and how it stands."""
        return await self._treasury.balances()

    async def put_budget(self, budget: Budget, by: Actor) -> None:
        """Set a budget, new or in place of another."""
        await self._treasury.put(budget, by)

    async def add_credit(self, key: BudgetKey, amount_nanousd: int, by: Actor) -> Budget | None:
        """Add to a budget's amount; None if there is none."""
        return await self._treasury.add(key, amount_nanousd, by)

    async def remove_budget(self, key: BudgetKey, by: Actor) -> bool:
        """Remove a budget; tell whether there was one."""
        return await self._treasury.remove(key, by)

    async def changes(self, query: ChangeQuery) -> list[Change]:
        """Return who changed what, the latest first."""
        return await asyncio.to_thread(self._trail.changes, query)

    async def note_limits(self, limits: Mapping[str, Any]) -> None:
        """Note in the audit trail what limits the configuration sets, if they changed."""
        by = Actor("configuration", Via.CONFIGURATION)
        await asyncio.to_thread(self._trail.note_limits, limits, by)

    async def price_books(self) -> tuple[Sequence[BookLine], int]:
        """Return every version of the prices, and the one in force."""
        books = await asyncio.to_thread(self._price_store.books)
        return books, await asyncio.to_thread(self._price_store.version)

    async def price_book(self, version: int | None) -> PriceBook | None:
        """Return a version of the prices, or the one in force; None if there is none."""
        if version is None:
            return await asyncio.to_thread(self._price_store.current)
        return await asyncio.to_thread(self._price_store.book, version)

    async def import_prices(
        self, cards: Sequence[RateCard], note: str, by: Actor
    ) -> tuple[int, bool]:
        """Put cards in force; return their version, and whether it is a new one."""
        before = await asyncio.to_thread(self._price_store.version)
        version = await asyncio.to_thread(self._price_store.replace, cards, note, by)
        self._prices = await asyncio.to_thread(self._price_store.current)
        return version, version > before

    async def list_keys(self) -> list[KeyRecord]:
        """Return all keys, revoked ones included; never a secret."""
        return await asyncio.to_thread(lambda: list(self._store.list()))

    async def create_key(self, wish: KeyWish, by: Actor) -> tuple[str, KeyRecord]:
        """Create a key; return its secret, which is stored nowhere, and its record."""
        created = await asyncio.to_thread(self._store.create, wish, by)
        await self._refresh()
        return created

    async def rotate_key(
        self, key_id: str, overlap_s: float, by: Actor
    ) -> tuple[str, KeyRecord, KeyRecord] | None:
        """Make a key in another's place; return its secret, its record and the old one's."""
        rotated = await asyncio.to_thread(self._store.rotate, key_id, overlap_s, by)
        await self._refresh()
        return rotated

    async def revoke_key(self, key_id: str, by: Actor) -> KeyRecord | None:
        """Revoke a key; None if there is none of that id."""
        revoked = await asyncio.to_thread(self._store.revoke, key_id, by)
        await self._refresh()
        return revoked

    async def check_health(self) -> None:
        """Serve's probe: the store must be followed, and no later Control have begun."""
        if self._watch.done():
            raise RuntimeError("the key store is no longer followed")
        if self._grants.superseded:
            raise RuntimeError("another Control has begun")

    def _read_bills(self) -> BillReader | None:
        """Begin to read nodes' bills, if the configuration says where they are."""
        costs = self._args.costs
        if costs.opencost is None:
            return None
        bills = OpenCost(costs.opencost.url, timeout_s=costs.opencost.timeout_s)
        metrics = BillMetrics(self._metrics.registry)
        reader = BillReader(bills, self._database, costs, metrics, time.time)
        reader.start()
        return reader

    def _routers(self) -> dict[str, tuple[str, bytes]]:
        self._forget_silent()
        return {
            name: known.beat.channel
            for name, known in self._processes.items()
            if known.beat.channel is not None
        }

    def _heard(self, role: str) -> dict[str, Heartbeat]:
        """Return the latest heartbeats of the processes of a role that are not silent."""
        oldest_s = time.monotonic() - SILENT_S
        return {
            name: known.beat
            for name, known in self._processes.items()
            if known.beat.role == role and known.heard_at_s >= oldest_s
        }

    def _engines(self) -> dict[str, EngineNews]:
        beats = self._heard("engine")
        return {name: beat.engine for name, beat in beats.items() if beat.engine is not None}

    def _read_table(self) -> KeyTable:
        table = self._store.snapshot()
        return table.with_record(bootstrap_record(self._bootstrap)) if self._bootstrap else table

    async def _refresh(self) -> None:
        # Of two at once, the one that began first must not end last.
        async with self._refreshing:
            table = await asyncio.to_thread(self._read_table)
            # No router may serve a key without the prices and budgets that were there before it.
            try:
                await self._look_at_prices()
                await self._treasury.look()
            except StoreUnavailable:
                logger.exception("prices or budgets cannot be read; they stay as they are")
            self._table = table

    async def _look_at_prices(self) -> None:
        if await asyncio.to_thread(self._price_store.version) != self._prices.version:
            self._prices = await asyncio.to_thread(self._price_store.current)

    async def _follow_store(self) -> None:
        """Notice keys that the command line changed in the same database."""
        while True:
            due_s = time.monotonic() + self._args.follow_period_s
            await asyncio.sleep(self._args.follow_period_s)
            self._metrics.event_loop_lag_seconds.observe(max(0.0, time.monotonic() - due_s))
            try:
                version = await asyncio.to_thread(self._store.version)
                if version != self._table.version:
                    await self._refresh()
                await self._look_at_prices()
                await self._grants.follow()
            except asyncio.CancelledError:
                raise
            except Exception:
                logger.exception("the key store cannot be read; keys stay as they are")

    def _forget_silent(self) -> None:
        oldest_s = time.monotonic() - self._args.forget_after_s
        for name, process in list(self._processes.items()):
            if process.heard_at_s < oldest_s:
                del self._processes[name]
