"""What a client that waits for a place hears, and for how long it may wait."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager

import pytest
from starlette.types import Message

from serve_app.errors import Unavailable
from serve_app.gateway.http import StreamSender
from serve_app.hold import COMMENT, hold

SOON_S, NEVER_S = 0.01, 3600.0


class Wire:
    """What was sent, and a way to wait for so many messages of it."""

    def __init__(self, *, broken: bool = False) -> None:
        self.sent: list[Message] = []
        self._broken = broken
        self._came = asyncio.Condition()

    async def send(self, message: Message) -> None:
        if self._broken and message["type"] == "http.response.body":
            raise OSError("the connection is closed")
        async with self._came:
            self.sent.append(message)
            self._came.notify_all()

    async def reached(self, count: int) -> None:
        async with asyncio.timeout(120), self._came:
            await self._came.wait_for(lambda: len(self.sent) >= count)


def held(
    wire: Wire, *, streamed: bool, comment_s: float = NEVER_S, plain_s: float = NEVER_S
) -> AbstractAsyncContextManager[None]:
    stream = StreamSender(wire.send)
    return hold(stream, streamed=streamed, comment_s=comment_s, plain_s=plain_s)


async def test_a_stream_begins_while_it_waits_and_says_so_until_it_has_its_place() -> None:
    wire = Wire()
    async with held(wire, streamed=True, comment_s=SOON_S):
        await wire.reached(4)
    said = len(wire.sent)
    await asyncio.sleep(5 * SOON_S)
    assert len(wire.sent) == said, "nothing more once it has its place"
    assert wire.sent[0]["type"] == "http.response.start"
    assert wire.sent[0]["status"] == 200
    assert {each["body"] for each in wire.sent[1:]} == {COMMENT}


async def test_a_place_that_comes_soon_leaves_nothing_on_the_wire() -> None:
    wire = Wire()
    async with held(wire, streamed=True):
        await asyncio.sleep(0)
    assert wire.sent == []


async def test_what_is_not_streamed_waits_for_a_bounded_time_and_says_nothing() -> None:
    wire = Wire()
    with pytest.raises(Unavailable, match="No place came free") as refused:
        async with held(wire, streamed=False, comment_s=SOON_S, plain_s=5 * SOON_S):
            await asyncio.Event().wait()
    assert refused.value.code == "held_too_long"
    assert wire.sent == []


async def test_the_bound_is_on_the_wait_and_not_on_the_answer() -> None:
    async with held(Wire(), streamed=False, plain_s=SOON_S):
        pass
    await asyncio.sleep(5 * SOON_S)


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_refusal_goes_through_and_ends_the_comments(streamed: bool) -> None:
    wire = Wire()
    with pytest.raises(KeyError):
        async with held(wire, streamed=streamed, comment_s=SOON_S):
            raise KeyError
    said = len(wire.sent)
    await asyncio.sleep(5 * SOON_S)
    assert len(wire.sent) == said


async def test_a_client_that_left_is_not_told_and_nothing_breaks() -> None:
    wire = Wire(broken=True)
    async with held(wire, streamed=True, comment_s=SOON_S):
        await wire.reached(1)
        await asyncio.sleep(3 * SOON_S)
