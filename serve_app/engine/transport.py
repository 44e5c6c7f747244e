"""How a router reaches an engine replica: one stream of items per call.

This transport streams through the Serve handle. Everything above it sees only
``Transport``, so the multiplexed token channel can take its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
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


async def _relay(response: Any) -> AsyncGenerator[Any, None]:
    """Yield a handle's stream; cancel the call however the reader leaves.

    Serve cancels nothing when a response generator is merely dropped. Whatever Ray
    raises for a dead actor, a broken connection or a failed method means the same to
    the caller: this replica did not answer.
    """
    finished = False
    try:
        async for item in response:
            yield item
        finished = True
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except EngineDead:
        finished = True
        raise
    except Exception as error:  # Ray's errors have no common base
        finished = True
        raise EngineDead(f"{type(error).__name__}: {str(error).splitlines()[0]:.200}") from error
    finally:
        if not finished:
            response.cancel()
