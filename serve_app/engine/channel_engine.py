"""The engine's end of the token channel: calls in, frames out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial

from serve_app.core.types import ReplicaId, ReplicaView, RequestId
from serve_app.engine.address import Address, ReplyTo
from serve_app.engine.api import (
    EngineDead,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    GenerationFailed,
)
from serve_app.engine.channel import Call, Cancel, End, Extend, Hello, Load, Message, pack
from serve_app.engine.channel_inlet import Inlet
from serve_app.engine.channel_outlet import Outlet, StreamLost
from serve_app.engine.channel_sender import ChannelSender

logger = logging.getLogger("headrace.channel")

Generate = Callable[[GenerateCall], AsyncGenerator[GenerateItem, None]]

LEFT_MAX = 4096


class EngineChannel:
    """Runs the calls that routers send to one engine replica; on its event loop only.

    ``frames`` counts the frames that were handed over for sending.
    """

    def __init__(
        self,
        replica: ReplicaId,
        host: str,
        ports: range,
        generate: Generate,
        calls_max: int,
        extend: Callable[[RequestId, int], None] = lambda request_id, paid_tokens: None,
    ) -> None:
        """Bind a free port of ``ports``; more than ``calls_max`` calls at once are turned away.

        ``generate`` and ``extend`` are the engine's.

        Raises:
            OSError: no port of the range is free.
        """
        self._replica = replica
        self._generate = generate
        self._extend = extend
        self._calls_max = calls_max
        self._sender = ChannelSender()
        self._tasks: dict[ReplyTo, asyncio.Task[None]] = {}
        self._left: dict[ReplyTo, None] = {}
        self._inlet = Inlet(host, ports, self._take)
        self.frames = 0

    @property
    def address(self) -> Address:
        """Where routers send calls."""
        return self._inlet.address

    @property
    def open_calls(self) -> int:
        """How many calls are running."""
        return len(self._tasks)

    @contextmanager
    def subscribed(self, router: Address) -> Iterator[Outlet]:
        """Have a router hear the load within; look whether the outlet to it has failed."""
        with self._sender.subscribed(router) as outlet:
            outlet.send(pack(Hello(self._replica, self.address)))
            yield outlet

    def broadcast(self, view: ReplicaView) -> None:
        """Send the load to every router that subscribed; one that does not read misses it."""
        self._sender.broadcast(pack(Load(view)))

    async def close(self) -> None:
        """End every call, and the sockets."""
        self._inlet.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._sender.close()

    def _take(self, message: Message) -> None:
        if isinstance(message, Call):
            self._begin(message.call)
        elif isinstance(message, Cancel):
            for stream in message.streams:
                self._cancel(ReplyTo(message.router, stream))
        elif isinstance(message, Extend):
            self._extend(message.request_id, message.paid_tokens)

    def _cancel(self, reply: ReplyTo) -> None:
        """End a call whose reader has left; one that does not run may be still to come.

        It comes by another connection than its cancel if the router's first one broke.
        """
        task = self._tasks.get(reply)
        if task is not None:
            # Once: the engine may have to wait to abort it, and is not to be cut short in that.
            if not task.cancelling():
                task.cancel()
            return
        if len(self._left) >= LEFT_MAX:
            del self._left[next(iter(self._left))]
        self._left[reply] = None
        _answer(self._sender.outlet(reply.router), reply)

    def _begin(self, call: GenerateCall) -> None:
        reply = call.reply
        if reply is None or reply in self._tasks:
            logger.error("a call without a stream of its own was dropped: %s", call.request_id)
            return
        outlet = self._sender.outlet(reply.router)
        if reply in self._left:
            _answer(outlet, reply)
            return
        if len(self._tasks) >= self._calls_max:
            full = f"the replica runs {self._calls_max} calls already"
            outlet.end(End(reply.stream, error=full, busy=True))
            return
        task = asyncio.get_running_loop().create_task(self._run(call, reply, outlet))
        self._tasks[reply] = task
        task.add_done_callback(partial(self._ended, reply, outlet))

    def _ended(self, reply: ReplyTo, outlet: Outlet, task: asyncio.Task[None]) -> None:
        self._tasks.pop(reply, None)
        if task.cancelled():
            _answer(outlet, reply)

    async def _run(self, call: GenerateCall, reply: ReplyTo, outlet: Outlet) -> None:
        """Send every frame of a generation and how it ended, unless nobody reads it."""
        try:
            with outlet.streaming():
                outlet.end(await self._deliver(call, reply, outlet))
        except StreamLost as error:
            logger.info("a stream's router is gone: %s", error)
        except EngineDead as error:
            own = isinstance(error, GenerationFailed)
            outlet.end(End(reply.stream, error=str(error), own=own))
        except Exception as error:
            logger.exception("a generation failed")
            told = ": ".join([type(error).__name__, *str(error)[:200].splitlines()[:1]])
            outlet.end(End(reply.stream, error=told))

    async def _deliver(self, call: GenerateCall, reply: ReplyTo, outlet: Outlet) -> End:
        stream = reply.stream
        async with aclosing(self._generate(call)) as items:
            async for item in items:
                if isinstance(item, Frame):
                    outlet.write((stream, item.sequence, item.data, item.token_ids))
                    self.frames += 1
                elif isinstance(item, Final):
                    return End(stream, final=item)
                else:
                    return End(stream, refusal=item)
        return End(stream, error="the engine ended a generation without its last item")


def _answer(outlet: Outlet, reply: ReplyTo) -> None:
    """Say that a stream was cancelled, or else its router asks again."""
    outlet.end(End(reply.stream, error="it was cancelled"))
