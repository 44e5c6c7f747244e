"""Control's side of budgets: money lent to routers, and asked back where another needs it.

``ledger/budgets.py`` decides and keeps; here calls are answered, routers that hold money
unused are rung when another lacks it, and thresholds that were passed are told of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from serve_app.changes import Actor
from serve_app.core.budget import (
    Account,
    Balance,
    Budget,
    BudgetKey,
    BudgetList,
    Line,
    crossed,
)
from serve_app.core.pricing import dollars

logger = logging.getLogger("headrace.treasury")

BELL_S = 2.0
RECALL_WAIT_S = 0.2
RECALL_AGAIN_S = 0.5
ALERTS_PERIOD_S = 5.0
# A router that is gone keeps what it was granted until its records must have come, or the
# engines' records of the same requests.
ABANDON_S = 120.0


class BudgetRecord(Protocol):
    """Where budgets are kept. Every method blocks."""

    def version(self) -> int:
        """Return the version of the list."""

    def every(self) -> list[Budget]:
        """Return every budget."""

    def put(self, budget: Budget, by: Actor) -> None:
        """Set a budget."""

    def add(self, key: BudgetKey, amount_nanousd: int, by: Actor) -> Budget | None:
        """Add to a budget's amount; None if there is none."""

    def remove(self, key: BudgetKey, by: Actor) -> bool:
        """Remove a budget; tell whether there was one."""

    def balances(self) -> Sequence[Balance]:
        """Return how every budget stands."""

    def lend(
        self, router: str, accounts: Sequence[Account], epoch: int, routers: int
    ) -> tuple[list[Line], Mapping[BudgetKey, Collection[str]]]:
        """Grant what a router needs; name who else holds something of what lacked."""

    def holders(self) -> Collection[str]:
        """Return the routers that something is outstanding with."""

    def forget(self, router: str, epoch: int) -> None:
        """Free what is outstanding with a router."""


@dataclass(frozen=True, slots=True)
class MoneyBell:
    """A hint to a router: let go of what is free of these, ask again for those."""

    recalled: tuple[BudgetKey, ...] = ()
    ready: tuple[BudgetKey, ...] = ()


@dataclass(slots=True)
class _Recall:
    """Who was asked to let go of a budget and has not answered, and who waits for it.

    ``told`` are those that waited, and came again when all had answered.
    """

    at_s: float
    asked: set[str]
    wanting: set[str]
    told: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Box:
    """What a router is to be told."""

    recalled: set[BudgetKey] = field(default_factory=set)
    ready: set[BudgetKey] = field(default_factory=set)
    rung: asyncio.Event = field(default_factory=asyncio.Event)


