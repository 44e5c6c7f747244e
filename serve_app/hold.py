"""A client that waits for a place, for seconds or through the start of a sleeping pool.

Proxies and clients give up on a connection that says nothing. A streamed response therefore
begins after a while, with comments that every reader of server-sent events skips; what is then
refused is the stream's last event. A response that is not streamed can say nothing before it
is whole: it is held for a bounded time only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final

from serve_app.errors import Unavailable
from serve_app.gateway.http import ClientGone, StreamSender

COMMENT: Final = b": waiting for a place\n\n"
RETRY_AFTER_S: Final = 5.0


def hold(
    stream: StreamSender, *, streamed: bool, comment_s: float, plain_s: float
) -> AbstractAsyncContextManager[None]:
    """Return what surrounds the wait for a place, and only that.

    A stream gets a comment every ``comment_s`` within; anything else waits ``plain_s`` at most.
    Where it would wait for longer, leaving the block raises Unavailable.
    """
    return _commented(stream, comment_s) if streamed else _bounded(plain_s)


@asynccontextmanager
async def _bounded(plain_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(plain_s) as bound:
            yield
    except TimeoutError:
        if not bound.expired():
            raise
        raise Unavailable(
            f"No place came free within {plain_s:g} seconds; a streamed request may wait "
            "for longer.",
            code="held_too_long",
            retry_after_s=RETRY_AFTER_S,
        ) from None


@asynccontextmanager
async def _commented(stream: StreamSender, comment_s: float) -> AsyncIterator[None]:
    comments = asyncio.create_task(_say(stream, comment_s))
    try:
        yield
    finally:
        comments.cancel()
        # One may be under way: whatever is said next comes behind it.
        await asyncio.wait([comments])


async def _say(stream: StreamSender, comment_s: float) -> None:
    with suppress(ClientGone):
        while True:
            await asyncio.sleep(comment_s)
            await stream.write(COMMENT)
