"""Serve's request router for engine pools: it obeys the order that core decided.

A call names the replicas it may go to, best first. Serve tries them one by one, moving
on when a replica rejects it; a call none of whose replicas is left fails at once, so
that the core can place it anew instead of Serve queueing it out of order.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.request_router.common import PendingRequest
from ray.serve._private.request_router.replica_wrapper import RunningReplica
from ray.serve.request_router import RequestRouter

from serve_app.core.types import PoolName, ReplicaId
from serve_app.engine import api, replica_directory


class PlacementRouter(RequestRouter):  # type: ignore[misc]  # ray ships no types for it
    """Ranks replicas as the call's ``target`` and ``fallbacks`` say."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Publish the replica set, and fail the calls whose replicas are all gone."""
        super().update_replicas(replicas)
        ids = frozenset(ReplicaId(replica.replica_id.unique_id) for replica in replicas)
        for pending in list(self._pending_requests_by_id.values()):
            wanted = _wanted(pending)
            if wanted and not ids.intersection(wanted):
                self._fail(pending)
        pool = PoolName(self._deployment_id.app_name.removeprefix("pool-"))
        replica_directory.DIRECTORY.publish(pool, ids)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return one rank per wanted replica still there; all of them if none is named.

        Serve's routing task looks at whether its call still wants a replica only when it
        is offered some. Offered none, it asks again for ever, and each such task keeps a
        later call from being routed: so a call that has failed is offered all, takes none.
        """
        if pending_request is None:
            return [candidate_replicas]
        # Without back-off Serve retries in a tight loop while every replica rejects.
        pending_request.routing_context.should_backoff = True
        wanted = _wanted(pending_request)
        if not wanted:
            return [candidate_replicas]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranks = [[by_id[replica]] for replica in wanted if replica in by_id]
        if not ranks:
            self._fail(pending_request)
            return [candidate_replicas]
        return ranks

    def _fail(self, pending: PendingRequest) -> None:
        if not pending.future.done():
            pending.future.set_exception(api.EngineDead("the chosen replica has left the pool"))
        self._remove_pending_request_from_indices(pending)


def _wanted(pending: PendingRequest) -> tuple[Any, ...]:
    """Return the replica ids a pending call names; empty when it names none."""
    call = pending.args[0] if pending.args else None
    if isinstance(call, api.GenerateCall | api.WatchCall):
        return (call.target, *call.fallbacks) if call.target is not None else ()
    return ()
