"""The token channel's wire: what an engine sends to a router beside the Serve call.

One PUSH socket per engine and router, connected to the router's one PULL socket. A message
is a batch: msgpack of ``[[stream, sequence, data, token_ids], ...]``, the frames that the
engine handed over within one turn of its event loop, of all streams to that router. The
Serve call that made a stream returns its Final with the number of frames, so that a frame
that was lost is an error and never a silent truncation.

Every router process makes a CURVE key pair when it starts. Its public key travels only in
Serve calls, so it is also what lets an engine in; a restarted router on the same port has
another key and never hears the frames of its predecessor's streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

# A non-streamed body travels as one frame. A message above this ends the connection, and
# the streams on it with an error.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024

Record = tuple[int, int, bytes, tuple[int, ...]]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Record])


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the frames of one call go: a router's channel, and the stream's number on it."""

    endpoint: str
    server_key: bytes
    stream: int


def pack(records: Sequence[Record]) -> bytes:
    """Return a batch of records ``(stream, sequence, data, token_ids)`` as one message."""
    return _encoder.encode(records)


def unpack(message: bytes) -> list[Record]:
    """Return the records of a message.

    Raises:
        ValueError: it is not a batch.
    """
    try:
        return _decoder.decode(message)
    except msgspec.DecodeError as error:
        raise ValueError(f"a message on the token channel is not a batch: {error}") from error
