"""What one router has coming in: the frames of a stream, the load of a replica."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from serve_app.core.types import ReplicaView
from serve_app.engine.address import Address, ReplyTo
from serve_app.engine.api import EngineDead, Final, Frame, ReaderTooSlow, Refusal


class Line:
    """One replica as a router reaches it: where it takes calls, its load, the open streams.

    Of its load only the newest view counts. ``idle`` is set while no stream is open.
    """

    def __init__(self) -> None:
        self.address: Address | None = None
        self.inflows: set[Inflow] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self._newest: ReplicaView | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, view: ReplicaView) -> None:
        """Take a view; one that nobody read yet is replaced."""
        self._newest = view
        self._wake()

    def fail(self, error: Exception) -> None:
        """The replica is lost: so is its load, and every stream of it."""
        if self._error is None:
            self._error = error
            self._wake()
            for inflow in list(self.inflows):
                inflow.fail(error)

    @property
    def error(self) -> Exception | None:
        """Why the replica is lost, None while it is not."""
        return self._error

    def add(self, inflow: Inflow) -> None:
        """A stream of the replica is open."""
        self.inflows.add(inflow)
        self.idle.clear()

    def remove(self, inflow: Inflow) -> None:
        """A stream of the replica has ended."""
        self.inflows.discard(inflow)
        if not self.inflows:
            self.idle.set()

    async def take(self) -> ReplicaView:
        """Return the newest view that was not taken yet, waiting for one.

        Raises:
            EngineDead: the replica is lost.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._newest is not None:
                view, self._newest = self._newest, None
                return view
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Inflow:
    """One stream at the router: frames that arrived, and how it ended.

    ``ended`` is set when the engine has nothing more to say of it.
    """

    def __init__(
        self,
        reply: ReplyTo,
        line: Line,
        buffer_bytes: int,
        on_overflow: Callable[[], None],
        *,
        coalesce: bool = True,
    ) -> None:
        self.reply = reply
        self.line = line
        self.ended = False
        self._buffer_bytes = buffer_bytes
        self._on_overflow = on_overflow
        self._coalesce = coalesce
        self._frames: deque[tuple[bytes, Sequence[int]]] = deque()
        self._bytes = 0
        self._arrived = 0
        self._result: Final | Refusal | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def failed(self) -> bool:
        """Whether the stream ended with an error."""
        return self._error is not None

    def push(self, sequence: int, data: bytes, token_ids: Sequence[int]) -> None:
        """Take a frame from the channel."""
        if self._error is not None:
            return
        if sequence != self._arrived:
            self.fail(EngineDead(f"frame {sequence} arrived in place of {self._arrived}"))
            return
        self._arrived += 1
        if self._frames and self._bytes + len(data) > self._buffer_bytes:
            self.fail(ReaderTooSlow(f"{self._bytes} bytes wait for a client that does not read"))
            self._on_overflow()
            return
        self._frames.append((data, token_ids))
        self._bytes += len(data)
        self._wake()

    def end(self, result: Final | Refusal) -> None:
        """Take the engine's last word; all frames that it counts have come before."""
        if isinstance(result, Final) and result.frames != self._arrived:
            self.fail(EngineDead(f"{self._arrived} of {result.frames} frames arrived"))
            return
        self._result = result
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error; what waits is dropped."""
        if self._error is None:
            self._error = error
            self._frames.clear()
            self._bytes = 0
            self._wake()

    async def take(self) -> Frame | Final | Refusal:
        """Return the next frame, or the result after the last one.

        Frames that came in while the reader was busy are handed over as one, unless told
        otherwise: events keep their bounds, and a reader that keeps up gets each by itself.

        Raises:
            EngineDead, ReaderTooSlow: the stream failed.
        """
        while True:
            if self._frames:
                return self._next()
            if self._error is not None:
                raise self._error
            if self._result is not None:
                return self._result
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _next(self) -> Frame:
        frames = self._frames
        if len(frames) == 1 or not self._coalesce:
            data, token_ids = frames.popleft()
        else:
            data = b"".join(each for each, _ in frames)
            token_ids = [token for _, tokens in frames for token in tokens]
            frames.clear()
        self._bytes = self._bytes - len(data) if frames else 0
        return Frame(self._arrived - len(frames) - 1, data, tuple(token_ids))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
