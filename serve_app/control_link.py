"""Control as seen from the other processes: calls through its Serve handle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray import serve

from serve_app.changes import Actor, Change, ChangeQuery, Reversal
from serve_app.core.budget import Account, Balance, Budget, BudgetKey, Line
from serve_app.core.pricing import PriceBook, RateCard
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.keys import KeyRecord, KeyWish
from serve_app.price_file import BookLine
from serve_app.telemetry.exposition import Family
from serve_app.telemetry.uplink import Heartbeat, Tables
from serve_app.treasury import MoneyBell
from serve_app.usage_report import UsageQuery


def living_replicas() -> set[str] | None:
    """Return the ids of all replicas of Serve whose actors there are; None if Ray cannot tell.

    Blocks. A replica's actor is named by it: ``SERVE_REPLICA::app#deployment#id``.
    """
    try:
        named = ray.util.list_named_actors(all_namespaces=True)
    except Exception:  # noqa: BLE001  # whatever Ray raises where it cannot be asked
        return None
    return {each["name"].rpartition("#")[2] for each in named if "#" in each["name"]}


class HandleControlLink:
    """Calls the one replica of Control. Whatever Serve raises means Control is away."""

    def __init__(self, app_name: str) -> None:
        """``app_name`` is Control's application; it need not be deployed yet."""
        self._app_name = app_name
        self._known: Any = None

    async def heartbeat(self, beat: Heartbeat) -> Tables:
        """See ControlLink."""
        tables: Tables = await self._handle.heartbeat.remote(beat)
        return tables

    async def report_metrics(self, process: str, families: Mapping[str, Family]) -> None:
        """See ControlLink."""
        await self._handle.report_metrics.remote(process, families)

    async def exchange_slices(self, message: Message) -> Reply:
        """See GranterLink."""
        reply: Reply = await self._handle.exchange_slices.remote(message)
        return reply

    async def slices_bell(self, router: str) -> Bell:
        """See GranterLink."""
        bell: Bell = await self._handle.slices_bell.remote(router)
        return bell

    async def record_usage(self, payloads: list[bytes]) -> None:
        """Return when the ledger has committed every record in ``payloads``."""
        await self._handle.record_usage.remote(payloads)

    async def usage(self, query: UsageQuery) -> dict[str, Any]:
        """Return a report of what was used."""
        report: dict[str, Any] = await self._handle.usage.remote(query)
        return report

    async def reverse_usage(self, request_id: str, reason: str, by: Actor) -> Reversal | None:
        """Take back what a request was billed; None if there is no such request."""
        done: Reversal | None = await self._handle.reverse_usage.remote(request_id, reason, by)
        return done

    async def insight(self, name: str, query: UsageQuery) -> dict[str, Any]:
        """Return a report on cost; see ledger.insights."""
        report: dict[str, Any] = await self._handle.insight.remote(name, query)
        return report

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        """See TreasuryLink."""
        lines: list[Line] = await self._handle.lend.remote(router, accounts)
        return lines

    async def money_bell(self, router: str) -> MoneyBell:
        """See TreasuryLink."""
        bell: MoneyBell = await self._handle.money_bell.remote(router)
        return bell

    async def scrape(self) -> bytes:
        """Return the application's metrics as Prometheus text."""
        text: bytes = await self._handle.scrape.remote()
        return text

    async def list_budgets(self) -> Sequence[Balance]:
        """Return every budget and how it stands."""
        balances: Sequence[Balance] = await self._handle.list_budgets.remote()
        return balances

    async def put_budget(self, budget: Budget, by: Actor) -> None:
        """Set a budget."""
        await self._handle.put_budget.remote(budget, by)

    async def add_credit(self, key: BudgetKey, amount_nanousd: int, by: Actor) -> Budget | None:
        """Add to a budget's amount; None if there is none."""
        budget: Budget | None = await self._handle.add_credit.remote(key, amount_nanousd, by)
        return budget

    async def remove_budget(self, key: BudgetKey, by: Actor) -> bool:
        """Remove a budget; tell whether there was one."""
        removed: bool = await self._handle.remove_budget.remote(key, by)
        return removed

    async def changes(self, query: ChangeQuery) -> Sequence[Change]:
        """Return who changed what, the latest first."""
        found: Sequence[Change] = await self._handle.changes.remote(query)
        return found

    async def note_limits(self, limits: Mapping[str, Any]) -> None:
        """Tell what limits the configuration sets, for the audit trail."""
        await self._handle.note_limits.remote(limits)

    async def price_books(self) -> tuple[Sequence[BookLine], int]:
        """Return every version of the prices, and the one in force."""
        books: tuple[Sequence[BookLine], int] = await self._handle.price_books.remote()
        return books

    async def price_book(self, version: int | None) -> PriceBook | None:
        """Return a version of the prices, or the one in force."""
        book: PriceBook | None = await self._handle.price_book.remote(version)
        return book

    async def import_prices(
        self, cards: Sequence[RateCard], note: str, by: Actor
    ) -> tuple[int, bool]:
        """Put cards in force; return their version, and whether it is a new one."""
        done: tuple[int, bool] = await self._handle.import_prices.remote(cards, note, by)
        return done

    async def list_keys(self) -> list[KeyRecord]:
        """Return all keys."""
        records: list[KeyRecord] = await self._handle.list_keys.remote()
        return records

    async def create_key(self, wish: KeyWish, by: Actor) -> tuple[str, KeyRecord]:
        """Create a key; return its secret and its record."""
        created: tuple[str, KeyRecord] = await self._handle.create_key.remote(wish, by)
        return created

    async def rotate_key(
        self, key_id: str, overlap_s: float, by: Actor
    ) -> tuple[str, KeyRecord, KeyRecord] | None:
        """Make a key in another's place; None if there is none valid of that id."""
        rotated: tuple[str, KeyRecord, KeyRecord] | None = await self._handle.rotate_key.remote(
            key_id, overlap_s, by
        )
        return rotated

    async def revoke_key(self, key_id: str, by: Actor) -> KeyRecord | None:
        """Revoke a key; None if there is none of that id."""
        revoked: KeyRecord | None = await self._handle.revoke_key.remote(key_id, by)
        return revoked

    @property
    def _handle(self) -> Any:
        if self._known is None:
            self._known = serve.get_deployment_handle(
                "Control", app_name=self._app_name, _check_exists=False
            )
        return self._known
