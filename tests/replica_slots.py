"""The gate as a lease sees it: replicas to move along, tokens that were counted."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.core.types import (
    Dispatch,
    Failure,
    PoolName,
    Reject,
    RejectReason,
    ReplicaId,
    RequestId,
)
from serve_app.gate import Refused


class ReplicaSlots:
    """Hands a request to ``replicas`` in turn, then refuses it for ``reason``."""

    def __init__(
        self,
        pool: PoolName,
        replicas: Sequence[str],
        reason: RejectReason = RejectReason.NO_REPLICA,
    ) -> None:
        self.left = [ReplicaId(name) for name in replicas]
        self.failed: list[str] = []
        self.reasons: list[Failure] = []
        self.tokens = 0
        self.firsts = 0
        self._pool = pool
        self._reason = reason

    def dispatch(self) -> Dispatch:
        return Dispatch(RequestId("q"), self._pool, tuple(self.left), queued_s=0.0)

    def progress(
        self, replica: ReplicaId, request_id: RequestId, tokens: int, *, first: bool
    ) -> None:
        self.tokens += tokens
        self.firsts += first

    def fail(self, request_id: RequestId, replica: ReplicaId, why: Failure) -> Dispatch:
        self.failed.append(replica)
        self.reasons.append(why)
        self.left.remove(replica)
        if not self.left:
            raise Refused(Reject(request_id, self._reason, 1.0))
        return self.dispatch()
