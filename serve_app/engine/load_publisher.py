"""A replica's load, told to every router that subscribed: the same snapshots to each.

Routers divide among them what one snapshot shows free (core/exchange.py), so all of them
have to see the same ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from serve_app.core.types import ReplicaView
from serve_app.engine.api import Engine, EngineDead, WatchCall
from serve_app.engine.channel_engine import EngineChannel
from serve_app.engine.channel_outlet import StreamLost

# While frames flow, the load goes out with them: this many times a period at most.
TIMES_A_PERIOD = 5


class LoadPublisher:
    """Takes a snapshot every period, sooner while frames flow, as one owned task."""

    def __init__(
        self,
        engine: Engine,
        check_health: Callable[[], Awaitable[None]],
        channel: EngineChannel,
        period_s: float,
    ) -> None:
        """``check_health`` raises EngineDead when the engine cannot generate."""
        self._engine = engine
        self._check_health = check_health
        self._channel = channel
        self._period_s = period_s
        self._view: ReplicaView | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin on the running loop, once the engine has started."""
        self._view = self._engine.snapshot()
        self._task = asyncio.create_task(self._publish())

    async def stop(self) -> None:
        """Tell nobody any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def attend(self, call: WatchCall) -> None:
        """Have a router hear the load on the token channel, for as long as this call is open.

        Raises:
            EngineDead: the engine cannot generate; a replica that answers but serves
                nothing must not look idle.
            StreamLost: the router is not reached.
        """
        assert call.router is not None
        with self._channel.subscribed(call.router) as outlet:
            while outlet.failed is None:
                await self._check_health()
                await asyncio.sleep(self._period_s)
            raise StreamLost(outlet.failed)

    async def watch(self) -> AsyncGenerator[ReplicaView, None]:
        """Yield the load every period, for a router that takes it through the call.

        Raises:
            EngineDead: see attend.
        """
        while True:
            await self._check_health()
            assert self._view is not None
            yield self._view
            await asyncio.sleep(self._period_s)

    async def tell(self) -> None:
        """Send the load now; it is not sent while the engine is dead."""
        try:
            await self._check_health()
        except EngineDead:
            return  # Who attends is told so.
        self._view = self._engine.snapshot()
        self._channel.broadcast(self._view)

    async def _publish(self) -> None:
        tick_s = self._period_s / TIMES_A_PERIOD
        quiet_ticks, frames = 0, 0
        while True:
            quiet_ticks += 1
            if quiet_ticks >= TIMES_A_PERIOD or self._channel.frames != frames:
                quiet_ticks, frames = 0, self._channel.frames
                await self.tell()
            await asyncio.sleep(tick_s)
