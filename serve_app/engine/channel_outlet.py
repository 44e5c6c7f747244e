"""One way out to one router: batched per turn of the event loop, sent without blocking.

While a router does not read, batches wait here up to a bound. Beyond it, when nothing could be
sent for ``STALL_S``, or when the connection breaks, the outlet fails: what was under way may
be lost, so every stream on it ends at once and its generation is aborted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq
from zmq.utils.monitor import recv_monitor_message

from serve_app.engine.channel import Address, Batch, Record, pack

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
    """The router of a stream does not take its frames."""


class Outlet:
    """A connection to a router; on one event loop only."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        router: Address,
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
        socket.curve_serverkey = router.server_key
        socket.curve_publickey, socket.curve_secretkey = keys
        self._monitor = socket.get_monitor_socket(_BROKEN | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._descriptor = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._look)
        socket.connect(router.endpoint)
        self._connecting: asyncio.TimerHandle | None = self._loop.call_later(
            CONNECT_S, self._fail, f"the router was not reached within {CONNECT_S:g} seconds"
        )
        self._records: list[Record] = []
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._stalled_at_s: float | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._used_at_s = clock()
        self.subscribers = 0
        self.failed: str | None = None
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

        The outlet has not failed yet.

        Raises:
            StreamLost: the outlet failed.
        """
        task = asyncio.current_task()
        assert task is not None
        assert self.failed is None, "streams begin on outlets that work"
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            reason = self._reason()
            if reason is None:
                raise
            task.uncancel()
            raise StreamLost(reason) from None
        finally:
            self._tasks.discard(task)
            self._used_at_s = self._clock()

    def write(self, record: Record) -> None:
        """Add a record to this turn's batch."""
        if not self._records:
            self._loop.call_soon(self._flush)
        self._records.append(record)

    def tell(self, message: bytes) -> bool:
        """Send a message that only counts now; return False if the router does not read."""
        self._used_at_s = self._clock()
        if self.failed is not None or self._waiting:
            return False
        return self._send(message)

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

    def _reason(self) -> str | None:
        return self.failed

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
                self._fail("the connection to the router broke")

    def _flush(self) -> None:
        if self._socket.closed:
            return
        records, self._records = self._records, []
        message = pack(Batch(records))
        if self._waiting or not self._send(message):
            self._wait(message)

    def _send(self, message: bytes) -> bool:
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _wait(self, message: bytes) -> None:
        self._waiting.append(message)
        self._waiting_bytes += len(message)
        if self._waiting_bytes > WAITING_BYTES_MAX:
            self._fail(f"the router left {self._waiting_bytes} bytes unread")
        elif self._retry is None:
            self._stalled_at_s = self._clock()
            self._retry = self._loop.call_later(RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._retry = None
        while self._waiting:
            if not self._send(self._waiting[0]):
                assert self._stalled_at_s is not None
                if self._clock() - self._stalled_at_s > STALL_S:
                    self._fail(f"the router took nothing for {STALL_S:g} seconds")
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
            task.cancel()