class Treasury:
    """One per Control. ``routers`` returns those it hears of, ``epoch`` this Control's.

    ``alive`` blocks and returns the routers whose processes there are, None if it cannot tell:
    one that only lost Control goes on spending what it was lent.
    """

    def __init__(
        self,
        record: BudgetRecord,
        clock: Callable[[], float],
        routers: Callable[[], Collection[str]],
        epoch: Callable[[], int],
        alive: Callable[[], Collection[str] | None] = lambda: (),
    ) -> None:
        self._alive = alive
        self._record = record
        self._clock = clock
        self._routers = routers
        self._epoch = epoch
        self._recalls: dict[BudgetKey, _Recall] = {}
        self._boxes: dict[str, _Box] = {}
        self._answers: dict[BudgetKey, int] = {}
        self._missed_at_s: dict[str, float] = {}
        self._told: dict[tuple[BudgetKey, int], int] = {}
        self._alerts_at_s = clock()
        self._budgets: Mapping[BudgetKey, Budget] = {}
        self._looking = asyncio.Lock()
        self.list = BudgetList()

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        """Grant a router what it needs; have others asked for what lacks."""
        before = {each.key: self._answers.get(each.key, 0) for each in accounts}
        lines, holders = await asyncio.to_thread(
            self._record.lend, router, accounts, self._epoch(), len(self._routers())
        )
        told = []
        for line in lines:
            if line.unmet and self._answers.get(line.key, 0) != before[line.key]:
                # Another router let go of some of it meanwhile: ask again.
                self._ring(router, ready=line.key)
                told.append(replace(line, pending=True))
            else:
                told.append(self._recalling(router, line, holders) if line.unmet else line)
        for account in accounts:
            self._answered(router, account.key)
        return told

    async def bell(self, router: str) -> MoneyBell:
        """Wait until there is something to tell a router, or for a while; return it."""
        box = self._boxes.setdefault(router, _Box())
        try:
            async with asyncio.timeout(BELL_S):
                await box.rung.wait()
        except TimeoutError:
            pass
        box.rung.clear()
        bell = MoneyBell(tuple(box.recalled), tuple(box.ready))
        box.recalled.clear()
        box.ready.clear()
        return bell

    async def follow(self) -> None:
        """Notice budgets that changed, thresholds passed, routers gone; twice a second."""
        await self.look()
        if self._clock() - self._alerts_at_s >= ALERTS_PERIOD_S:
            self._alerts_at_s = self._clock()
            self._tell_alerts(await asyncio.to_thread(self._record.balances))
            await self._forget_gone()

    async def look(self) -> None:
        """Notice budgets that changed, whoever changed them."""
        # Of two looks at once, the one that began first must not end last.
        async with self._looking:
            version = await asyncio.to_thread(self._record.version)
            if version == self.list.version:
                return
            budgets = await asyncio.to_thread(self._record.every)
            self.list = BudgetList(version, frozenset(each.key for each in budgets if each.hard))
            self._recall_what_changed({each.key: each for each in budgets})

    async def balances(self) -> Sequence[Balance]:
        """Return how every budget stands."""
        return await asyncio.to_thread(self._record.balances)

    async def put(self, budget: Budget, by: Actor) -> None:
        """Set a budget; routers learn of it with their next heartbeat."""
        await asyncio.to_thread(self._record.put, budget, by)
        await self.look()

    async def add(self, key: BudgetKey, amount_nanousd: int, by: Actor) -> Budget | None:
        """Add to a budget's amount; None if there is none."""
        return await asyncio.to_thread(self._record.add, key, amount_nanousd, by)

    async def remove(self, key: BudgetKey, by: Actor) -> bool:
        """Remove a budget; tell whether there was one."""
        removed = await asyncio.to_thread(self._record.remove, key, by)
        await self.look()
        return removed

    def _recall_what_changed(self, budgets: Mapping[BudgetKey, Budget]) -> None:
        """Have routers let go of what they were lent of budgets that are less, or other, now."""
        for key, before in self._budgets.items():
            now = budgets.get(key, before)
            if now.amount_nanousd < before.amount_nanousd or now.window is not before.window:
                for name in self._routers():
                    self._ring(name, recalled=key)
        self._budgets = budgets

    def _recalling(
        self, router: str, line: Line, holders: Mapping[BudgetKey, Collection[str]]
    ) -> Line:
        """Ask who holds what lacks, unless that was just done; ``pending`` while answers come."""
        now_s = self._clock()
        recall = self._recalls.get(line.key)
        if recall is not None and now_s - recall.at_s < RECALL_AGAIN_S:
            if router in recall.told:
                return line
            if recall.asked and now_s - recall.at_s < RECALL_WAIT_S:
                recall.wanting.add(router)
                return replace(line, pending=True)
            if router in recall.wanting:
                return line  # somebody does not answer
        live = set(self._routers())
        asked = {name for name in holders.get(line.key, ()) if name in live}
        if not asked:
            return line
        self._recalls[line.key] = _Recall(now_s, asked, {router})
        for name in asked:
            self._ring(name, recalled=line.key)
        return replace(line, pending=True)

    def _answered(self, router: str, key: BudgetKey) -> None:
        recall = self._recalls.get(key)
        if recall is None or router not in recall.asked:
            return
        self._answers[key] = self._answers.get(key, 0) + 1
        recall.asked.discard(router)
        if not recall.asked:
            for name in recall.wanting:
                self._ring(name, ready=key)
            recall.told |= recall.wanting
            recall.wanting.clear()

    def _ring(
        self, router: str, *, recalled: BudgetKey | None = None, ready: BudgetKey | None = None
    ) -> None:
        box = self._boxes.setdefault(router, _Box())
        if recalled is not None:
            box.recalled.add(recalled)
        if ready is not None:
            box.ready.add(ready)
        box.rung.set()

    def _tell_alerts(self, balances: Sequence[Balance]) -> None:
        """Log each threshold once per period and process."""
        told: dict[tuple[BudgetKey, int], int] = {}
        for each in balances:
            name = (each.budget.key, each.period.start_s)
            for ratio in crossed(each.budget, self._told.get(name, -1), each.spent_nanousd):
                logger.warning(
                    "budget %s %s has spent %s of %s dollars, %g of it",
                    each.budget.key.scope.value,
                    each.budget.key.id,
                    dollars(each.spent_nanousd),
                    dollars(each.budget.amount_nanousd),
                    ratio,
                )
            told[name] = each.spent_nanousd
        self._told = told

    async def _forget_gone(self) -> None:
        live, now_s = set(self._routers()), self._clock()
        gone = set(await asyncio.to_thread(self._record.holders)) - live
        if gone:
            alive = await asyncio.to_thread(self._alive)
            gone = set() if alive is None else gone.difference(alive)
        self._missed_at_s = {name: self._missed_at_s.get(name, now_s) for name in gone}
        for name, at_s in list(self._missed_at_s.items()):
            if now_s - at_s >= ABANDON_S:
                await asyncio.to_thread(self._record.forget, name, self._epoch())
                del self._missed_at_s[name]
        for name in [each for each in self._boxes if each not in live]:
            del self._boxes[name]
