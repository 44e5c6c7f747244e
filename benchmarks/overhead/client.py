"""A cheap HTTP/1.1 client for measuring: raw reads with their times, parsed afterwards.

While an answer arrives, a read costs one clock call and one append. Its framing, its events
and its end are checked once it is complete, so that a cut or merged stream is never counted
as a good one.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import cast

EVENT = b"data: "
DONE = b"data: [DONE]\n\n"
_LAST_CHUNK = b"0\r\n\r\n"
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


class BadAnswer(Exception):
    """An answer that is not complete and as asked for."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One answer as it came: its reads in order with their monotonic times in seconds."""

    reads: list[bytes]
    times_s: list[float]

    def body(self) -> tuple[int, bytes]:
        """Return the status and the body without its transfer coding.

        Raises:
            BadAnswer: the framing is broken, or something follows the end.
        """
        data = b"".join(self.reads)
        head, separator, rest = data.partition(_HEAD_END)
        if not separator or not head.startswith(b"HTTP/1.1 "):
            raise BadAnswer(f"not an HTTP/1.1 answer: {data[:80]!r}")
        status = int(head[9:12])
        if _CHUNKED.search(head):
            return status, _dechunked(rest)
        length = _LENGTH.search(head)
        if length is None or int(length[1]) != len(rest):
            raise BadAnswer(f"content-length does not match {len(rest)} bytes: {head!r}")
        return status, rest

    def arrivals(self) -> tuple[list[float], int]:
        """Return when each read with an event in it came, and how many events these had."""
        times_s, events = [], 0
        for data, at_s in zip(self.reads, self.times_s, strict=True):
            count = data.count(EVENT)
            if count:
                times_s.append(at_s)
                events += count
        return times_s, events


class Connection(asyncio.Protocol):
    """One keep-alive connection: one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Exchange] | None = None
        self._reads: list[bytes] = []
        self._times_s: list[float] = []
        self._missing_bytes: int | None = None
        self._chunked = False
        self.usable = False

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Connect."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, host, port)
        return connection

    async def exchange(self, request: bytes, timeout_s: float) -> Exchange:
        """Send one request and return its whole answer.

        Raises:
            BadAnswer: the connection ended before the answer did, or it took too long.
        """
        assert self._transport is not None
        assert self._answer is None, "one exchange at a time"
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Exchange] = loop.create_future()
        self._answer = answer
        self._reads, self._times_s = [], []
        self._missing_bytes, self._chunked = None, False
        timer = loop.call_later(timeout_s, self._lost, f"no end within {timeout_s:g} s")
        self._transport.write(request)
        try:
            return await answer
        finally:
            timer.cancel()
            self._answer = None

    def close(self) -> None:
        """Close the connection."""
        self.usable = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are asyncio's in all but their base class.
        self._transport = cast(asyncio.Transport, transport)
        self.usable = True

    def connection_lost(self, _error: Exception | None) -> None:
        self.usable = False
        self._lost("the connection ended before the answer did")

    def data_received(self, data: bytes) -> None:
        self._times_s.append(time.perf_counter())
        self._reads.append(data)
        if self._chunked:
            tail = data if len(data) >= len(_LAST_CHUNK) else b"".join(self._reads[-5:])
            if tail.endswith(_LAST_CHUNK):
                self._complete()
        elif self._missing_bytes is not None:
            self._missing_bytes -= len(data)
            if self._missing_bytes <= 0:
                self._complete()
        else:
            self._read_head(data)

    def _read_head(self, data: bytes) -> None:
        """Find out how the answer ends; its head may come in several reads."""
        seen = data if len(self._reads) == 1 else b"".join(self._reads)
        end = seen.find(_HEAD_END)
        if end < 0:
            return
        head = seen[:end]
        if _CLOSES.search(head):
            self.usable = False
        if _CHUNKED.search(head):
            self._chunked = True
            if seen.endswith(_LAST_CHUNK):
                self._complete()
            return
        length = _LENGTH.search(head)
        self._missing_bytes = int(length[1]) - (len(seen) - end - 4) if length else 0
        if self._missing_bytes <= 0:
            self._complete()

    def _complete(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Exchange(self._reads, self._times_s))

    def _lost(self, why: str) -> None:
        self.usable = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BadAnswer(why))


def _dechunked(data: bytes) -> bytes:
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = data.find(b"\r\n", at)
        if line_end < 0:
            raise BadAnswer("the chunked body has no end")
        size = int(data[at:line_end], 16)
        begin = line_end + 2
        at = begin + size + 2
        if data[begin + size : at] != b"\r\n":
            raise BadAnswer("a chunk of the body does not end where it says")
        if size == 0:
            if at != len(data):
                raise BadAnswer("bytes follow the end of the body")
            return b"".join(parts)
        parts.append(data[begin : begin + size])
