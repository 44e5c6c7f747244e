"""Both ways tokens travel, over a local stand-in of Serve's handle and the real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest
import pytest_asyncio
import zmq

from serve_app.core.types import PriorityClass, ReplicaId, RequestId, Usage
from serve_app.engine.api import (
    Endpoint,
    EngineDead,
    EngineTimings,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    ReaderTooSlow,
    Refusal,
)
from serve_app.engine.channel import pack, unpack
from serve_app.engine.channel_receiver import ChannelReceiver
from serve_app.engine.channel_sender import ChannelSender
from serve_app.engine.transport import ChannelTransport, HandleTransport, Transport

PORTS = range(21_000, 22_000)
BUFFER_BYTES = 4096
WAIT_S = 20.0


def frames(count: int, data: bytes = b"data: x\n\n") -> list[GenerateItem]:
    return [Frame(number, data, (number,)) for number in range(count)]


def final(count: int) -> Final:
    return Final(Usage(3, 0, count), EngineTimings(), frames=count)


def call(name: str = "q") -> GenerateCall:
    return GenerateCall(
        request_id=RequestId(name),
        endpoint=Endpoint.CHAT,
        body=b"{}",
        stream=True,
        tenant="t",
        cache_salt="s",
        priority_class=PriorityClass.STANDARD,
        target=ReplicaId("r1"),
    )


@dataclass
class Replica:
    """An engine replica whose engine plays ``script``; ``pause`` is awaited before each item."""

    script: Callable[[GenerateCall], Sequence[GenerateItem | Exception]]
    sender: ChannelSender
    pause: Callable[[], Any] = field(default=lambda: asyncio.sleep(0))
    closed: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, request: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        try:
            for item in self.script(request):
                await self.pause()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1
            self.ended.set()

    async def deliver(self, request: GenerateCall) -> Final | Refusal:
        assert request.reply is not None
        return await self.sender.deliver(self.generate(request), request.reply)


class LocalHandle:
    """A deployment handle to one replica in this process."""

    def __init__(self, replica: Replica, method: str = "", stream: bool = False) -> None:
        self._replica, self._method, self._stream = replica, method, stream

    def options(self, *, method_name: str, stream: bool = False) -> LocalHandle:
        return LocalHandle(self._replica, method_name, stream)

    def remote(self, request: GenerateCall) -> Any:
        method = getattr(self._replica, self._method)
        return LocalStream(method(request)) if self._stream else LocalCall(method(request))


class LocalCall:
    def __init__(self, coroutine: Any) -> None:
        self._task = asyncio.ensure_future(coroutine)

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


class LocalStream:
    """Pulls the method in a task, as Serve does, so that its end does not wait for a reader."""

    def __init__(self, items: AsyncGenerator[Any, None]) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(self._pull(items))

    async def _pull(self, items: AsyncGenerator[Any, None]) -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    self._queue.put_nowait(item)
            self._queue.put_nowait(StopAsyncIteration())
        except Exception as error:  # noqa: BLE001  # handed to the reader
            self._queue.put_nowait(error)

    def __aiter__(self) -> LocalStream:
        return self

    async def __anext__(self) -> Any:
        item = await self._queue.get()
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self._task.cancel()


class Case:
    """A replica, and a router's transport to it."""

    def __init__(self, kind: str) -> None:
        self.sender = ChannelSender()
        self.receiver = ChannelReceiver("127.0.0.1", PORTS, BUFFER_BYTES)
        self.replica = Replica(lambda _: [], self.sender)
        handle = LocalHandle(self.replica)
        self.transport: Transport = (
            ChannelTransport(handle, self.receiver)
            if kind == "channel"
            else HandleTransport(handle)
        )

    def plays(self, *items: GenerateItem | Exception) -> None:
        self.replica.script = lambda _: items

    async def read(self, name: str = "q") -> list[GenerateItem]:
        async with asyncio.timeout(WAIT_S), aclosing(self.transport.generate(call(name))) as items:
            return [item async for item in items]

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest_asyncio.fixture(params=["channel", "handle"])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    made = Case(request.param)
    yield made
    made.close()


@pytest_asyncio.fixture
async def channel() -> AsyncIterator[Case]:
    made = Case("channel")
    yield made
    made.close()


def text(items: Sequence[GenerateItem]) -> bytes:
    return b"".join(item.data for item in items if isinstance(item, Frame))


def tokens(items: Sequence[GenerateItem]) -> list[int]:
    return [token for item in items if isinstance(item, Frame) for token in item.token_ids]


async def test_a_stream_arrives_whole_in_order_and_then_its_account(case: Case) -> None:
    script = [Frame(n, b"data: %d\n\n" % n, (n,)) for n in range(300)]
    case.plays(*script, final(300))
    items = await case.read()
    assert text(items) == text(script)
    assert tokens(items) == list(range(300))
    assert items[-1] == final(300)
    assert case.replica.closed == 1


async def test_many_streams_share_the_way_and_do_not_mix(case: Case) -> None:
    def script(request: GenerateCall) -> Sequence[GenerateItem]:
        mine = f"data: {request.request_id}\n\n".encode()
        return [*frames(40, mine), final(40)]

    case.replica.script = script
    names = [f"q{number}" for number in range(64)]
    for name, items in zip(names, await asyncio.gather(*map(case.read, names)), strict=True):
        assert text(items) == f"data: {name}\n\n".encode() * 40
        assert tokens(items) == list(range(40))


