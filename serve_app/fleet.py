"""The router's view of the engines: a transport per pool, a load subscription per replica.

Serve's replica sets come from the ReplicaDirectory. Each replica is watched by one task,
which feeds its load to the gate; when the watch breaks, the gate forgets the replica at
once and the watch is tried again for as long as Serve lists it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import aclosing

from serve_app.core.types import PoolName, ReplicaId
from serve_app.engine.api import EngineDead, WatchCall
from serve_app.engine.replica_directory import ReplicaDirectory
from serve_app.engine.transport import Transport
from serve_app.gate import Gate

logger = logging.getLogger("headrace.fleet")

REWATCH_S = 0.5


class Fleet:
    """Owns the transports and the watch tasks of one router."""

    def __init__(
        self,
        gate: Gate,
        connect: Callable[[PoolName], Transport],
        directory: ReplicaDirectory,
    ) -> None:
        self._gate = gate
        self._connect = connect
        self._directory = directory
        self._transports: dict[PoolName, Transport] = {}
        self._watches: dict[tuple[PoolName, ReplicaId], asyncio.Task[None]] = {}
        self._wakes: dict[PoolName, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Begin to follow the directory; call on the router's loop."""
        loop = asyncio.get_running_loop()

        def tell(pool: PoolName, replicas: frozenset[ReplicaId]) -> None:
            loop.call_soon_threadsafe(self._update, pool, replicas)

        self._directory.listen(tell)

    def connect(self, pools: Iterable[PoolName]) -> None:
        """Make sure that each of these pools has a transport."""
        for pool in pools:
            if pool not in self._transports:
                self._transports[pool] = self._connect(pool)

    def transport(self, pool: PoolName) -> Transport:
        """Return the transport of a pool that was connected."""
        return self._transports[pool]

    def wake_empty(self) -> None:
        """Ask for a first replica wherever requests wait and none is there; once each.

        It is no request's own call: whoever waited may leave, and the pool still wakes.
        """
        for pool, transport in self._transports.items():
            waiting = self._gate.queue_depth(pool) and not self._gate.replicas(pool)
            if waiting and pool not in self._wakes:
                logger.info("waking pool %s", pool)
                self._wakes[pool] = asyncio.create_task(self._wake(pool, transport))

    async def stop(self) -> None:
        """End all watches."""
        watches = [*self._watches.values(), *self._wakes.values()]
        self._watches.clear()
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)

    def _update(self, pool: PoolName, replicas: frozenset[ReplicaId]) -> None:
        for key in [key for key in self._watches if key[0] == pool and key[1] not in replicas]:
            self._watches.pop(key).cancel()
            self._gate.forget(key[1])
        for replica in replicas:
            if (pool, replica) not in self._watches and pool in self._transports:
                watch = asyncio.create_task(self._watch(pool, replica))
                self._watches[pool, replica] = watch

    async def _wake(self, pool: PoolName, transport: Transport) -> None:
        try:
            await transport.wake()
        except Exception as error:  # noqa: BLE001  # it is tried again while requests wait
            logger.warning("pool %s could not be woken: %.200s", pool, error)
        finally:
            self._wakes.pop(pool, None)

    async def _watch(self, pool: PoolName, replica: ReplicaId) -> None:
        call = WatchCall(replica)
        while True:
            try:
                async with aclosing(self._transports[pool].watch(call)) as views:
                    async for view in views:
                        self._gate.observe(view)
            except EngineDead as error:
                logger.warning("lost replica %s of pool %s: %s", replica, pool, error)
                self._gate.forget(replica)
            except Exception:
                logger.exception("watching replica %s of pool %s failed", replica, pool)
                self._gate.forget(replica)
            await asyncio.sleep(REWATCH_S)
