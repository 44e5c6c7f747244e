"""Which replicas Ray Serve says each pool has, as seen by this process.

Serve tells a handle's request router; the Router deployment needs to know, to subscribe
to each replica's load. Serve builds the request router itself and pickles its class by
value, so the two can only meet in a module: this one holds the process's directory.
With Serve's throughput flags both live on one loop; without them the request router
runs on a thread of its own, hence the lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from serve_app.core.types import PoolName, ReplicaId

Listener = Callable[[PoolName, frozenset[ReplicaId]], None]


class ReplicaDirectory:
    """Replica sets by pool. Listeners run on the publishing thread and must not block."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: dict[PoolName, frozenset[ReplicaId]] = {}
        self._listeners: list[Listener] = []

    def publish(self, pool: PoolName, replicas: frozenset[ReplicaId]) -> None:
        """Replace the set of a pool and tell every listener."""
        with self._lock:
            self._replicas[pool] = replicas
            listeners = list(self._listeners)
        for listener in listeners:
            listener(pool, replicas)

    def listen(self, listener: Listener) -> None:
        """Call ``listener`` with every set known now and with each change from now on."""
        with self._lock:
            self._listeners.append(listener)
            known = list(self._replicas.items())
        for pool, replicas in known:
            listener(pool, replicas)


# The one module-level object in the package: see the module docstring for why.
DIRECTORY = ReplicaDirectory()
