"""All outlets of one process, by address: opened when needed, replaced when they fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq

from serve_app.engine.address import Address
from serve_app.engine.channel_outlet import Outlet

IDLE_S = 60.0


class ChannelSender:
    """What one process sends on; on its event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._keys = zmq.curve_keypair()
        self._clock = clock
        self._outlets: dict[Address, Outlet] = {}

    def outlet(self, target: Address) -> Outlet:
        """Return the way to a process; one that failed is opened anew."""
        outlet = self._outlets.get(target)
        if outlet is None or outlet.failed is not None:
            self._close_unused()
            outlet = Outlet(self._context, target, self._keys, self._clock)
            self._outlets[target] = outlet
        return outlet

    def tell(self, target: Address, packed: bytes) -> bool:
        """Send news that only count now; return False if the process does not read."""
        return self.outlet(target).tell(packed)

    @contextmanager
    def subscribed(self, target: Address) -> Iterator[Outlet]:
        """Have ``broadcast`` reach a process within; look whether its outlet failed."""
        outlet = self.outlet(target)
        outlet.subscribers += 1
        try:
            yield outlet
        finally:
            outlet.subscribers -= 1

    def broadcast(self, packed: bytes) -> None:
        """Send news to every subscriber; one that does not read misses them."""
        for outlet in self._outlets.values():
            if outlet.subscribers:
                outlet.tell(packed)

    def close(self) -> None:
        """Close every channel; what has not been sent is dropped."""
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets.clear()
        self._context.destroy(linger=0)

    def _close_unused(self) -> None:
        """Close what nobody uses: channels to processes that are gone."""
        for target, outlet in list(self._outlets.items()):
            if outlet.failed is not None or outlet.unused_for_s() > IDLE_S:
                self._outlets.pop(target).close()
