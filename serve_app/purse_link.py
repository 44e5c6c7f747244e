"""A router's money: reserved for a request before it is admitted, settled when it ends.

``core/purses.py`` decides. Nothing is awaited where the router's purses suffice; what they
lack is fetched from Control, and what the ledger has is let go of once a second. A request is
paid for by the period in which it came as its id tells, where the ledger books it: the wall
clock says only whose periods' money need not be kept at hand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from serve_app.contact import Contact
from serve_app.core.budget import Account, BudgetKey, BudgetList, Line
from serve_app.core.purses import Lacking, Overdrawn, Purses, Reserved, Statement
from serve_app.core.types import RequestId
from serve_app.treasury import MoneyBell
from serve_app.usage import arrived_at_s

logger = logging.getLogger("headrace.purses")

EXCHANGE_TIMEOUT_S = 2.0
BELL_TIMEOUT_S = 10.0
PERIOD_S = 1.0
RECALL_WAIT_S = 0.2
LEAVE_TIMEOUT_S = 2.0

Answer = Reserved | Lacking | Overdrawn


class TreasuryLink(Protocol):
    """What a router asks of Control. Any exception means Control is away."""

    async def lend(self, router: str, accounts: list[Account]) -> list[Line]:
        """Tell accounts, get money."""

    async def money_bell(self, router: str) -> MoneyBell:
        """Wait for a hint from the treasury, or for some seconds."""


class PurseLink:
    """One per router. ``list`` names the budgets in force, replaced as a whole."""

    def __init__(
        self,
        router: str,
        link: TreasuryLink,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self._router = router
        self._link = link
        self._clock = clock
        self._wall_clock = wall_clock
        self._expired_at_s = clock()
        self._waiting: dict[RequestId, Lacking] = {}
        self._recalled: set[BudgetKey] = set()
        self._contact = Contact("money of budgets", logger, clock)
        self.purses = Purses()
        self.list = BudgetList()

    def start(self) -> None:
        """Keep in touch with Control, on the running loop."""
        self._contact.start(self._exchange(), self._listen())

    async def stop(self) -> None:
        """Let go of everything that is free, if Control is there, and end both tasks."""
        await self._contact.stop()
        self.purses.give_back(self.purses.budgets())
        statement = self.purses.state()
        if not statement.accounts:
            return
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._link.lend(self._router, list(statement.accounts))
        except Exception as error:  # noqa: BLE001  # away in whatever way
            logger.info("money was not given back: %.200s", error)

    def now_s(self) -> float:
        """Return the monotonic time that the purses go by."""
        return self._clock()

    def reserve(
        self, request_id: RequestId, keys: Sequence[BudgetKey], amount: int, least: int
    ) -> Answer:
        """Reserve of every budget or of none, at once."""
        at_s = int(arrived_at_s(request_id))
        return self.purses.reserve(
            request_id, keys, amount, least=least, at_s=at_s, now_s=self._clock()
        )

    def left(self, request_id: RequestId, keys: Sequence[BudgetKey]) -> int:
        """Return what the budget that is nearest to its end had left when last heard of."""
        at_s = arrived_at_s(request_id)
        return min(self.purses.left(key, at_s) for key in keys)

    def extend(self, request_id: RequestId, more: int, least: int) -> Answer | None:
        """Reserve more for a request that runs, at once; None if it has ended."""
        return self.purses.extend(request_id, more, least=least, now_s=self._clock())

    async def fetch(
        self, request_id: RequestId, lacking: Lacking, attempt: Callable[[], Answer]
    ) -> Reserved | Overdrawn | None:
        """Get what a request lacks, then try again; None if Control cannot be asked now."""

        def want(lacking: Lacking) -> bool:
            self._waiting[request_id] = lacking
            return True

        try:
            return await self._contact.fetch(lacking, attempt, Lacking, want)
        finally:
            self._waiting.pop(request_id, None)

    async def _exchange(self) -> None:
        while True:
            self._expire()
            statement = self._state()
            if statement.accounts or self.purses.awaits_ledger:
                if not await self._tell(statement):
                    continue
            else:
                # What is waited for came free here.
                self._contact.wake()
            # Who has got what it lacked need not be asked for again.
            await asyncio.sleep(0)
            await self._contact.kicked(RECALL_WAIT_S if self._waiting else PERIOD_S)

    def _expire(self) -> None:
        """Do it now and then, however often there is something to say."""
        now_s = self._clock()
        if now_s - self._expired_at_s >= PERIOD_S:
            self._expired_at_s = now_s
            known = self.list.version >= 0
            gone = [each for each in self.purses.budgets() if known and each not in self.list.keys]
            self.purses.expire(now_s, self._wall_clock(), gone)

    def _state(self) -> Statement:
        """Return what is to be told: what requests lack, recalls, what was let go of."""
        recalled, self._recalled = self._recalled, set()
        # Also of what is lacked here, which then is asked for later: of two routers that hold
        # too little each, one must get enough.
        self.purses.give_back(recalled)
        needs = [need for lacking in self._waiting.values() for need in lacking.needs]
        return self.purses.state([each for each in needs if each.key not in recalled], recalled)

    async def _tell(self, statement: Statement) -> bool:
        call = self._link.lend(self._router, list(statement.accounts))
        lines = await self._contact.ask(call, EXCHANGE_TIMEOUT_S)
        if lines is None:
            return False
        self._contact.away = False
        now_s = self._clock()
        self.purses.accept(statement, lines, now_s)
        # Money and the ledger are in one database.
        self.purses.heard(now_s)
        self._contact.wake()
        return True

    async def _listen(self) -> None:
        while True:
            call = self._link.money_bell(self._router)
            bell = await self._contact.ask(call, BELL_TIMEOUT_S)
            if bell is None:
                continue
            self._contact.away = False
            if bell.recalled or bell.ready:
                self._recalled.update(bell.recalled)
                self._contact.kick()
