"""A client that waits for a place, for seconds or through the start of a sleeping pool.

Proxies and clients give up on a connection that says nothing. A streamed response therefore
begins after a while, with comments that every reader of server-sent events skips; what is then
refused is the stream's last event. A response that is not streamed can say nothing before it
is whole: it is held for a bounded time only.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Final

from serve_app.errors import Unavailable
from serve_app.gateway.http import ClientGone, StreamSender

COMMENT: Final = b": waiting for a place\n\n"
RETRY_AFTER_S: Final = 5.0


class Hold:
    """Surrounds the wait for a place and what follows; ``over`` is called between them."""

    def __init__(
        self, stream: StreamSender, *, streamed: bool, comment_s: float, plain_s: float
    ) -> None:
        """A stream gets a comment every ``comment_s``; anything else waits ``plain_s`` at most."""
        self._stream = stream
        self._streamed = streamed
        self._comment_s = comment_s
        self._plain_s = plain_s
        self._timer: asyncio.TimerHandle | None = None
        self._comments: asyncio.Task[None] | None = None
        self._bound = asyncio.timeout(None)

    async def __aenter__(self) -> Hold:
        loop = asyncio.get_running_loop()
        await self._bound.__aenter__()
        if self._streamed:
            self._timer = loop.call_later(self._comment_s, self._begin)
        else:
            self._bound.reschedule(loop.time() + self._plain_s)
        return self

    async def over(self) -> None:
        """The place is there: nothing more is said, and the bound is off."""
        self._bound.reschedule(None)
        if self._stop_saying() and self._comments is not None:
            with suppress(asyncio.CancelledError):
                await self._comments

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop saying that it waits.

        Raises:
            Unavailable: it waited for longer than a plain response may.
        """
        self._stop_saying()
        try:
            await self._bound.__aexit__(kind, error, trace)
        except TimeoutError:
            raise Unavailable(
                f"No place came free within {self._plain_s:g} seconds; a streamed request may wait "
                "for longer.",
                code="held_too_long",
                retry_after_s=RETRY_AFTER_S,
            ) from None

    def _begin(self) -> None:
        self._comments = asyncio.create_task(self._say())

    def _stop_saying(self) -> bool:
        """Say nothing more; return whether a comment may be under way still."""
        if self._timer is not None:
            self._timer.cancel()
        return self._comments is not None and self._comments.cancel()

    async def _say(self) -> None:
        with suppress(ClientGone):
            while True:
                await self._stream.write(COMMENT)
                await asyncio.sleep(self._comment_s)
