"""The router's end of the token channel: one bound socket, frames sorted into streams."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from serve_app.core.exchange import Digest
from serve_app.core.types import ReplicaId, ReplicaView
from serve_app.engine.api import EngineDead, Final, Frame, ReaderTooSlow, Refusal
from serve_app.engine.channel import (
    MAX_MESSAGE_BYTES,
    Address,
    Batch,
    Load,
    Record,
    ReplyTo,
    unpack,
)

logger = logging.getLogger("headrace.channel")

BATCHES_IN_SOCKET = 1024
BATCHES_PER_TURN = 32


class ChannelReceiver:
    """Receives for one router process; on its event loop only.

    ``on_told`` is called with what another router tells.
    """

    def __init__(self, host: str, ports: range, stream_buffer_bytes: int) -> None:
        """Bind a free port of ``ports`` on ``host`` and begin to receive.

        ``stream_buffer_bytes`` bounds what waits for one client. Call it on the loop.

        Raises:
            OSError: no port of the range is free.
        """
        public_key, secret_key = zmq.curve_keypair()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.rcvhwm = BATCHES_IN_SOCKET
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret_key
        self.address = Address(_bind(self._socket, host, ports), public_key)
        self._buffer_bytes = stream_buffer_bytes
        self._numbers = itertools.count()
        self._streams: dict[int, Inflow] = {}
        self._feeds: dict[ReplicaId, LoadFeed] = {}
        self.on_told: Callable[[Digest], None] = _ignore
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._receive)
        self.strays = 0

    def open(self) -> Inflow:
        """Return a new stream."""
        number = next(self._numbers)
        reply = ReplyTo(self.address, number)
        inflow = self._streams[number] = Inflow(reply, self._buffer_bytes)
        return inflow

    def forget(self, inflow: Inflow) -> None:
        """Drop what still arrives for a stream."""
        self._streams.pop(inflow.reply.stream, None)

    def follow(self, replica: ReplicaId) -> LoadFeed:
        """Return what will arrive of a replica's load, in place of an earlier feed of it."""
        feed = self._feeds[replica] = LoadFeed()
        return feed

    def unfollow(self, replica: ReplicaId, feed: LoadFeed) -> None:
        """Drop what still arrives for a feed."""
        if self._feeds.get(replica) is feed:
            del self._feeds[replica]

    def close(self) -> None:
        """Stop receiving."""
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)
        self._context.destroy(linger=0)

    def _receive(self) -> None:
        """Take what has arrived, at most BATCHES_PER_TURN batches at a time.

        ZeroMQ's descriptor tells of changes only, so what is left is asked for again.
        """
        for _ in range(BATCHES_PER_TURN):
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:  # closed meanwhile
                return
            self._sort(message)
        self._loop.call_soon(self._receive)

    def _sort(self, packed: bytes) -> None:
        try:
            message = unpack(packed)
        except ValueError as error:
            # If it held frames, their streams will miss them, and say so when they end.
            logger.error("a message on the token channel was dropped: %s", error)
            return
        if isinstance(message, Batch):
            self._spread(message.records)
        elif isinstance(message, Load):
            feed = self._feeds.get(message.view.replica)
            if feed is not None:
                feed.push(message.view)
        else:
            self.on_told(message.digest)

    def _spread(self, records: list[Record]) -> None:
        streams = self._streams
        for number, sequence, data, token_ids in records:
            inflow = streams.get(number)
            if inflow is None:
                self.strays += 1
            else:
                inflow.push(sequence, data, token_ids)


class LoadFeed:
    """The load of one replica as it arrives; only the newest counts."""

    def __init__(self) -> None:
        self._newest: ReplicaView | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def push(self, view: ReplicaView) -> None:
        """Take a view; one that nobody read yet is replaced."""
        self._newest = view
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the feed with an error."""
        self._error = error
        self._wake()

    async def take(self) -> ReplicaView:
        """Return the newest view that was not taken yet, waiting for one.

        Raises:
            EngineDead: the feed failed.
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
    """One stream at the router: frames that arrived, and how the call ended.

    ``on_overflow`` is called once if more arrives than may wait.
    """

    def __init__(self, reply: ReplyTo, buffer_bytes: int) -> None:
        self.reply = reply
        self._buffer_bytes = buffer_bytes
        self.on_overflow: Callable[[], None] = _nothing
        self._frames: deque[tuple[bytes, Sequence[int]]] = deque()
        self._bytes = 0
        self._arrived = 0
        self._result: Final | Refusal | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

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
            self.on_overflow()
            return
        self._frames.append((data, token_ids))
        self._bytes += len(data)
        self._wake()

    def end(self, result: Final | Refusal) -> None:
        """Take the call's result; frames that it counts may still be on their way."""
        self._result = result
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error; what waits is dropped."""
        if self._error is None:
            self._error = error
            self._frames.clear()
            self._bytes = 0
            self._wake()

    def fail_if_lacking(self) -> None:
        """End the stream if frames that the result counts have not come."""
        if self.lacks:
            self.fail(EngineDead(f"{self._arrived} frames arrived, fewer than were sent"))

    @property
    def lacks(self) -> bool:
        """Whether the call has ended and frames of it have not arrived."""
        return isinstance(self._result, Final) and self._arrived < self._result.frames

    async def take(self) -> Frame | Final | Refusal:
        """Return the next frame, or the result after the last one.

        Frames that came in while the reader was busy are handed over as one: events keep
        their bounds, and a reader that keeps up gets each by itself.

        Raises:
            EngineDead, ReaderTooSlow: the stream failed.
        """
        while True:
            if self._frames:
                return self._next()
            if self._error is not None:
                raise self._error
            if self._result is not None and not self.lacks:
                return self._result
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def _next(self) -> Frame:
        frames = self._frames
        if len(frames) == 1:
            data, token_ids = frames.popleft()
        else:
            data = b"".join(each for each, _ in frames)
            token_ids = [token for _, tokens in frames for token in tokens]
            frames.clear()
        self._bytes = 0
        return Frame(self._arrived - 1, data, tuple(token_ids))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _nothing() -> None:
    """Do nothing."""


def _ignore(digest: Digest) -> None:
    """Do nothing with it."""


def _bind(socket: zmq.Socket[bytes], host: str, ports: range) -> str:
    """Bind the first free port of the range; return the endpoint."""
    for port in ports:
        endpoint = f"tcp://{host}:{port}"
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise OSError(f"the token channel cannot bind {endpoint}: {error}") from error
        else:
            return endpoint
    raise OSError(
        f"no port of {ports.start}-{ports.stop - 1} is free on {host}; "
        "set channel.ports of the gateway's args to another range"
    )
