"""Both ways tokens travel, over a local stand-in of Serve's handle and the real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import pytest_asyncio
import zmq

from serve_app.core.exchange import Digest, PoolDigest, RouterId, TenantWaiting
from serve_app.core.types import (
    PoolName,
    PriorityClass,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Usage,
)
from serve_app.engine import channel_outlet, channel_receiver
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
    WatchCall,
)
from serve_app.engine.channel import Batch, Load, ReplyTo, Told, pack, unpack
from serve_app.engine.channel_outlet import StreamLost
from serve_app.engine.channel_receiver import ChannelReceiver
from serve_app.engine.channel_sender import ChannelSender
from serve_app.engine.load_publisher import LoadPublisher
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
    snapshots: int = 0
    dead: bool = False

    def __post_init__(self) -> None:
        engine: Any = self
        self.load = LoadPublisher(engine, self.sender, period_s=0.01)

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

    async def attend(self, request: WatchCall) -> None:
        await self.load.attend(request)

    async def watch(self, request: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        async with aclosing(self.load.watch()) as views:
            async for view in views:
                yield view

    def snapshot(self) -> ReplicaView:
        self.snapshots += 1
        return ReplicaView(ReplicaId("r1"), PoolName("chat"), self.snapshots, 8, 2, 0, 0.5, 4096)

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDead("the engine died")


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

    async def close(self) -> None:
        await self.replica.load.stop()
        self.sender.close()
        self.receiver.close()


@pytest_asyncio.fixture(params=["channel", "handle"])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    made = Case(request.param)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def channel() -> AsyncIterator[Case]:
    made = Case("channel")
    yield made
    await made.close()


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


async def test_what_is_no_message_is_dropped_and_the_rest_goes_on(channel: Case) -> None:
    for noise in (b"", b"\x00", b"\xc1", b"\x81\x01\x02", b"\x92\x63\x90"):
        channel.receiver._sort(noise)
    with pytest.raises(ValueError, match="no message of the token channel"):
        unpack(b"\x01")
    channel.plays(*frames(2), final(2))
    assert len(await channel.read()) >= 2


async def test_nobody_without_the_routers_key_gets_in(channel: Case) -> None:
    inflow = channel.receiver.open()
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.connect(inflow.reply.router.endpoint)
    socket.send(pack(Batch([(inflow.reply.stream, 0, b"data: forged\n\n", ())])))
    channel.plays(*frames(3), final(3))
    await channel.read()
    assert inflow._arrived == 0
    context.destroy(linger=0)


async def test_two_routers_on_one_machine_take_different_ports(channel: Case) -> None:
    second = ChannelReceiver("127.0.0.1", PORTS, BUFFER_BYTES)
    assert second.address.endpoint != channel.receiver.address.endpoint
    taken = int(second.address.endpoint.rpartition(":")[2])
    with pytest.raises(OSError, match=r"channel\.ports"):
        ChannelReceiver("127.0.0.1", range(taken, taken + 1), BUFFER_BYTES)
    second.close()


async def test_the_load_arrives_for_as_long_as_it_is_watched(case: Case) -> None:
    case.replica.load.start()
    async with asyncio.timeout(WAIT_S):
        async with aclosing(case.transport.watch(WatchCall(ReplicaId("r1")))) as views:
            seen = [await anext(views) for _ in range(5)]
        sequences = [view.sequence for view in seen]
        assert sequences == sorted(sequences)
        assert seen[0] == ReplicaView(
            ReplicaId("r1"), PoolName("chat"), seen[0].sequence, 8, 2, 0, 0.5, 4096
        )


async def test_a_watched_engine_that_dies_is_told_as_dead(case: Case) -> None:
    case.replica.load.start()
    async with asyncio.timeout(WAIT_S):
        async with aclosing(case.transport.watch(WatchCall(ReplicaId("r1")))) as views:
            await anext(views)
            case.replica.dead = True
            with pytest.raises(EngineDead, match="the engine died"):
                _ = [view async for view in views]


async def test_two_routers_see_the_same_snapshots(channel: Case) -> None:
    """They divide what one snapshot shows free, so it must be one."""
    second = ChannelReceiver("127.0.0.1", PORTS, BUFFER_BYTES)
    channel.replica.load.start()
    both = [channel.transport, ChannelTransport(LocalHandle(channel.replica), second)]

    async def sequences(transport: Transport) -> set[int]:
        async with aclosing(transport.watch(WatchCall(ReplicaId("r1")))) as views:
            return {(await anext(views)).sequence for _ in range(20)}

    async with asyncio.timeout(WAIT_S):
        seen = await asyncio.gather(*map(sequences, both))
    second.close()
    assert len(seen[0] & seen[1]) >= 10


async def test_a_router_that_ends_frees_its_generations_at_once(channel: Case) -> None:
    """Also those that generate nothing now: no frame is awaited to find out."""
    played = iter([None])

    async def pause() -> None:
        if next(played, ()) == ():
            await asyncio.Event().wait()

    channel.replica.pause = pause
    channel.plays(*frames(2), final(2))
    doomed = ChannelReceiver("127.0.0.1", PORTS, BUFFER_BYTES)
    inflow = doomed.open()
    delivering = asyncio.create_task(
        channel.sender.deliver(channel.replica.generate(call()), inflow.reply)
    )
    async with asyncio.timeout(WAIT_S):
        await inflow.take()
        doomed.close()
        with pytest.raises(StreamLost, match="broke"):
            await delivering
    assert channel.replica.closed == 1


async def test_a_router_that_is_never_reached_ends_its_streams(
    channel: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_outlet, "CONNECT_S", 0.05)
    nobody = ChannelReceiver("127.0.0.1", PORTS, BUFFER_BYTES)
    nobody.close()

    async def pause() -> None:
        await asyncio.Event().wait()

    channel.replica.pause = pause
    channel.plays(*frames(1))
    generation = channel.replica.generate(call())
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(StreamLost, match="not reached"):
            await channel.sender.deliver(generation, ReplyTo(nobody.address, 0))


async def test_a_cancelled_call_stays_cancelled(channel: Case) -> None:
    channel.plays(*frames(100_000))
    inflow = channel.receiver.open()
    delivering = asyncio.create_task(
        channel.sender.deliver(channel.replica.generate(call()), inflow.reply)
    )
    await asyncio.sleep(0)
    delivering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await delivering


class Wire:
    """A TCP connection in between, which a test can cut; new connections work again."""

    def __init__(self, target: str) -> None:
        self._host, port = target.removeprefix("tcp://").split(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, back]
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            target.write(data)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.cut()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def test_a_cut_connection_ends_its_streams_with_an_error_and_serves_later_ones(
    channel: Case,
) -> None:
    wire = Wire(channel.receiver.address.endpoint)
    channel.receiver.address = replace(channel.receiver.address, endpoint=await wire.start())
    played = iter(range(5))

    async def pause() -> None:
        if next(played, None) is None:
            await asyncio.Event().wait()

    channel.replica.pause = pause
    channel.plays(*frames(20), final(20))
    async with asyncio.timeout(WAIT_S):
        async with aclosing(channel.transport.generate(call())) as items:
            await anext(items)
            wire.cut()
            with pytest.raises(EngineDead, match="StreamLost: the connection to the router broke"):
                _ = [item async for item in items]
        await channel.replica.ended.wait()
        channel.replica.pause = lambda: asyncio.sleep(0)
        assert text(await channel.read()) == text(frames(20))
    await wire.close()


async def test_a_message_above_the_bound_ends_its_streams_with_an_error_and_no_others(
    channel: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_receiver, "MAX_MESSAGE_BYTES", 100_000)
    monkeypatch.setattr("serve_app.engine.transport.LATE_FRAMES_S", 0.2)
    receiver = ChannelReceiver("127.0.0.1", PORTS, 10_000_000)
    transport = ChannelTransport(LocalHandle(channel.replica), receiver)
    large = [Frame(0, b"x" * 200_000, (1,)), final(1)]
    channel.replica.script = lambda request: (
        large if request.request_id == "large" else [*frames(3), final(3)]
    )
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(EngineDead, match=r"broke|arrived"):
            async with aclosing(transport.generate(call("large"))) as items:
                _ = [item async for item in items]
        async with aclosing(transport.generate(call("small"))) as items:
            assert text([item async for item in items]) == text(frames(3))
    receiver.close()


async def test_what_routers_tell_each_other_arrives_as_it_was(channel: Case) -> None:
    tenant = TenantId("acme")
    part = PoolDigest(
        requests=(1, 2, 3),
        critical_waits=True,
        served=(((tenant, 1.5),), (), ()),
        waiting=((), (TenantWaiting(tenant, 2.0, 100.0),), ()),
    )
    digest = Digest(RouterId("a"), 7, {PoolName("chat"): part})
    heard: asyncio.Future[Digest] = asyncio.get_running_loop().create_future()
    channel.receiver.on_told = heard.set_result
    assert channel.sender.tell(channel.receiver.address, pack(Told(digest)))
    async with asyncio.timeout(WAIT_S):
        assert await heard == digest


def test_a_load_travels_unchanged() -> None:
    view = ReplicaView(
        ReplicaId("r"), PoolName("p"), 3, 8, 1, 2, 0, 100, 5, (1, 2, 3), 9, ("a",), True
    )
    message = unpack(pack(Load(view)))
    assert isinstance(message, Load)
    assert message.view == view
