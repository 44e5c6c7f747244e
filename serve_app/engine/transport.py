"""How a router reaches an engine replica: one stream of items per call.

Everything above sees only ``Transport``. ``ChannelTransport`` makes a plain Serve call per
request and takes its frames from the token channel; ``HandleTransport`` streams them
through the Serve handle, which costs several times as much per token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
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
from serve_app.engine.channel_receiver import ChannelReceiver, Inflow, LoadFeed

# How long frames may take that were sent before their call's result.
LATE_FRAMES_S = 5.0


class Transport(Protocol):
    """One pool's engines, from a router's side."""

    def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        """Yield what the engine yields; closing the generator cancels the call there.

        Raises:
            EngineDead: the replica was lost, or answered with gaps.
        """

    def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        """Yield the replica's load until it goes away.

        Raises:
            EngineDead: the replica was lost.
        """


class HandleTransport:
    """Streams through a Serve deployment handle of the pool's ``Engine``."""

    def __init__(self, handle: Any) -> None:
        """``handle`` is a DeploymentHandle; its option variants are built once, here."""
        self._generate = handle.options(stream=True, method_name="generate")
        self._watch = handle.options(stream=True, method_name="watch")

    async def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        """See Transport."""
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


class ChannelTransport:
    """Frames by the token channel, everything else by the handle."""

    def __init__(self, handle: Any, receiver: ChannelReceiver) -> None:
        """``handle`` is a DeploymentHandle; its option variants are built once, here."""
        self._deliver = handle.options(method_name="deliver")
        self._attend = handle.options(method_name="attend")
        self._receiver = receiver

    async def generate(self, call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        """See Transport.

        Raises:
            ReaderTooSlow: the reader left too much unread; the call was cancelled.
        """
        inflow = self._receiver.open()
        response = self._deliver.remote(replace(call, reply=inflow.reply))
        inflow.on_overflow = response.cancel
        ending = asyncio.create_task(_end(inflow, response))
        try:
            while True:
                item = await inflow.take()
                yield item
                if not isinstance(item, Frame):
                    return
        finally:
            self._receiver.forget(inflow)
            # Cancelling the task that waits for a response cancels its call.
            if not ending.done():
                response.cancel()
                ending.cancel()

    async def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        """See Transport. One call stays open while the load arrives beside it."""
        feed = self._receiver.follow(call.target)
        response = self._attend.remote(replace(call, router=self._receiver.address))
        attending = asyncio.create_task(_attend(feed, response))
        try:
            while True:
                yield await feed.take()
        finally:
            self._receiver.unfollow(call.target, feed)
            if not attending.done():
                response.cancel()
                attending.cancel()


async def _attend(feed: LoadFeed, response: Any) -> None:
    """Tell a feed that its call ended: the replica, or the way to it, is lost."""
    try:
        await response
    except asyncio.CancelledError:
        feed.fail(EngineDead("the subscription was cancelled"))
        raise
    except Exception as error:  # noqa: BLE001  # Ray's errors have no common base
        feed.fail(_dead(error))
    else:
        feed.fail(EngineDead("the replica stopped reporting its load"))


async def _end(inflow: Inflow, response: Any) -> None:
    """Tell a stream how its call ended, and how many frames it should have."""
    try:
        inflow.end(await response)
        if inflow.lacks:
            await asyncio.sleep(LATE_FRAMES_S)
            inflow.fail_if_lacking()
    except asyncio.CancelledError:
        inflow.fail(EngineDead("the call was cancelled"))
        raise
    except Exception as error:  # noqa: BLE001  # Ray's errors have no common base
        inflow.fail(_dead(error))


def _dead(error: Exception) -> EngineDead:
    """Return what any failure of a call means to its caller: this replica did not answer."""
    if isinstance(error, EngineDead):
        return error
    return EngineDead(f"{type(error).__name__}: {str(error).splitlines()[0]:.200}")


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
