"""A router's link to Control for limits that several routers share.

``core/holder.py`` says what to send; here it is sent, answers are taken, and the requests
that wait for parts are tried again. Two owned tasks: one exchanges messages when there is
something to say, one holds a call to Control open to be told what others want.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from serve_app.contact import AWAY_PAUSE_S, Contact
from serve_app.core.exchange import RouterId
from serve_app.core.holder import Holder
from serve_app.core.limits import Granted, Limiter, Refused, Short
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.core.slices import RECALL_WAIT_S
from serve_app.core.types import RequestId

logger = logging.getLogger("headrace.slices")

EXCHANGE_TIMEOUT_S = 2.0
BELL_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 2.0

Answer = Granted | Refused | Short


class GranterLink(Protocol):
    """What a router asks of Control. Any exception means Control is away."""

    async def exchange_slices(self, message: Message) -> Reply:
        """Hand a message to the granter."""

    async def slices_bell(self, router: str) -> Bell:
        """Wait for a hint from the granter, or for some seconds."""


class SlicesLink:
    """One per router; ``limiter`` is shared, and its parts come and go here."""

    def __init__(self, router: str, link: GranterLink, clock: Callable[[], float]) -> None:
        self.limiter = Limiter(shared=True)
        self._router = router
        self._link = link
        self._clock = clock
        self._holder = Holder(RouterId(router), self.limiter)
        self._contact = Contact("limits", logger, clock)
        self._registered = asyncio.Event()
        self._asked_at_s = 0.0
        self.known = False
        """Whether Control has ever known this router: before, no limit can be taken."""

    @property
    def waiting(self) -> int:
        """Requests that wait for parts of their limits."""
        return self._holder.waiting

    def start(self) -> None:
        """Register with Control, and keep in touch, on the running loop."""
        self._contact.start(self._exchange(), self._listen())

    async def stop(self) -> None:
        """Give everything back, if Control is there, and end both tasks."""
        await self._contact.stop()
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                self._holder.leave(self._clock())
                while (message := self._holder.compose(self._clock())) is not None:
                    reply = await self._link.exchange_slices(message)
                    if not self._holder.accept(reply, self._clock()):
                        return
        except Exception as error:  # noqa: BLE001  # away in whatever way
            logger.info("parts of limits were not given back: %.200s", error)

    async def fetch(
        self, request_id: RequestId, short: Short, attempt: Callable[[], Answer]
    ) -> Granted | Refused | None:
        """Get what a request lacks, then try again; None if Control cannot be asked now.

        ``attempt`` takes the request's limits; it is not called again once it has decided.
        """

        def want(short: Short) -> bool:
            if self._holder.unsure(short, self._clock()):
                return False
            self._holder.want(request_id, short)
            return True

        try:
            return await self._contact.fetch(short, attempt, Short, want)
        finally:
            self._holder.release(request_id)

    async def _exchange(self) -> None:
        while True:
            self._ask_again()
            message = self._holder.compose(self._clock())
            if message is None:
                await self._contact.kicked(RECALL_WAIT_S if self._holder.pending else None)
                continue
            call = self._link.exchange_slices(message)
            reply = await self._contact.ask(call, EXCHANGE_TIMEOUT_S)
            if reply is None:
                continue
            if self._holder.accept(reply, self._clock()):
                self._contact.away = False
                self._note_registered()
                self._contact.wake()
            else:
                # A Control that has been replaced and does not know it.
                await asyncio.sleep(AWAY_PAUSE_S)

    def _ask_again(self) -> None:
        """Ask again for recalls that take too long, however much else there is to say."""
        now_s = self._clock()
        if not self._holder.pending:
            self._asked_at_s = now_s
        elif now_s - self._asked_at_s >= RECALL_WAIT_S:
            self._asked_at_s = now_s
            self._holder.ask_again()

    async def _listen(self) -> None:
        while True:
            await self._registered.wait()
            bell = await self._contact.ask(self._link.slices_bell(self._router), BELL_TIMEOUT_S)
            if bell is None:
                continue
            self._contact.away = False
            self._holder.rung(bell, self._clock())
            self._note_registered()
            self._contact.kick()

    def _note_registered(self) -> None:
        if self._holder.registered:
            self.known = True
            self._registered.set()
        else:
            self._registered.clear()
