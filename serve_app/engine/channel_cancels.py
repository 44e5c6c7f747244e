"""Streams that nobody reads any more, until their engine says that they have ended.

A cancel may be lost with the connection that it was sent on: one that broke, or one that an
engine left full while it stood still. Nobody would end such a generation before its own end,
so each cancel is sent again until the engine has answered it.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.engine.address import Address

AGAIN_S = 1.0
# An engine that stands still for longer has long been replaced: it answered no health check.
KEEP_S = 600.0
CANCELS_MAX = 16_384


@dataclass(slots=True)
class _Left:
    engine: Address
    left_at_s: float
    sent_at_s: float


class Cancels:
    """One router's cancels that no engine has answered; without I/O.

    Each is kept for ``KEEP_S``, and the newest ``CANCELS_MAX`` of them: the process that should
    answer may be gone.
    """

    def __init__(self) -> None:
        self._left: dict[int, _Left] = {}

    def __len__(self) -> int:
        return len(self._left)

    def sent(self, stream: int, engine: Address, now_s: float) -> None:
        """The reader of a stream has left, and its engine was told."""
        if len(self._left) >= CANCELS_MAX:
            del self._left[next(iter(self._left))]
        self._left[stream] = _Left(engine, now_s, now_s)

    def answered(self, stream: int) -> None:
        """The engine has ended a stream; one that was not left is ignored."""
        self._left.pop(stream, None)

    def due(self, now_s: float) -> dict[Address, list[int]]:
        """Return the streams that each engine is to be told of again, now."""
        due: dict[Address, list[int]] = {}
        for stream, left in list(self._left.items()):
            if now_s - left.left_at_s > KEEP_S:
                del self._left[stream]
            elif now_s - left.sent_at_s >= AGAIN_S:
                left.sent_at_s = now_s
                due.setdefault(left.engine, []).append(stream)
        return due
