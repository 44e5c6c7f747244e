"""Draining nodes of a Ray cluster from outside it, through GCS."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Any, Final

RPC_S: Final = 5.0
_MS_PER_S: Final = 1000


class RayFailed(Exception):
    """Ray did not do what it was asked; the message says why."""


class RayNodes:
    """The nodes that GCS knows. Neither a raylet nor a driver is needed here."""

    def __init__(self, gcs_address: str) -> None:
        """``gcs_address`` is HOST:PORT; it is connected to when first asked."""
        self._address = gcs_address
        self._client: Any = None

    async def drain(self, names: Collection[str], notice_s: float, why: str) -> list[str]:
        """Have the nodes of these addresses or host names drained; return their ids.

        Serve replaces what runs on a draining node and stops it when its requests have ended.

        Raises:
            RayFailed: GCS cannot be reached or refuses.
        """
        try:
            return await asyncio.to_thread(self._drain, frozenset(names), notice_s, why)
        except Exception as error:
            self._client = None
            raise RayFailed(f"Ray at {self._address}: {error}") from error

    def _drain(self, names: frozenset[str], notice_s: float, why: str) -> list[str]:
        import ray

        if self._client is None:
            self._client = ray._raylet.GcsClient(address=self._address)
        alive = 0  # GcsNodeInfo.GcsNodeState.ALIVE
        drained = []
        for node_id, node in self._client.get_all_node_info(timeout=RPC_S).items():
            known_as = {node.node_manager_address, node.node_manager_hostname, node.node_name}
            if node.state != alive or not names & known_as:
                continue
            drain_node(self._client, node_id.hex(), notice_s, why)
            drained.append(node_id.hex())
        return drained


def drain_node(client: Any, node_id: str, notice_s: float, why: str) -> None:
    """Have GCS, asked through a ``GcsClient``, drain a node within ``notice_s`` from now.

    Raises:
        RayFailed: it refuses; what the client raises where GCS cannot be reached.
    """
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    deadline_ms = int((time.time() + notice_s) * _MS_PER_S)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    taken, refusal = client.drain_node(node_id, reason, why, deadline_ms, timeout=RPC_S)
    if not taken:
        raise RayFailed(f"the drain of {node_id} was refused: {refusal}")
