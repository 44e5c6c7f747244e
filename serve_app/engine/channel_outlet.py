"""One way out to one process: batched per turn of the event loop, sent without blocking.

While the other side does not read, messages wait here up to a bound. Beyond it, when nothing
could be sent for ``STALL_S``, or when the connection breaks, the outlet fails: what was under
way may be lost, so every stream on it ends at once and its generation is aborted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq
from zmq.utils.monitor import recv_monitor_message

from serve_app.engine.address import Address
from serve_app.engine.channel import End, Record, pack_batch

BATCHES_IN_SOCKET = 256
WAITING_BYTES_MAX = 32 * 1024 * 1024
CONNECT_S = 5.0
STALL_S = 10.0
RETRY_S = 0.002
# Longer than an engine or router may be paused; a process that ends is noticed at once.
HEARTBEAT_MS = 5000
HEARTBEAT_TIMEOUT_MS = 15_000

_BROKEN = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class StreamLost(RuntimeError):
    """The reader of a stream does not take its frames."""


class Outlet:
    """A connection to a process; on one event loop only.

    ``failed`` says why, once it has; then ``on_failed`` is called with it.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        target: Address,
        keys: tuple[bytes, bytes],
        clock: Callable[[], float],
    ) -> None:
        """Begin to connect; ``keys`` are this process's own, public and secret."""
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._socket = socket = context.socket(zmq.PUSH)
        socket.linger = 0
        socket.sndhwm = BATCHES_IN_SOCKET
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        socket.curve_serverkey = target.server_key
        socket.curve_publickey, socket.curve_secretkey = keys
        self._monitor = socket.get_monitor_socket(_BROKEN | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._descriptor = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._look)
        socket.connect(target.endpoint)
        self._connecting: asyncio.TimerHandle | None = self._loop.call_later(
            CONNECT_S, self._fail, f"it was not reached within {CONNECT_S:g} seconds"
        )
        self._records: list[Record] = []
        self._ends: list[End] = []
        self._flushing = False
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._stalled_at_s: float | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._used_at_s = clock()
        self.subscribers = 0
        self.failed: str | None = None
        self.on_failed: Callable[[str], None] | None = None
        # Events may have come before the reader was there.
        self._loop.call_soon(self._look)

    def unused_for_s(self) -> float:
        """How long nobody has used it; 0 while somebody does."""
        if self._tasks or self.subscribers:
            return 0.0
        return self._clock() - self._used_at_s

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """Send a stream within; the running task is interrupted when the outlet fails.

        Raises:
            StreamLost: the outlet failed.
        """
        task = asyncio.current_task()
        assert task is not None
        self._lost()
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.failed is not None:
                task.uncancel()
            self._lost()
            raise
        finally:
            self._tasks.discard(task)
            self._used_at_s = self._clock()

    def write(self, record: Record) -> None:
        """Add a frame to this turn's batch."""
        self._records.append(record)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def end(self, end: End) -> None:
        """Add a stream's ending to this turn's batch, behind its frames."""
        self._ends.append(end)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def send(self, message: bytes) -> None:
        """Send a message by itself, in order with others like it."""
        self._used_at_s = self._clock()
        if self.failed is None and (self._waiting or not self._try(message)):
            self._wait(message)

    def tell(self, message: bytes) -> bool:
        """Send a message that only counts now; return False if the router does not read."""
        self._used_at_s = self._clock()
        if self.failed is not None or self._waiting:
            return False
        return self._try(message)

    def close(self) -> None:
        """Close the socket; what was not sent is dropped."""
        if self._socket.closed:
            return
        for timer in (self._retry, self._connecting):
            if timer is not None:
                timer.cancel()
        self._loop.remove_reader(self._descriptor)
        self._socket.disable_monitor()
        self._socket.close(linger=0)
        self._waiting.clear()
        self._records.clear()
        self._ends.clear()

    def _lost(self) -> None:
        """Raise StreamLost if the outlet has failed."""
        if self.failed is not None:
            raise StreamLost(self.failed)

    def _look(self) -> None:
        """Take what ZeroMQ says of the connection."""
        while self.failed is None and not self._socket.closed:
            try:
                event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
            except zmq.ZMQError:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._connecting is not None:
                    self._connecting.cancel()
                    self._connecting = None
            elif event & _BROKEN:
                self._fail("the connection broke")

    def _flush(self) -> None:
        if self._socket.closed:
            return
        self._flushing = False
        message = pack_batch(self._records, self._ends)
        self._records, self._ends = [], []
        if self._waiting or not self._try(message):
            self._wait(message)

    def _try(self, message: bytes) -> bool:
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _wait(self, message: bytes) -> None:
        self._waiting.append(message)
        self._waiting_bytes += len(message)
        if self._waiting_bytes > WAITING_BYTES_MAX:
            self._fail(f"it left {self._waiting_bytes} bytes unread")
        elif self._retry is None:
            self._stalled_at_s = self._clock()
            self._retry = self._loop.call_later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        while self._waiting:
            if not self._try(self._waiting[0]):
                assert self._stalled_at_s is not None
                if self._clock() - self._stalled_at_s > STALL_S:
                    self._fail(f"it took nothing for {STALL_S:g} seconds")
                else:
                    self._retry = self._loop.call_later(RETRY_S, self._try_again)
                return
            self._waiting_bytes -= len(self._waiting.popleft())
            self._stalled_at_s = self._clock()
        self._stalled_at_s = None

    def _fail(self, reason: str) -> None:
        """Give the router up: its streams end now, with StreamLost."""
        if self.failed is not None:
            return
        self.failed = reason
        self.close()
        for task in self._tasks:
            if not task.cancelling():
                task.cancel()
        if self.on_failed is not None:
            self.on_failed(reason)
