"""The token channel's wire: what engines and routers send to a router beside Serve calls.

One PUSH socket per sender and router, connected to the router's one PULL socket. A message is
msgpack, one of:

- Batch, from an engine: the frames that it handed over within one turn of its event loop, of
  all streams to that router. The Serve call that made a stream returns its Final with the
  number of frames, so that a frame that was lost is an error and never a silent truncation.
- Load, from an engine: its load at one moment, the same to every router that subscribed.
- Told, from another router: its part of every pool (core/exchange.py).

Every router process makes a CURVE key pair when it starts. Its public key travels only in
Serve calls, so it is also what lets a sender in; a restarted router on the same port has
another key and never hears the frames of its predecessor's streams.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from serve_app.core.exchange import Digest
from serve_app.core.types import ReplicaView

# A non-streamed body travels as one frame. A message above this ends the connection, and
# the streams on it with an error.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024

Record = tuple[int, int, bytes, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Address:
    """A router's end of the channel: where it listens, and the key that lets a sender in."""

    endpoint: str
    server_key: bytes


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the frames of one call go: a router's channel, and the stream's number on it."""

    router: Address
    stream: int


class Batch(msgspec.Struct, array_like=True, tag=0, frozen=True, gc=False):
    """Frames: ``(stream, sequence, data, token_ids)`` each."""

    records: list[Record]


class Load(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """An engine's load."""

    view: ReplicaView


class Told(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """What a router tells the others."""

    digest: Digest


Message = Batch | Load | Told

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    """Return a message as it travels."""
    return _encoder.encode(message)


def unpack(message: bytes) -> Message:
    """Return what came.

    Raises:
        ValueError: it is none of the messages.
    """
    try:
        return _decoder.decode(message)
    except msgspec.DecodeError as error:
        raise ValueError(f"no message of the token channel: {error}") from error
