"""The router's end of the token channel: calls out, frames and loads in, sorted."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from serve_app.core.exchange import Digest
from serve_app.core.types import ReplicaId, RequestId
from serve_app.engine.address import Address, ReplyTo
from serve_app.engine.api import EngineBusy, EngineDead, GenerateCall, GenerationFailed
from serve_app.engine.channel import (
    Batch,
    Call,
    Cancel,
    End,
    Extend,
    Hello,
    Load,
    Message,
    Told,
    pack,
)
from serve_app.engine.channel_cancels import AGAIN_S, Cancels
from serve_app.engine.channel_inflow import Inflow, Line
from serve_app.engine.channel_inlet import Inlet
from serve_app.engine.channel_outlet import Outlet
from serve_app.engine.channel_sender import ChannelSender


class RouterChannel:
    """One router's way to every engine replica and to the other routers; on its loop only.

    ``on_told`` is called with what another router tells. ``strays`` counts frames of streams
    that nobody reads any more.
    """

    def __init__(
        self,
        host: str,
        ports: range,
        stream_buffer_bytes: int,
        *,
        coalesce: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind a free port of ``ports``; ``stream_buffer_bytes`` bounds what waits for a client.

        With ``coalesce`` frames that wait for one client are handed over as one.

        Raises:
            OSError: no port of the range is free.
        """
        self._inlet = Inlet(host, ports, self._take)
        self._sender = ChannelSender()
        self._buffer_bytes = stream_buffer_bytes
        self._coalesce = coalesce
        self._numbers = itertools.count()
        self._streams: dict[int, Inflow] = {}
        self._lines: dict[ReplicaId, Line] = {}
        self._clock = clock
        self._cancels = Cancels()
        self._again: asyncio.TimerHandle | None = None
        self.on_told: Callable[[Digest], None] = _ignore
        self.strays = 0

    @property
    def address(self) -> Address:
        """Where others reach this router."""
        return self._inlet.address

    def open_line(self, replica: ReplicaId) -> Line:
        """Begin to hear of a replica; it learns of us by a Serve call."""
        line = self._lines[replica] = Line()
        return line

    def close_line(self, replica: ReplicaId, line: Line) -> None:
        """Send a replica no more calls; what is open may end."""
        if self._lines.get(replica) is line:
            del self._lines[replica]

    def call(self, call: GenerateCall, on_overflow: Callable[[], None]) -> Inflow:
        """Send a request to ``call.target``; return its stream, to be closed by ``leave``.

        ``on_overflow`` is called if more waits in the stream than may.

        Raises:
            EngineDead: that replica is not reached.
        """
        assert call.target is not None, "core names the replica"
        line = self._lines.get(call.target)
        if line is None or line.address is None or line.error is not None:
            raise EngineDead("the chosen replica has left the pool")
        reply = ReplyTo(self.address, next(self._numbers))
        inflow = Inflow(reply, line, self._buffer_bytes, on_overflow, coalesce=self._coalesce)
        self._streams[reply.stream] = inflow
        line.add(inflow)
        self._way(line.address).send(pack(Call(replace(call, reply=reply))))
        return inflow

    def extend(self, inflow: Inflow, request_id: RequestId, paid_tokens: int) -> None:
        """Tell the engine that more of a stream that runs has been paid for."""
        line = inflow.line
        if not inflow.ended and line.error is None and line.address is not None:
            self._way(line.address).send(pack(Extend(request_id, paid_tokens)))

    def leave(self, inflow: Inflow) -> None:
        """Drop what still arrives for a stream; one that has not ended is cancelled."""
        if self._streams.pop(inflow.reply.stream, None) is None:
            return
        line = inflow.line
        line.remove(inflow)
        # Also where the replica was given up: one that stalled may go on.
        if not inflow.ended and line.address is not None:
            stream = inflow.reply.stream
            self._cancels.sent(stream, line.address, self._clock())
            self._way(line.address).send(pack(Cancel(self.address, [stream])))
            if self._again is None:
                self._cancel_later()

    def tell(self, router: Address, digest: Digest) -> None:
        """Tell another router; one that does not read misses it."""
        self._sender.tell(router, pack(Told(digest)))

    def close(self) -> None:
        """Stop sending and receiving."""
        if self._again is not None:
            self._again.cancel()
        self._inlet.close()
        self._sender.close()

    def _way(self, engine: Address) -> Outlet:
        """Return the way to an engine; the streams there end if it fails.

        What was under way may be lost. Nobody would answer a call, and a stream that was not
        extended would end too early without a word.
        """
        outlet = self._sender.outlet(engine)
        if outlet.on_failed is None:
            outlet.on_failed = partial(self._cut, engine)
        return outlet

    def _cut(self, engine: Address, reason: str) -> None:
        for inflow in list(self._streams.values()):
            if inflow.line.address == engine:
                inflow.fail(EngineDead(reason))

    def _cancel_later(self) -> None:
        self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._cancel_again)

    def _cancel_again(self) -> None:
        """Repeat the cancels that no engine has answered; one that does not read waits."""
        self._again = None
        for engine, streams in self._cancels.due(self._clock()).items():
            self._way(engine).tell(pack(Cancel(self.address, streams)))
        if self._cancels:
            self._cancel_later()

    def _take(self, message: Message) -> None:
        if isinstance(message, Batch):
            self._spread(message)
        elif isinstance(message, Load):
            line = self._lines.get(message.view.replica)
            if line is not None and line.address is not None:
                line.push(message.view)
        elif isinstance(message, Hello):
            line = self._lines.get(message.replica)
            if line is not None:
                line.address = message.address
        elif isinstance(message, Told):
            self.on_told(message.digest)

    def _spread(self, batch: Batch) -> None:
        streams = self._streams
        for number, sequence, data, token_ids in batch.records:
            inflow = streams.get(number)
            if inflow is None:
                self.strays += 1
            else:
                inflow.push(sequence, data, token_ids)
        for end in batch.ends:
            inflow = streams.get(end.stream)
            if inflow is None:
                self._cancels.answered(end.stream)
            else:
                _end(inflow, end)


def _end(inflow: Inflow, end: End) -> None:
    inflow.ended = True
    result = end.final or end.refusal
    if result is not None:
        inflow.end(result)
    else:
        kind = EngineBusy if end.busy else GenerationFailed if end.own else EngineDead
        inflow.fail(kind(end.error or "the engine ended a generation without a word"))


def _ignore(digest: Digest) -> None:
    """Do nothing with it."""
