"""Control's side of limits that routers share: messages, bells, and the record that fences.

``core/slices.py`` decides. No request waits here: routers come when their parts do not
suffice, and hold a call open to be told what to give back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from serve_app.core.exchange import RouterId
from serve_app.core.slice_messages import Bell, Message, Reply
from serve_app.core.slices import Granter

logger = logging.getLogger("headrace.granter")

BELL_S = 2.0
PAUSE_S = 3.0
SUSPECT_S = 3.0
VERIFIED_S = 3.0


class Inheritance(Protocol):
    """What a Control takes over from the one before it."""

    @property
    def epoch(self) -> int:
        """Grows with each Control."""

    @property
    def routers(self) -> Sequence[str]:
        """Routers that may hold parts."""

    @property
    def gone_lately(self) -> bool:
        """Whether a router was lost within the last minute."""

    @property
    def alive_lately(self) -> bool:
        """Whether the Control before was there within the last minute."""


class GrantRecord(Protocol):
    """Where grants are fenced. Every method blocks, and raises if this is not the Control."""

    def begin(self) -> Inheritance:
        """Become the Control that grants."""

    def add(self, router: str, epoch: int) -> None:
        """Record that a router may hold parts."""

    def remove(self, router: str, epoch: int, *, lost: bool) -> None:
        """Record that a router holds nothing any more; ``lost`` if it gave nothing back."""

    def is_latest(self, epoch: int) -> bool:
        """Tell whether no other Control has begun since."""


class GrantDesk:
    """One per Control. ``forget_after_s`` is how long a silent router keeps its parts.

    ``alive`` blocks and returns the routers whose processes there are, None if it cannot tell:
    one that is not among them has lost its parts as soon as it is silent.
    """

    def __init__(
        self,
        record: GrantRecord,
        clock: Callable[[], float],
        forget_after_s: float,
        alive: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self._alive = alive
        self._record = record
        self._clock = clock
        self._forget_after_s = forget_after_s
        self._granter: Granter | None = None
        self._recorded: set[RouterId] = set()
        self._bells: dict[RouterId, asyncio.Event] = {}
        self._verified_at_s = self._followed_at_s = clock()
        self.superseded = False

    async def begin(self) -> None:
        """Take over from the Control before; call once, before anything else."""
        taken = await asyncio.to_thread(self._record.begin)
        recorded = [RouterId(each) for each in taken.routers]
        alive = await asyncio.to_thread(self._alive) if recorded else None
        awaited = [each for each in recorded if alive is None or each in alive]
        # Whoever is gone may have used its parts until just now, if there was somebody to ask.
        lost = len(awaited) < len(recorded) and taken.alive_lately
        self._recorded = set(recorded)
        self._verified_at_s = self._clock()
        self._granter = Granter(
            taken.epoch, self._clock(), awaited=awaited, doubtful=taken.gone_lately or lost
        )
        logger.info("limits are granted in epoch %d", taken.epoch)

    @property
    def granter(self) -> Granter:
        """The core, for figures."""
        assert self._granter is not None, "begin comes first"
        return self._granter

    async def exchange(self, message: Message) -> Reply:
        """Answer a router's message; a router is recorded before it can hold anything."""
        granter = self.granter
        if self._clock() - self._verified_at_s > VERIFIED_S:
            await self._verify()
        if self.superseded:
            raise RuntimeError("another Control grants limits")
        if message.claims is not None and message.router not in self._recorded:
            await asyncio.to_thread(self._record.add, message.router, granter.epoch)
            self._recorded.add(message.router)
        reply = granter.exchange(message, self._clock())
        self._ring()
        return reply

    async def bell(self, router: str) -> Bell:
        """Wait until there is something to tell a router, or for a while; return it."""
        name = RouterId(router)
        if name in self.granter.routers():
            event = self._bells.setdefault(name, asyncio.Event())
            try:
                async with asyncio.timeout(BELL_S):
                    await event.wait()
            except TimeoutError:
                pass
            event.clear()
        return self.granter.bell(name, self._clock())

    def heard(self, router: str) -> None:
        """Note a router's heartbeat."""
        self.granter.heard(RouterId(router), self._clock())

    async def follow(self) -> None:
        """Forget routers that are gone; call about twice a second.

        Once another Control has begun this one is ``superseded`` and grants nothing more.
        """
        granter = self.granter
        await self._verify()
        if self.superseded:
            return
        now_s = self._clock()
        if now_s - self._followed_at_s > PAUSE_S:
            # It was this process that heard nothing: stopped, or its database was slow.
            for router in granter.routers():
                granter.heard(router, now_s)
        self._followed_at_s = now_s
        lost = granter.expire(self._clock(), self._forget_after_s)
        suspects = granter.silent(self._clock(), SUSPECT_S)
        alive = await asyncio.to_thread(self._alive) if suspects else None
        if alive is not None:
            lost += [router for router in suspects if router not in alive]
        for router in lost:
            granter.lose(router, self._clock())
            logger.warning("router %s is gone; its parts of limits are free again", router)
        self._ring()
        for router in [each for each in self._recorded if not granter.knows(each)]:
            self._recorded.discard(router)
            self._bells.pop(router, None)
            await asyncio.to_thread(self._record.remove, router, granter.epoch, lost=router in lost)

    async def _verify(self) -> None:
        began_at_s = self._clock()
        if not await asyncio.to_thread(self._record.is_latest, self.granter.epoch):
            if not self.superseded:
                logger.error("another Control grants limits; this one does no longer")
            self.superseded = True
        self._verified_at_s = began_at_s

    def _ring(self) -> None:
        for router in self.granter.rung():
            self._bells.setdefault(router, asyncio.Event()).set()
