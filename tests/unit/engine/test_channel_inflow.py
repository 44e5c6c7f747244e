"""Frames that wait at the router for their reader."""

from __future__ import annotations

import pytest

from serve_app.core.types import Usage
from serve_app.engine.address import Address, ReplyTo
from serve_app.engine.api import EngineTimings, Final, Frame, ReaderTooSlow
from serve_app.engine.channel_inflow import Inflow, Line

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
