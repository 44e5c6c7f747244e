"""A cheap HTTP/1.1 client for measuring: raw reads with their times, parsed afterwards.

    async with LoadClient(url, key) as client:
        exchange = await client.post("/v1/chat/completions", body)
        status, body = exchange.body()

While an answer arrives, a read costs one clock call and one append. Its framing, its events
and its end are checked once it is complete, so that a cut or merged stream is never counted
as a good one.
"""

from __future__ import annotations

import asyncio
import bisect
import re
import ssl
import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, cast
from urllib.parse import urlsplit

EVENT = b"data: "
DONE = b"data: [DONE]\n\n"
REQUEST_TIMEOUT_S: Final = 600.0
_TEXT = re.compile(rb'"content": ?"[^"]')
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

    @property
    def ended_s(self) -> float:
        """When the last of it came."""
        return self.times_s[-1]

    def first_text_s(self) -> float | None:
        """Return when the first content that is not empty came; None if there was none."""
        found = _TEXT.search(b"".join(self.reads))
        if found is None:
            return None
        ends = list(accumulate(map(len, self.reads)))
        return self.times_s[bisect.bisect_left(ends, found.end())]

    def arrivals(self) -> tuple[list[float], int]:
        """Return when each read with an event in it came, and how many events these had."""
        times_s, events = [], 0
        for data, at_s in zip(self.reads, self.times_s, strict=True):
            count = data.count(EVENT)
            if count:
                times_s.append(at_s)
                events += count
        return times_s, events


class LoadClient:
    """Posts JSON to one server over connections that are kept; on one event loop."""

    def __init__(self, url: str, key: str | None) -> None:
        """``url`` is the server's base, with or without a path; ``key`` a bearer token."""
        where = urlsplit(url)
        self._tls = where.scheme == "https"
        self._host = where.hostname or "127.0.0.1"
        self._port = where.port or (443 if self._tls else 80)
        self._path = where.path.rstrip("/")
        named = f"authorization: Bearer {key}\r\n" if key else ""
        self._headers = f"host: {where.netloc}\r\n{named}content-type: application/json\r\n"
        self._free: list[Connection] = []

    async def __aenter__(self) -> LoadClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def request(self, path: str, body: bytes) -> bytes:
        """Return the bytes of a request; they may be sent any number of times."""
        line = f"POST {self._path}{path} HTTP/1.1\r\n"
        return f"{line}{self._headers}content-length: {len(body)}\r\n\r\n".encode() + body

    async def post(self, path: str, body: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> Exchange:
        """Send a request and return its whole answer; see ``send``."""
        return await self.send(self.request(path, body), timeout_s)

    async def send(self, request: bytes, timeout_s: float = REQUEST_TIMEOUT_S) -> Exchange:
        """Send a request's bytes and return its whole answer.

        Raises:
            BadAnswer: the connection ended before the answer did, or it took too long.
            OSError: there is no connection.
        """
        connection = await self._connection()
        try:
            exchange = await connection.exchange(request, timeout_s)
        except BaseException:  # a cancelled one leaves its answer behind
            connection.close()
            raise
        if connection.usable:
            self._free.append(connection)
        return exchange

    def idle(self) -> int:
        """Return how many connections are open and carry no request."""
        return sum(connection.usable for connection in self._free)

    def close(self) -> None:
        """Close the connections that carry no request."""
        for connection in self._free:
            connection.close()
        self._free.clear()

    async def _connection(self) -> Connection:
        """Return the connection used last that the server has not closed, or a new one."""
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                return connection
        return await Connection.open(self._host, self._port, tls=self._tls)


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
    async def open(cls, host: str, port: int, *, tls: bool = False) -> Connection:
        """Connect.

        Raises:
            OSError: nobody is there, or its certificate is not to be trusted.
        """
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if tls else None
        _, connection = await loop.create_connection(cls, host, port, ssl=context)
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
