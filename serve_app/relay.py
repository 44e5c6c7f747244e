"""One completion, from the engine's items to the client's bytes.

The relay owns what makes a response end exactly once: done, error or cancelled. Until
the first byte is out, a lost replica means another try elsewhere; after it, the stream goes
on elsewhere where it can (continuation.py), else an SSE error event ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace

from starlette.types import Send

from serve_app.continuation import Continuation, NotContinued, refused_by_core
from serve_app.core.types import Dispatch, Failure, PriorityClass, Usage
from serve_app.engine.api import (
    STREAM_END,
    EngineBusy,
    EngineDead,
    Final,
    Frame,
    GenerateCall,
    GenerationFailed,
    ReaderTooSlow,
    Refusal,
)
from serve_app.engine.transport import Cap, Transport
from serve_app.errors import (
    ApiError,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    RequestTimeout,
    Unavailable,
)
from serve_app.gate import Lease, Refused
from serve_app.gateway.http import StreamSender, send_json

Headers = list[tuple[bytes, bytes]]

ERROR_WRITE_S = 1.0
# A request that kills engines is begun on so many at the most.
ENGINES_MAX = 3

_NO_TIER = b',"service_tier":null'
_TIER_OF_CLASS = {
    PriorityClass.CRITICAL: b"priority",
    PriorityClass.STANDARD: b"default",
    PriorityClass.SHEDDABLE: b"flex",
}


@dataclass(slots=True)
class Delivery:
    """What was delivered to the client, as far as it got.

    ``usage`` is of the whole response, whichever replicas made it. Of ``attempts``
    ``continuations`` went on after what others had delivered, and ``continued`` of those
    brought something; ``not_continued`` says why the stream was cut for good.
    """

    output_tokens: int = 0
    frames: int = 0
    first_byte_at_s: float | None = None
    last_byte_at_s: float | None = None
    attempts: int = 0
    continuations: int = 0
    continued: int = 0
    not_continued: NotContinued | None = None
    streamed: bool = False
    finish_reason: str | None = None
    usage: Usage | None = None


class Relay:
    """Carries one dispatched request's output to its client.

    ``before_end`` is awaited when all but what ends the response is out. ``cap`` is there if
    less is paid for than the whole answer may cost. Without ``continuation`` a stream that was
    cut does not go on.
    """

    def __init__(
        self,
        send: Send,
        headers: Iterable[tuple[bytes, bytes]],
        clock: Callable[[], float],
        send_middle: Send | None = None,
    ) -> None:
        """``send_middle`` is for what neither begins nor ends a stream; see StreamSender."""
        self._send = send
        self._headers: Headers = list(headers)
        self._clock = clock
        self.stream = StreamSender(send, self._headers, send_middle)
        self.delivery = Delivery()
        self.before_end: Callable[[], Awaitable[None]] | None = None
        self._answered = False
        self._overflowed = False
        self._lost = 0
        self._tier: bytes | None = None
        self.cap: Cap | None = None
        self.continuation: Continuation | None = None

    def describe(self, dispatch: Dispatch, served_class: PriorityClass) -> None:
        """Say in the response where and how the request is served: headers, service tier."""
        self._tier = b',"service_tier":"%s"' % _TIER_OF_CLASS[served_class]
        headers: Headers = [
            (b"x-headrace-pool", dispatch.pool.encode()),
            (b"x-headrace-class", served_class.name.lower().encode()),
        ]
        if dispatch.degraded is not None:
            headers.append((b"x-headrace-degraded", dispatch.degraded.encode()))
        self.add_headers(headers)

    def add_headers(self, headers: Headers) -> None:
        """Add response headers; a stream that was held may have sent its own already."""
        if self.stream.started:
            return
        self._headers.extend(headers)
        for name, value in headers:
            self.stream.add_header(name, value)

    async def fail(self, error: ApiError) -> None:
        """End the response with ``error``, unless it has ended already.

        A client that does not read does not hold us up: its connection is cut instead.
        """
        if not self.stream.ended and not self._answered:
            with suppress(TimeoutError):
                async with asyncio.timeout(ERROR_WRITE_S):
                    await self.stream.fail(error)

    async def run(
        self, lease: Lease, transport: Transport, call_for: Callable[[Lease], GenerateCall]
    ) -> None:
        """Deliver the whole response, from other replicas when one is lost.

        Raises:
            ApiError: the engine refused or failed; nothing was sent, or the stream is
                open and still wants its error event.
            Refused: no other replica could take the request.
        """
        task = asyncio.current_task()
        assert task is not None

        def overflow() -> None:
            """Get out of a write that the client does not take; nothing else would."""
            self._overflowed = True
            task.cancel()

        while True:
            self.delivery.attempts += 1
            try:
                await self._attempt(lease, transport, self._resumed(call_for(lease)), overflow)
                return
            except asyncio.CancelledError:
                if not self._overflowed:
                    raise
                task.uncancel()
                raise _too_slow() from None
            except EngineDead as error:
                if self.delivery.first_byte_at_s is None:
                    self._begin_again(lease, error)
                else:
                    self._go_on(lease, error)
            except ReaderTooSlow as error:
                task.uncancel()
                raise _too_slow() from error

    def _begin_again(self, lease: Lease, error: EngineDead) -> None:
        """Place a request of which the client has nothing on another replica.

        Raises:
            EngineFailed: it was lost with ``ENGINES_MAX`` of them, and may be why.
        """
        self._lost += not isinstance(error, EngineBusy)
        if self._lost == ENGINES_MAX:
            lease.fail()
            raise EngineFailed(
                f"{ENGINES_MAX} engines failed one after the other before the first token.",
                should_retry=False,
            ) from error
        lease.move(_failure_of(error))

    def _go_on(self, lease: Lease, error: EngineDead) -> None:
        """Place a stream that was cut on another replica.

        Raises:
            EngineFailed: it cannot go on.
        """
        if isinstance(error, EngineBusy) and self.continuation is not None:
            self.continuation.passed_over()
        bar = NotContinued.OFF if self.continuation is None else self.continuation.bar()
        if isinstance(error, GenerationFailed):
            bar = NotContinued.FAILED
        if bar is None:
            try:
                lease.move(_failure_of(error))
            except Refused as refused:
                bar = refused_by_core(refused.reject.reason)
        if bar is not None:
            lease.fail()
            raise self._cut(bar) from error

    def _cut(self, why: NotContinued) -> EngineFailed:
        """Return the error that ends a stream which cannot go on."""
        self.delivery.not_continued = why
        return EngineFailed(
            "The engine failed while it was generating; the response is incomplete.",
            should_retry=True,
        )

    def _resumed(self, call: GenerateCall) -> GenerateCall:
        """Return the call to go on with, if the client has a part of the answer."""
        if self.delivery.first_byte_at_s is None or self.continuation is None:
            return call
        self.delivery.continuations += 1
        return self.continuation.resume(call)

    def _refused(self, refusal: Refusal, *, resumed: bool) -> Exception:
        """Return what to raise: for a replica that is leaving or full there are others."""
        if refusal.status == 503:
            return EngineBusy(refusal.message)
        return self._cut(NotContinued.REFUSED) if resumed else error_of(refusal)

    async def _attempt(
        self,
        lease: Lease,
        transport: Transport,
        call: GenerateCall,
        overflow: Callable[[], None],
    ) -> None:
        closing: Frame | None = None
        final: Final | None = None
        capped = () if self.cap is None else (self.cap,)
        async with aclosing(transport.generate(call, overflow, *capped)) as items:
            async for item in items:
                if isinstance(item, Frame):
                    frame, held = _hold_closing(item, streamed=call.stream)
                    if held is not None:
                        closing = held
                        if self.continuation is not None:
                            self.continuation.hold_end()
                    if frame is not None:
                        await self._deliver(lease, frame, streamed=call.stream)
                elif isinstance(item, Final):
                    final = item
                else:
                    if item.status >= 500:
                        lease.fail()
                    raise self._refused(item, resumed=bool(call.resume_token_ids))
        if final is None or closing is None:
            raise EngineDead("the engine ended a generation without its end or its account")
        # Settled first: a client that has read the end may leave before we return.
        usage = _whole(final.usage, call)
        self.delivery.usage = usage
        self.delivery.finish_reason = final.finish_reason
        lease.settle(usage)
        if self.before_end is not None:
            await self.before_end()
        await self._deliver(lease, closing, streamed=call.stream)
        if call.stream:
            await self.stream.finish()

    async def _deliver(self, lease: Lease, frame: Frame, *, streamed: bool) -> None:
        tokens = len(frame.token_ids)
        if tokens:
            self.delivery.output_tokens += tokens
            lease.progress(tokens)
            if self.cap is not None:
                self.cap.on_tokens(self.delivery.output_tokens)
        now_s = self._clock()
        data = frame.data
        if streamed and self.continuation is not None:
            said = self.continuation.deliver(frame)
            if said:
                self.delivery.continued += 1
                data = said + data
        if self.delivery.first_byte_at_s is None:
            self.delivery.first_byte_at_s = now_s
            if self._tier is not None:
                data = with_service_tier(data, self._tier, streamed=streamed)
        self.delivery.last_byte_at_s = now_s
        self.delivery.frames += 1
        self.delivery.streamed = streamed
        if streamed:
            await self.stream.write(data)
        else:
            self._answered = True
            await send_json(self._send, data, headers=self._headers)


def _whole(usage: Usage, call: GenerateCall) -> Usage:
    """Return the use of a whole response from that of the replica which brought its end.

    What the others measured went with them: a part of the time would be taken for all of it.
    """
    resumed = len(call.resume_token_ids)
    if not resumed:
        return usage
    completion_tokens = usage.completion_tokens + resumed
    return replace(usage, completion_tokens=completion_tokens, engine_s=0.0, kv_block_us=0)


def _failure_of(error: EngineDead) -> Failure:
    """Return what an error of an engine says of its replica."""
    if isinstance(error, EngineBusy):
        return Failure.BUSY
    return Failure.REQUEST if isinstance(error, GenerationFailed) else Failure.LOST


def _too_slow() -> RequestTimeout:
    return RequestTimeout(
        "The response was cut off: it was read more slowly than it was generated.",
        code="client_too_slow",
        should_retry=False,
    )


def _hold_closing(frame: Frame, *, streamed: bool) -> tuple[Frame | None, Frame | None]:
    """Return what of a frame may go out now, and what waits until the request is settled.

    What waits is what tells the client that it has everything: a whole body, or a
    stream's closing event.
    """
    if not streamed:
        return None, frame
    if not frame.data.endswith(STREAM_END):
        return frame, None
    rest = frame.data[: -len(STREAM_END)]
    held = Frame(frame.sequence, STREAM_END, () if rest else frame.token_ids)
    return (Frame(frame.sequence, rest, frame.token_ids) if rest else None), held


def with_service_tier(data: bytes, tier: bytes, *, streamed: bool) -> bytes:
    """Return a whole body, or a stream's first events, with the tier that was served.

    ``tier`` is the member as JSON with a comma before it. It goes to the end of the first
    object, or in place of an engine's own null; data without an object stays as it is.
    """
    null = data.find(_NO_TIER)
    if not streamed and null >= 0:
        return data[:null] + tier + data[null + len(_NO_TIER) :]
    end = data.find(b"}\n\n") if streamed else data.rfind(b"}")
    return data if end < 0 else data[:end] + tier + data[end:]


def error_of(refusal: Refusal) -> ApiError:
    """Return the client's error for what the engine's own layer refused."""
    if refusal.code == "context_length_exceeded":
        return ContextLengthExceeded(refusal.message, param=refusal.param)
    if refusal.status >= 500:
        return Unavailable(refusal.message, code=refusal.code, retry_after_s=1.0)
    error = InvalidRequest(refusal.message, param=refusal.param, code=refusal.code)
    error.status = refusal.status
    error.type = refusal.type
    return error
