"""What vLLM's engine process tells its replica of its steps, and the socket in between.

A Unix socket of packets: what was sent before the engine's output has arrived before it,
so the replica reads when it must know and nothing wakes it. It is bounded by the kernel;
a sender that finds it full keeps its records (``step_log.py`` bounds those).

Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import logging
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

SOCKET_VARIABLE = "HEADRACE_STEP_SOCKET"
PACKET_BYTES_MAX = 128 * 1024

_log = logging.getLogger("headrace.engine")


class Joined(msgspec.Struct, frozen=True, array_like=True, tag="+"):
    """The engine has a request of this id, which is ``number`` from now on."""

    number: int
    request_id: str


class Left(msgspec.Struct, frozen=True, array_like=True, tag="-"):
    """The request has ended and no further step contains it."""

    number: int


class Occupied(msgspec.Struct, frozen=True, array_like=True, tag="o"):
    """The engine has an unfinished request and had none."""

    at_s: float


class Vacant(msgspec.Struct, frozen=True, array_like=True, tag="v"):
    """The engine has neither an unfinished request nor a step under way."""

    since_s: float


class Stepped(msgspec.Struct, array_like=True, tag="s"):
    """Steps of one composition are over.

    ``decodes`` are number and context of every sequence that decodes, in turn; None stands
    for those of the steps before these, one token further each step. ``prefills`` are
    number, tokens, computed tokens, repeated tokens and read tokens, as ``Chunk`` has them.
    Neither: the engine took a turn without computing anything.
    """

    start_s: float
    end_s: float
    steps: int
    decodes: list[int] | None
    prefills: list[int]


class Lost(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """So many records of steps found no room: their time is nobody's."""

    records: int


class Stopped(msgspec.Struct, frozen=True, array_like=True, tag="."):
    """Nothing more is recorded: all further time is nobody's."""


Record = Joined | Left | Occupied | Vacant | Stepped | Lost | Stopped


class StepSender:
    """The engine process's end. ``path`` None, or a path nobody listens at, sends nothing."""

    def __init__(self, path: str | None) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._socket: socket.socket | None = None
        if path is None:
            return
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
        try:
            end.connect(path)
        except OSError as error:
            end.close()
            _log.warning("steps are not recorded: nobody listens", extra={"reason": str(error)})
            return
        end.setblocking(False)
        self._socket = end

    def send(self, records: Sequence[Record]) -> int:
        """Send as many as find room now; how many, from the first, need not be sent again."""
        sent, count = 0, len(records)
        while sent < len(records) and self._socket is not None:
            data = self._encoder.encode(records[sent : sent + count])
            if len(data) > PACKET_BYTES_MAX and count > 1:
                count //= 2
                continue
            try:
                self._socket.send(data)
            except BlockingIOError:
                return sent
            except OSError:
                # The replica is gone, and with it whoever wanted to know.
                self._socket.close()
                self._socket = None
            sent += count
        return len(records)


class StepInbox:
    """The replica's end: listens for one engine process, and reads without waiting."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-steps-")
        self.path = str(Path(self._folder.name) / "steps")
        self._buffer = bytearray(2 * PACKET_BYTES_MAX)
        self._decoder = msgspec.msgpack.Decoder(list[Record])
        self._engine: socket.socket | None = None
        self._listener: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._listener.setblocking(False)

    def receive(self) -> Iterator[Record]:
        """Yield what has arrived, in the order in which it was sent."""
        if self._engine is None and not self._accept():
            return
        assert self._engine is not None
        while True:
            try:
                size = self._engine.recv_into(self._buffer)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if not size:
                return
            yield from self._decoder.decode(memoryview(self._buffer)[:size])

    def close(self) -> None:
        """Stop listening and leave nothing on disk. Idempotent."""
        self._stop_listening()
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _accept(self) -> bool:
        if self._listener is None:
            return False
        with suppress(BlockingIOError):
            self._engine, _ = self._listener.accept()
            self._engine.setblocking(False)
            self._stop_listening()
        return self._engine is not None

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            self._folder.cleanup()
