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

from serve_app.core.exchange import RouterId
from serve_app.core.holder import Holder
from serve_app.core.limits import Granted, Limiter, Refused, Short
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.core.slices import RECALL_WAIT_S
from serve_app.core.types import RequestId

logger = logging.getLogger("headrace.slices")

PATIENCE_S = 1.0
EXCHANGE_TIMEOUT_S = 2.0
BELL_TIMEOUT_S = 10.0
AWAY_PAUSE_S = 0.25
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
        self._kick = asyncio.Event()
        self._changed = asyncio.Event()
        self._registered = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.away = False

    @property
    def waiting(self) -> int:
        """Requests that wait for parts of their limits."""
        return self._holder.waiting

    def start(self) -> None:
        """Register with Control, and keep in touch, on the running loop."""
        self._tasks = [
            asyncio.create_task(self._exchange()),
            asyncio.create_task(self._listen()),
        ]

    async def stop(self) -> None:
        """Give everything back, if Control is there, and end both tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
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
        give_up_at_s = self._clock() + PATIENCE_S
        try:
            while not (self.away or self._holder.unsure(short, self._clock())):
                self._holder.want(request_id, short)
                self._kick.set()
                try:
                    async with asyncio.timeout(give_up_at_s - self._clock()):
                        await self._changed.wait()
                except TimeoutError:
                    return None
                answer = attempt()
                if not isinstance(answer, Short):
                    return answer
                short = answer
            return None
        finally:
            self._holder.release(request_id)

    async def _exchange(self) -> None:
        while True:
            message = self._holder.compose(self._clock())
            if message is None:
                await self._rest()
                continue
            try:
                async with asyncio.timeout(EXCHANGE_TIMEOUT_S):
                    reply = await self._link.exchange_slices(message)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  # away in whatever way
                self._lost(error)
                await asyncio.sleep(AWAY_PAUSE_S)
                continue
            if self._holder.accept(reply, self._clock()):
                self.away = False
                self._note_registered()
                self._wake()
            else:
                # A Control that has been replaced and does not know it.
                await asyncio.sleep(AWAY_PAUSE_S)

    async def _rest(self) -> None:
        """Wait for something to say; recalls that take too long are asked for again."""
        try:
            async with asyncio.timeout(RECALL_WAIT_S if self._holder.pending else None):
                await self._kick.wait()
        except TimeoutError:
            self._holder.ask_again()
        self._kick.clear()

    async def _listen(self) -> None:
        while True:
            await self._registered.wait()
            try:
                async with asyncio.timeout(BELL_TIMEOUT_S):
                    bell = await self._link.slices_bell(self._router)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001  # away in whatever way
                self._lost(error)
                await asyncio.sleep(AWAY_PAUSE_S)
                continue
            self.away = False
            self._holder.rung(bell, self._clock())
            self._note_registered()
            self._kick.set()

    def _note_registered(self) -> None:
        if self._holder.registered:
            self._registered.set()
        else:
            self._registered.clear()

    def _lost(self, error: Exception) -> None:
        """Have nobody wait for a Control that is away."""
        if not self.away:
            logger.warning("limits cannot be fetched: %s: %.200s", type(error).__name__, error)
        self.away = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