async def test_a_refusal_is_the_only_item(case: Case) -> None:
    refusal = Refusal(400, "too long", param="messages")
    case.plays(refusal)
    assert await case.read() == [refusal]


@pytest.mark.parametrize("before", [0, 3])
async def test_an_engine_that_dies_is_told_as_dead(case: Case, before: int) -> None:
    case.plays(*frames(before), EngineDead("the engine died"))
    with pytest.raises(EngineDead, match="the engine died"):
        await case.read()


async def test_any_failure_of_the_call_means_a_dead_replica(case: Case) -> None:
    case.plays(*frames(2), OSError("connection reset"))
    with pytest.raises(EngineDead, match="OSError: connection reset"):
        await case.read()


async def test_an_account_that_counts_more_frames_than_came_is_an_error(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.engine.transport.LATE_FRAMES_S", 0.01)
    case.plays(*frames(2), final(3))
    with pytest.raises(EngineDead, match="frames arrived"):
        await case.read()


async def test_a_gap_in_the_frames_is_an_error(case: Case) -> None:
    case.plays(frames(1)[0], Frame(2, b"data: y\n\n", (9,)), final(3))
    with pytest.raises(EngineDead, match="frame 2 arrived in place of 1"):
        await case.read()


async def test_a_reader_that_leaves_closes_the_generation(case: Case) -> None:
    case.plays(*frames(100_000))
    async with asyncio.timeout(WAIT_S):
        async with aclosing(case.transport.generate(call())) as items:
            async for _ in items:
                break
        await case.replica.ended.wait()


async def test_a_cancelled_reader_closes_the_generation(case: Case) -> None:
    started = asyncio.Event()

    async def pause() -> None:
        started.set()
        await asyncio.sleep(WAIT_S)

    case.replica.pause = pause
    case.plays(*frames(1))
    reading = asyncio.create_task(case.read())
    async with asyncio.timeout(WAIT_S):
        await started.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await case.replica.ended.wait()


async def test_a_reader_that_keeps_up_gets_each_frame_by_itself(channel: Case) -> None:
    taken = asyncio.Event()
    taken.set()

    async def pause() -> None:
        await taken.wait()
        taken.clear()

    channel.replica.pause = pause
    channel.plays(*frames(20), final(20))
    items: list[GenerateItem] = []
    async with asyncio.timeout(WAIT_S), aclosing(channel.transport.generate(call())) as stream:
        async for item in stream:
            items.append(item)
            taken.set()
    assert len(items) == 21


async def test_a_reader_that_does_not_read_is_cut_off_and_its_generation_ends(
    channel: Case,
) -> None:
    """Its memory is bounded, and another stream on the same channel does not notice."""
    other = [*frames(50), final(50)]
    endless = frames(100_000, b"data: " + b"x" * 200 + b"\n\n")
    channel.replica.script = lambda request: endless if request.request_id == "slow" else other
    first_taken = asyncio.Event()
    first = iter([True])

    async def pause() -> None:
        if not next(first, False):
            await first_taken.wait()
        await asyncio.sleep(0)

    channel.replica.pause = pause
    slow = channel.transport.generate(call("slow"))
    async with asyncio.timeout(WAIT_S):
        await anext(slow)
        first_taken.set()
        await channel.replica.ended.wait()
        assert len(text(await channel.read("fast"))) == len(text(other))
        with pytest.raises(ReaderTooSlow):
            await anext(slow)
    await slow.aclose()


async def test_one_large_frame_may_pass_an_empty_buffer(channel: Case) -> None:
    channel.plays(Frame(0, b"x" * (BUFFER_BYTES * 100), (1,)), final(1))
    assert len(text(await channel.read())) == BUFFER_BYTES * 100


async def test_what_is_no_batch_is_dropped_and_the_rest_goes_on(channel: Case) -> None:
    for noise in (b"", b"\x00", b"\xc1", pack([])[:0] + b"\x81\x01\x02"):
        channel.receiver._sort(noise)
    with pytest.raises(ValueError, match="not a batch"):
        unpack(b"\x01")
    channel.plays(*frames(2), final(2))
    assert len(await channel.read()) >= 2


async def test_nobody_without_the_routers_key_gets_in(channel: Case) -> None:
    inflow = channel.receiver.open()
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.connect(inflow.reply.endpoint)
    socket.send(pack([(inflow.reply.stream, 0, b"data: forged\n\n", ())]))
    channel.plays(*frames(3), final(3))
    await channel.read()
    assert inflow._arrived == 0
    context.destroy(linger=0)


async def test_two_routers_on_one_machine_take_different_ports(channel: Case) -> None:
    second = ChannelReceiver("127.0.0.1", PORTS, BUFFER_BYTES)
    assert second.open().reply.endpoint != channel.receiver.open().reply.endpoint
    taken = int(second.open().reply.endpoint.rpartition(":")[2])
    with pytest.raises(OSError, match=r"channel\.ports"):
        ChannelReceiver("127.0.0.1", range(taken, taken + 1), BUFFER_BYTES)
    second.close()
