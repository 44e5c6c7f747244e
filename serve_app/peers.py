"""The live exchange between the routers of one fleet, over the token channel's sockets.

Control's answers to heartbeats name the routers; what they tell each other goes straight from
one to the other, so a Control that is away changes nothing between routers that know each
other. A digest that a busy router does not take is dropped: the next one says more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from serve_app.core.exchange import EXCHANGE_PERIOD_S
from serve_app.engine.address import Address
from serve_app.engine.channel_router import RouterChannel
from serve_app.gate import Gate

logger = logging.getLogger("headrace.peers")


class Peers:
    """One router's exchange with the others, as one owned task on its event loop."""

    def __init__(self, gate: Gate, channel: RouterChannel) -> None:
        """Hear from now on; tell once ``know`` has named others."""
        self._gate = gate
        self._channel = channel
        self._others: tuple[Address, ...] = ()
        self._task = asyncio.create_task(self._exchange())
        channel.on_told = gate.hear

    def know(self, routers: Mapping[str, tuple[str, bytes]]) -> None:
        """Tell these routers, this one excepted; their addresses are endpoint and key."""
        addresses = (Address(*address) for address in routers.values())
        self._others = tuple(each for each in addresses if each != self._channel.address)

    @property
    def count(self) -> int:
        """How many others are told."""
        return len(self._others)

    async def stop(self) -> None:
        """Tell nobody any more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _exchange(self) -> None:
        while True:
            await asyncio.sleep(EXCHANGE_PERIOD_S)
            try:
                # Nobody to tell, too: who fell silent is forgotten as this router looks.
                digest = self._gate.digest()
                for router in self._others:
                    self._channel.tell(router, digest)
            except Exception:
                # Without the exchange every router would take the others for dead.
                logger.exception("this router could not tell the others what it holds")
