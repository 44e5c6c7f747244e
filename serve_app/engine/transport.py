"""How a router reaches an engine replica: one stream of items per call.

Everything above sees only ``Transport``. ``ChannelTransport`` sends calls and takes frames by
the token channel; ``HandleTransport`` streams both through the Serve handle, which costs
several times as much per request and per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from serve_app.core.types import ReplicaView
from serve_app.engine.api import (
    EngineDead,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    Refusal,
    WatchCall,
)
from serve_app.engine.channel_inflow import Line
from serve_app.engine.channel_router import RouterChannel


@dataclass(slots=True)
class Cap:
    """How many output tokens of a call are paid for, raised while it runs.

    ``on_tokens`` is told how many have come. ``on_raise`` is the transport's that carries
    the call now.
    """

    tokens: int
    on_tokens: Callable[[int], None]
    on_raise: Callable[[int], None] | None = None

    def raise_to(self, tokens: int) -> None:
        """Let the call go on up to ``tokens``; they are paid for."""
        self.tokens = tokens
        if self.on_raise is not None:
            self.on_raise(tokens)


class Transport(Protocol):
    """One pool's engines, from a router's side."""

    def generate(
        self, call: GenerateCall, on_overflow: Callable[[], None], cap: Cap | None = None
    ) -> AsyncGenerator[GenerateItem, None]:
        """Yield what the engine yields; closing the generator cancels the call there.

        ``on_overflow`` is called if more waits to be read than may: whoever reads is stuck.
        Raising ``cap`` raises the call's ``paid_tokens``, where the transport can.

        Raises:
            EngineDead: the replica was lost, or answered with gaps.
            ReaderTooSlow: more waited than may.
        """

    def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        """Yield the replica's load until it goes away.

        Raises:
            EngineDead: the replica was lost.
        """

    async def wake(self) -> None:
        """Wait until the pool has a replica; the wait itself asks Serve for one."""


class HandleTransport:
    """Streams through a Serve deployment handle of the pool's ``Engine``."""

    def __init__(self, handle: Any) -> None:
        """``handle`` is a DeploymentHandle; its option variants are built once, here."""
        self._generate = handle.options(stream=True, method_name="generate")
        self._watch = handle.options(stream=True, method_name="watch")
        self._wake = handle.options(method_name="wake")

    async def generate(
        self, call: GenerateCall, on_overflow: Callable[[], None], cap: Cap | None = None
    ) -> AsyncGenerator[GenerateItem, None]:
        """See Transport. Serve buffers without a bound, so nothing overflows.

        A call under way cannot be told anything: it ends at what it was sent with.
        """
        frames = 0
        async with aclosing(_relay(self._generate.remote(call))) as items:
            async for item in items:
                if isinstance(item, Frame):
                    if item.sequence != frames:
                        raise EngineDead(f"frame {item.sequence} arrived in place of {frames}")
                    frames += 1
                elif isinstance(item, Final) and item.frames != frames:
                    raise EngineDead(f"{frames} of {item.frames} frames arrived")
                yield item
                if isinstance(item, Final | Refusal):
                    return
        raise EngineDead("the engine's stream ended before its last item")

    async def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        """See Transport."""
        async with aclosing(_relay(self._watch.remote(call))) as views:
            async for view in views:
                yield view
        raise EngineDead("the replica stopped reporting its load")

    async def wake(self) -> None:
        """See Transport."""
        await self._wake.remote()


class ChannelTransport:
    """Everything by the token channel, for as long as a Serve call to the replica is open.

    That call tells when the replica is lost, and keeps Serve from stopping it while streams
    of this router run there.
    """

    def __init__(self, handle: Any, channel: RouterChannel) -> None:
        """``handle`` is a DeploymentHandle; its option variants are built once, here."""
        self._attend = handle.options(method_name="attend")
        self._wake = handle.options(method_name="wake")
        self._channel = channel
        self._lingering: set[asyncio.Task[None]] = set()

    async def generate(
        self, call: GenerateCall, on_overflow: Callable[[], None], cap: Cap | None = None
    ) -> AsyncGenerator[GenerateItem, None]:
        """See Transport."""
        inflow = self._channel.call(call, on_overflow)
        if cap is not None:
            cap.on_raise = partial(self._channel.extend, inflow, call.request_id)
        try:
            while True:
                item = await inflow.take()
                yield item
                if not isinstance(item, Frame):
                    return
        finally:
            if cap is not None:
                cap.on_raise = None
            self._channel.leave(inflow)

    async def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        """See Transport. Streams that are open when the watch ends may run to their end."""
        line = self._channel.open_line(call.target)
        response = self._attend.remote(replace(call, router=self._channel.address))
        attending = asyncio.create_task(_attend(line, response))
        try:
            while True:
                yield await line.take()
        finally:
            self._channel.close_line(call.target, line)
            lingering = asyncio.create_task(_let_go(line, attending))
            self._lingering.add(lingering)
            lingering.add_done_callback(self._lingering.discard)

    async def wake(self) -> None:
        """See Transport."""
        await self._wake.remote()


async def _attend(line: Line, response: Any) -> None:
    """Keep the call to a replica open; its end means that the replica is lost."""
    try:
        await response
    except asyncio.CancelledError:
        response.cancel()
        line.fail(EngineDead("the subscription was cancelled"))
        raise
    except Exception as error:  # noqa: BLE001  # Ray's errors have no common base
        line.fail(_dead(error))
    else:
        line.fail(EngineDead("the replica stopped reporting its load"))


async def _let_go(line: Line, attending: asyncio.Task[None]) -> None:
    """End the call to a replica once no stream of it is open, or it has ended by itself."""
    idle = asyncio.create_task(line.idle.wait())
    await asyncio.wait([idle, attending], return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    attending.cancel()


def _dead(error: Exception) -> EngineDead:
    """Return what any failure of a call means to its caller: this replica did not answer."""
    if isinstance(error, EngineDead):
        return error
    return EngineDead(": ".join([type(error).__name__, *str(error)[:200].splitlines()[:1]]))


async def _relay(response: Any) -> AsyncGenerator[Any, None]:
    """Yield a handle's stream; cancel the call however the reader leaves.

    Serve cancels nothing when a response generator is merely dropped.
    """
    finished = False
    try:
        async for item in response:
            yield item
        finished = True
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except Exception as error:  # Ray's errors have no common base
        finished = True
        raise _dead(error) from error
    finally:
        if not finished:
            response.cancel()
