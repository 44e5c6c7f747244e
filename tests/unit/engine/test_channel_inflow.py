"""Frames that wait at the router for their reader."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.types import Usage
from serve_app.engine.address import Address, ReplyTo
from serve_app.engine.api import EngineDead, EngineTimings, Final, Frame, ReaderTooSlow
from serve_app.engine.channel_inflow import Inflow, Line
from tests.properties import examples

REPLY = ReplyTo(Address("tcp://127.0.0.1:1", b"k" * 40), 7)


class Stream:
    """One inflow and how often it overflowed."""

    def __init__(self, *, coalesce: bool, buffer_bytes: int = 100) -> None:
        self.overflows = 0
        self.inflow = Inflow(REPLY, Line(), buffer_bytes, self._overflow, coalesce=coalesce)
        self._sent = 0

    def _overflow(self) -> None:
        self.overflows += 1

    def push(self, *data: bytes) -> None:
        for each in data:
            self.inflow.push(self._sent, each, (self._sent,))
            self._sent += 1


async def test_frames_that_wait_are_handed_over_as_one() -> None:
    stream = Stream(coalesce=True)
    stream.push(b"a", b"b", b"c")
    assert await stream.inflow.take() == Frame(2, b"abc", (0, 1, 2))
    stream.push(b"d")
    assert await stream.inflow.take() == Frame(3, b"d", (3,))


async def test_without_coalescing_each_comes_by_itself_in_order() -> None:
    stream = Stream(coalesce=False)
    stream.push(b"a", b"b", b"c")
    stream.inflow.end(Final(Usage(3, 0, 3), EngineTimings(), frames=3))
    taken = [await stream.inflow.take() for _ in range(4)]
    assert taken[:3] == [Frame(0, b"a", (0,)), Frame(1, b"b", (1,)), Frame(2, b"c", (2,))]
    assert isinstance(taken[3], Final)


@pytest.mark.parametrize("coalesce", [True, False])
async def test_what_was_taken_makes_room(coalesce: bool) -> None:
    """The bound is on what waits: bytes that the reader has are not counted again."""
    stream = Stream(coalesce=coalesce)
    for _ in range(20):
        stream.push(b"x" * 50, b"y" * 50)
        while stream.inflow._frames:
            await stream.inflow.take()
    assert stream.overflows == 0
    stream.push(b"x" * 60, b"y" * 60)
    assert stream.overflows == 1
    with pytest.raises(ReaderTooSlow):
        await stream.inflow.take()


COUNT = 6
SENT = list(range(COUNT))
# What a channel that lost, doubled or changed the order of frames would bring.
ARRIVING = st.permutations(SENT) | st.lists(st.sampled_from(SENT), max_size=COUNT + 2)


@examples(400)
@given(ARRIVING, st.booleans(), st.lists(st.integers(0, COUNT), max_size=3))
def test_a_stream_is_what_was_sent_or_an_error(
    arriving: list[int], coalesce: bool, read_after: list[int]
) -> None:
    """Whatever is lost, doubled or in another order, and however the reader keeps up."""

    async def read() -> tuple[bytes, list[int], bool]:
        stream = Stream(coalesce=coalesce, buffer_bytes=10**6)
        data, tokens = b"", []

        async def take() -> bool:
            nonlocal data
            item = await stream.inflow.take()
            if isinstance(item, Frame):
                data += item.data
                tokens.extend(item.token_ids)
            return isinstance(item, Final)

        try:
            for place, number in enumerate(arriving):
                stream.inflow.push(number, b"<%d>" % number, (number,))
                if place in read_after:
                    await take()
            stream.inflow.end(Final(Usage(3, 0, COUNT), EngineTimings(), frames=COUNT))
            while not await take():
                pass
        except EngineDead:
            return data, tokens, False
        return data, tokens, True

    data, tokens, whole = asyncio.run(read())
    assert whole == (arriving == SENT)
    assert tokens == SENT[: len(tokens)], "what the reader got is a beginning of it"
    assert data == b"".join(b"<%d>" % number for number in tokens)
