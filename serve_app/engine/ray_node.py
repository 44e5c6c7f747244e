"""This process's node, as Ray's GCS knows it: whether it drains, and how to have it drained."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import ray

from serve_app.engine.eviction import EvictionNotice
from serve_app.ray_nodes import drain_node

RPC_S: Final = 2.0
_MS_PER_S: Final = 1000


class RayNode:
    """A source of notice: Ray marks a node as draining on SIGTERM and on `ray drain-node`.

    Only GCS knows until when: Serve tells a replica neither.
    """

    name: Final = "node"

    def __init__(self) -> None:
        """Call it in a Ray worker."""
        context = ray.get_runtime_context()
        self._node: str = context.get_node_id()
        self._gcs: Any = ray._raylet.GcsClient(address=context.gcs_address)

    async def look(self) -> EvictionNotice | None:
        """See EvictionSource."""
        draining = await asyncio.to_thread(self._gcs.get_draining_nodes, timeout=RPC_S)
        if self._node not in draining:
            return None
        deadline_ms = int(draining[self._node])
        return EvictionNotice(deadline_ms / _MS_PER_S if deadline_ms else None, self.name)

    async def drain(self, notice_s: float, why: str) -> None:
        """Tell Ray that the node goes: Serve and the autoscaler then replace what is on it.

        Raises:
            RayFailed: Ray refuses.
        """
        await asyncio.to_thread(drain_node, self._gcs, self._node, notice_s, why)
