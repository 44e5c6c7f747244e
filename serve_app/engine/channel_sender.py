"""The engine's end of the token channel: frames out, batched per turn of the event loop.

A send never blocks. While a router does not read, batches wait here up to a bound; beyond
it, or when nothing could be sent for ``stall_s``, every stream to that router ends with
StreamLost and its generation is aborted.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import zmq

from serve_app.engine.api import Final, Frame, GenerateItem, Refusal
from serve_app.engine.channel import Record, ReplyTo, pack

BATCHES_IN_SOCKET = 256
WAITING_BYTES_MAX = 32 * 1024 * 1024
STALL_S = 10.0
RETRY_S = 0.002
IDLE_S = 60.0
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 3000


class StreamLost(RuntimeError):
    """The router of a stream does not take its frames."""


class ChannelSender:
    """All channels of one engine replica; on its event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = zmq.Context(io_threads=1)
        self._keys = zmq.curve_keypair()
        self._clock = clock
        self._outlets: dict[tuple[str, bytes], _Outlet] = {}

    async def deliver(
        self, items: AsyncGenerator[GenerateItem, None], reply: ReplyTo
    ) -> Final | Refusal:
        """Send every frame of a generation; return its last item.

        Raises:
            StreamLost: the router does not take them; the generation was closed.
            EngineDead: the engine died.
        """
        outlet = self._outlet(reply)
        outlet.streams += 1
        try:
            async with aclosing(items):
                async for item in items:
                    if not isinstance(item, Frame):
                        return item
                    outlet.write((reply.stream, item.sequence, item.data, item.token_ids))
        finally:
            outlet.streams -= 1
            outlet.used_at_s = self._clock()
        raise StreamLost("the engine ended a generation without its last item")

    def close(self) -> None:
        """Close every channel; what has not been sent is dropped."""
        for outlet in self._outlets.values():
            outlet.close()
        self._outlets.clear()
        self._context.destroy(linger=0)

    def _outlet(self, reply: ReplyTo) -> _Outlet:
        key = (reply.endpoint, reply.server_key)
        outlet = self._outlets.get(key)
        if outlet is None or outlet.failed is not None:
            self._close_unused()
            outlet = self._outlets[key] = _Outlet(self._connect(reply), self._clock)
        return outlet

    def _connect(self, reply: ReplyTo) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.linger = 0
        socket.sndhwm = BATCHES_IN_SOCKET
        socket.heartbeat_ivl = HEARTBEAT_MS
        socket.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        socket.curve_serverkey = reply.server_key
        socket.curve_publickey, socket.curve_secretkey = self._keys
        socket.connect(reply.endpoint)
        return socket

    def _close_unused(self) -> None:
        """Close what no stream uses: channels to routers that are gone."""
        idle_since_s = self._clock() - IDLE_S
        for key, outlet in list(self._outlets.items()):
            if not outlet.streams and (outlet.failed or outlet.used_at_s < idle_since_s):
                self._outlets.pop(key).close()


class _Outlet:
    """One channel: records of this turn, and packed batches that could not be sent yet."""

    def __init__(self, socket: zmq.Socket[bytes], clock: Callable[[], float]) -> None:
        self._socket = socket
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._records: list[Record] = []
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._stalled_at_s: float | None = None
        self._retry: asyncio.TimerHandle | None = None
        self.streams = 0
        self.used_at_s = clock()
        self.failed: str | None = None

    def write(self, record: Record) -> None:
        """Add a record to this turn's batch.

        Raises:
            StreamLost: the router has not taken anything for too long.
        """
        if self.failed is not None:
            raise StreamLost(self.failed)
        if not self._records:
            self._loop.call_soon(self._flush)
        self._records.append(record)

    def close(self) -> None:
        """Close the socket."""
        if self._retry is not None:
            self._retry.cancel()
        self._socket.close(linger=0)

    def _flush(self) -> None:
        if self._socket.closed:
            return
        records, self._records = self._records, []
        message = pack(records)
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
        """Give the channel up: its streams end at their next frame."""
        self.failed = reason
        self._waiting.clear()
        self._waiting_bytes = 0
