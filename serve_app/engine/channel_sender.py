"""The sending end of the token channel: one outlet per router, for streams and for news.

An engine replica streams its frames and sends its load to whoever subscribed; a router
tells the other routers what it holds.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager

import zmq

from serve_app.engine.api import Final, Frame, GenerateItem, Refusal
from serve_app.engine.channel import Address, Message, ReplyTo, pack
from serve_app.engine.channel_outlet import Outlet, StreamLost

IDLE_S = 60.0


class ChannelSender:
    """All channels that one process sends on; on its event loop only.

    ``frames`` counts the frames that were handed over.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._keys = zmq.curve_keypair()
        self._clock = clock
        self._outlets: dict[Address, Outlet] = {}
        self.frames = 0

    async def deliver(
        self, items: AsyncGenerator[GenerateItem, None], reply: ReplyTo
    ) -> Final | Refusal:
        """Send every frame of a generation; return its last item.

        Raises:
            StreamLost: the router does not take them; the generation was closed.
            EngineDead: the engine died.
        """
        outlet, stream = self._outlet(reply.router), reply.stream
        with outlet.streaming():
            async with aclosing(items):
                async for item in items:
                    if not isinstance(item, Frame):
                        return item
                    outlet.write((stream, item.sequence, item.data, item.token_ids))
                    self.frames += 1
        raise StreamLost("the engine ended a generation without its last item")

    @contextmanager
    def subscribed(self, router: Address) -> Iterator[Outlet]:
        """Have ``broadcast`` reach a router within; look whether its outlet failed."""
        outlet = self._outlet(router)
        outlet.subscribers += 1
        try:
            yield outlet
        finally:
            outlet.subscribers -= 1

    def broadcast(self, message: Message) -> None:
        """Send news to every subscriber; one that does not read misses it."""
        packed: bytes | None = None
        for outlet in self._outlets.values():
            if outlet.subscribers:
                packed = packed or pack(message)
                outlet.tell(packed)

    def tell(self, router: Address, packed: bytes) -> bool:
        """Send news to one router; return False if it does not read."""
        return self._outlet(router).tell(packed)

    def close(self) -> None:
        """Close every channel; what has not been sent is dropped."""
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets.clear()
        self._context.destroy(linger=0)

    def _outlet(self, router: Address) -> Outlet:
        outlet = self._outlets.get(router)
        if outlet is None or outlet.failed is not None:
            self._close_unused()
            outlet = Outlet(self._context, router, self._keys, self._clock)
            self._outlets[router] = outlet
        return outlet

    def _close_unused(self) -> None:
        """Close what nobody uses: channels to routers that are gone."""
        for router, outlet in list(self._outlets.items()):
            if outlet.failed is not None or outlet.unused_for_s() > IDLE_S:
                self._outlets.pop(router).close()
