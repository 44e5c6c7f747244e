"""The token channel's wire: what routers and engines send each other beside Serve calls.

Every router and every engine replica binds one PULL socket and connects one PUSH socket to
each process it has something for. A message is msgpack, one of:

- Call, to an engine: one request. Extend, to an engine: it may go on beyond what had been
  paid for. Cancel, to an engine: the readers of streams have gone; it is answered with the
  ending of each, and sent again until then.
- Batch, from an engine: the frames that it handed over within one turn of its event loop, of
  all streams to that router, and how streams ended. An ending counts the stream's frames, so
  that a frame that was lost is an error and never a silent truncation.
- Hello, from an engine: where it takes calls. Load, from an engine: its load at one moment,
  the same to every router that subscribed.
- Told, from another router: its part of every pool (core/exchange.py).

Every process makes a CURVE key pair when it starts. Its public key travels only in Serve
calls and on the channel itself, so it is also what lets a sender in; a restarted router on
the same port has another key and never hears the frames of its predecessor's streams.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec

from serve_app.core.exchange import Digest
from serve_app.core.types import ReplicaId, ReplicaView, RequestId
from serve_app.engine.address import Address
from serve_app.engine.api import Final, GenerateCall, Refusal

# A non-streamed body travels as one frame. A message above this ends the connection, and
# the streams on it with an error.
MAX_MESSAGE_BYTES = 256 * 1024 * 1024

Record = tuple[int, int, bytes, tuple[int, ...]]


class End(msgspec.Struct, array_like=True, frozen=True):
    """How a stream ended: the engine's account, its refusal, or what went wrong there.

    ``own``: it went wrong with this generation, and the engine can serve others.
    """

    stream: int
    final: Final | None = None
    refusal: Refusal | None = None
    error: str | None = None
    busy: bool = False
    own: bool = False


class Batch(msgspec.Struct, array_like=True, tag=0, frozen=True):
    """Frames, ``(stream, sequence, data, token_ids)`` each, and endings that follow them."""

    records: list[Record]
    ends: list[End] = []


class Call(msgspec.Struct, array_like=True, tag=1, frozen=True):
    """A request; its frames go to ``call.reply``."""

    call: GenerateCall


class Cancel(msgspec.Struct, array_like=True, tag=2, frozen=True):
    """Nobody reads these streams of a router any more."""

    router: Address
    streams: list[int]


class Hello(msgspec.Struct, array_like=True, tag=3, frozen=True):
    """Where a replica takes calls."""

    replica: ReplicaId
    address: Address


class Load(msgspec.Struct, array_like=True, tag=4, frozen=True):
    """An engine's load."""

    view: ReplicaView


class Told(msgspec.Struct, array_like=True, tag=5, frozen=True):
    """What a router tells the others."""

    digest: Digest


class Extend(msgspec.Struct, array_like=True, tag=6, frozen=True):
    """A running request's new ``paid_tokens``."""

    request_id: RequestId
    paid_tokens: int


Message = Batch | Call | Cancel | Hello | Load | Told | Extend

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    """Return a message as it travels."""
    return _encoder.encode(message)


def pack_batch(records: list[Record], ends: list[End]) -> bytes:
    """Return a turn's frames and endings as they travel.

    What an engine says of an error may hold what is no text: it must not keep the frames of
    other streams from going out.
    """
    try:
        return pack(Batch(records, ends))
    except UnicodeEncodeError:
        return pack(Batch(records, [_readable(end) for end in ends]))


def unpack(message: bytes) -> Message:
    """Return what came.

    Raises:
        ValueError: it is none of the messages.
    """
    try:
        return _decoder.decode(message)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"no message of the token channel: {error}") from error


def _readable(end: End) -> End:
    """Return an ending with ``?`` for what cannot be encoded."""
    refusal = end.refusal
    if refusal is not None:
        refusal = replace(
            refusal,
            message=_text(refusal.message),
            param=None if refusal.param is None else _text(refusal.param),
            code=None if refusal.code is None else _text(refusal.code),
        )
    error = None if end.error is None else _text(end.error)
    return msgspec.structs.replace(end, refusal=refusal, error=error)


def _text(words: str) -> str:
    return words.encode(errors="replace").decode()
