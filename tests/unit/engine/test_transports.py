"""Both ways tokens travel, over a local stand-in of Serve's handle and the real socket."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
import zmq

from serve_app.config import SPARE_CALLS, PoolArgs
from serve_app.core.exchange import Digest, PoolDigest, RouterId, TenantWaiting
from serve_app.core.types import (
    PoolName,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Usage,
)
from serve_app.engine import channel_inlet, channel_outlet
from serve_app.engine.address import Address, ReplyTo
from serve_app.engine.api import (
    Endpoint,
    EngineBusy,
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
from serve_app.engine.channel import Batch, Call, Cancel, End, Hello, Load, pack, unpack
from serve_app.engine.channel_engine import EngineChannel
from serve_app.engine.channel_router import RouterChannel
from serve_app.engine.load_publisher import LoadPublisher
from serve_app.engine.transport import Cap, ChannelTransport, HandleTransport, Transport
from tests.generate_calls import generate_call

ROOT = Path(__file__).parents[3]

PORTS = range(21_000, 22_000)
BUFFER_BYTES = 4096
WAIT_S = 120.0


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is given up because a busy machine leaves it nothing for long."""
    for seconds in ("CONNECT_S", "STALL_S"):
        monkeypatch.setattr(channel_outlet, seconds, 3600.0)
    for milliseconds in ("HEARTBEAT_MS", "HEARTBEAT_TIMEOUT_MS"):
        monkeypatch.setattr(channel_outlet, milliseconds, 3_600_000)


def nothing() -> None:
    return


def frames(count: int, data: bytes = b"data: x\n\n") -> list[GenerateItem]:
    return [Frame(number, data, (number,)) for number in range(count)]


def final(count: int) -> Final:
    return Final(Usage(3, 0, count), EngineTimings(), frames=count)


def call(name: str = "q") -> GenerateCall:
    return generate_call(name, endpoint=Endpoint.CHAT, target=R1)


R1 = ReplicaId("r1")
CALLS_MAX = 100


@dataclass
class Replica:
    """An engine replica whose engine plays ``script``; ``pause`` is awaited before each item."""

    script: Callable[[GenerateCall], Sequence[GenerateItem | Exception]]
    pause: Callable[[], Any] = field(default=lambda: asyncio.sleep(0))
    closed: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    snapshots: int = 0
    dead: bool = False
    attending: int = 0
    extended: list[tuple[RequestId, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        engine: Any = self
        self.channel = EngineChannel(R1, "127.0.0.1", PORTS, self.generate, CALLS_MAX)
        self.load = LoadPublisher(engine, self.check_health, self.channel, period_s=0.01)
        self.load.start()

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

    async def attend(self, request: WatchCall) -> None:
        self.attending += 1
        try:
            await self.load.attend(request)
        finally:
            self.attending -= 1

    async def watch(self, request: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        async with aclosing(self.load.watch()) as views:
            async for view in views:
                yield view

    def snapshot(self) -> ReplicaView:
        self.snapshots += 1
        return ReplicaView(R1, PoolName("chat"), self.snapshots, 8, 2, 0, 0.5, 4096)

    async def check_health(self) -> None:
        if self.dead:
            raise EngineDead("the engine died")

    async def close(self) -> None:
        await self.load.stop()
        await self.channel.close()


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
    """A replica, and a router's transport to it, which follows the replica's load."""

    def __init__(self, kind: str) -> None:
        self.router = RouterChannel("127.0.0.1", PORTS, BUFFER_BYTES)
        self.replica = Replica(lambda _: [])
        handle = LocalHandle(self.replica)
        self.transport: Transport = (
            ChannelTransport(handle, self.router) if kind == "channel" else HandleTransport(handle)
        )
        self.views: list[ReplicaView] = []
        self.following: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Follow the replica's load; return once some has come."""
        known = asyncio.Event()

        async def follow() -> None:
            async with aclosing(self.transport.watch(WatchCall(R1))) as views:
                async for view in views:
                    self.views.append(view)
                    known.set()

        self.following = asyncio.create_task(follow())
        async with asyncio.timeout(WAIT_S):
            await known.wait()

    def plays(self, *items: GenerateItem | Exception) -> None:
        self.replica.script = lambda _: items

    async def read(self, name: str = "q") -> list[GenerateItem]:
        async with (
            asyncio.timeout(WAIT_S),
            aclosing(self.transport.generate(call(name), nothing)) as items,
        ):
            return [item async for item in items]

    async def unfollow(self) -> None:
        if self.following is not None:
            self.following.cancel()
            await asyncio.gather(self.following, return_exceptions=True)

    async def close(self) -> None:
        await self.unfollow()
        await self.replica.close()
        self.router.close()


@pytest_asyncio.fixture(params=["channel", "handle"])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    made = Case(request.param)
    await made.connect()
    yield made
    await made.close()


@pytest_asyncio.fixture
async def channel() -> AsyncIterator[Case]:
    made = Case("channel")
    await made.connect()
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


@pytest.mark.parametrize("error", [AssertionError(), TimeoutError(), OSError("\n")])
async def test_a_failure_without_a_word_is_told_by_its_kind(case: Case, error: Exception) -> None:
    case.plays(*frames(2), error)
    with pytest.raises(EngineDead, match=f"^{type(error).__name__}"):
        await case.read()


@pytest.mark.parametrize(
    "said",
    [
        OSError("no file \udcff"),
        EngineDead("no file \udcff"),
        Refusal(400, "no \udcff", param="\udcff", code="\udcff"),
    ],
)
async def test_an_engines_words_that_are_no_text_end_its_stream_and_no_other(
    channel: Case, said: Exception | Refusal, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a surrogate pair, as in a file's name: it cannot be encoded."""
    # Nor can it by what carries a test's log from process to process.
    caplog.set_level(logging.CRITICAL, logger="headrace.channel")
    other = [*frames(3), final(3)]
    channel.replica.script = lambda request: [said] if request.request_id == "odd" else other
    odd, items = await asyncio.gather(
        channel.read("odd"), channel.read("other"), return_exceptions=True
    )
    assert not isinstance(items, BaseException)
    assert text(items) == text(other)
    if isinstance(said, Refusal):
        assert odd == [Refusal(400, "no ?", param="?", code="?")]
    else:
        assert isinstance(odd, EngineDead)
        assert str(odd).endswith("no file ?")


async def test_a_router_that_reads_nothing_just_now_learns_where_calls_go(
    channel: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    await channel.unfollow()
    outlet = channel.replica.channel._sender.outlet(channel.router.address)
    refused = asyncio.Event()
    with monkeypatch.context() as full:
        full.setattr(outlet, "_try", lambda message: refused.set())
        connecting = asyncio.create_task(channel.connect())
        async with asyncio.timeout(WAIT_S):
            await refused.wait()
    await connecting
    channel.plays(*frames(2), final(2))
    assert len(await channel.read()) >= 2


async def test_an_account_that_counts_more_frames_than_came_is_an_error(case: Case) -> None:
    case.plays(*frames(2), final(3))
    with pytest.raises(EngineDead, match="frames arrived"):
        await case.read()


async def test_a_gap_in_the_frames_is_an_error(case: Case) -> None:
    case.plays(frames(1)[0], Frame(2, b"data: y\n\n", (9,)), final(3))
    with pytest.raises(EngineDead, match="frame 2 arrived in place of 1"):
        await case.read()


async def test_a_call_that_runs_is_told_how_far_it_may_go_on(channel: Case) -> None:
    told = asyncio.Event()
    channel.plays(*frames(2), final(2))
    channel.replica.pause = told.wait
    extended, reached = channel.replica.extended, asyncio.Event()
    channel.replica.channel._extend = lambda *news: (extended.append(news), reached.set())
    cap = Cap(10, lambda tokens: None)
    async with aclosing(channel.transport.generate(call(), nothing, cap)) as items:
        reading = asyncio.ensure_future(anext(items))
        async with asyncio.timeout(WAIT_S):
            while cap.on_raise is None:  # noqa: ASYNC110  # another task does it
                await asyncio.sleep(0)
            cap.raise_to(30)
            await reached.wait()
        told.set()
        await reading
    assert (cap.tokens, extended) == (30, [(RequestId("q"), 30)])
    cap.raise_to(40)
    await channel.read("other")
    assert extended == [(RequestId("q"), 30)], "it has ended"


async def test_a_reader_that_leaves_closes_the_generation(case: Case) -> None:
    case.plays(*frames(100_000))
    async with asyncio.timeout(WAIT_S):
        async with aclosing(case.transport.generate(call(), nothing)) as items:
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
    async with (
        asyncio.timeout(WAIT_S),
        aclosing(channel.transport.generate(call(), nothing)) as stream,
    ):
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
    overflown = asyncio.Event()
    slow = channel.transport.generate(call("slow"), overflown.set)
    async with asyncio.timeout(WAIT_S):
        await anext(slow)
        first_taken.set()
        await overflown.wait()
        assert len(text(await channel.read("fast"))) == len(text(other))
        with pytest.raises(ReaderTooSlow):
            await anext(slow)
        await channel.replica.ended.wait()


async def test_one_large_frame_may_pass_an_empty_buffer(channel: Case) -> None:
    channel.plays(Frame(0, b"x" * (BUFFER_BYTES * 100), (1,)), final(1))
    assert len(text(await channel.read())) == BUFFER_BYTES * 100


async def test_what_is_no_message_is_dropped_and_the_rest_goes_on(channel: Case) -> None:
    for noise in (b"", b"\x00", b"\xc1", b"\x81\x01\x02", b"\x92\x63\x90"):
        channel.router._inlet.take(noise)
        channel.replica.channel._inlet.take(noise)
    with pytest.raises(ValueError, match="no message of the token channel"):
        unpack(b"\x01")
    channel.plays(*frames(2), final(2))
    assert len(await channel.read()) >= 2


async def test_nobody_without_the_key_gets_in(channel: Case) -> None:
    context = zmq.Context()
    try:
        for address in (channel.router.address, channel.replica.channel.address):
            socket = context.socket(zmq.PUSH)
            socket.connect(address.endpoint)
            for stream in range(20):
                reply = ReplyTo(channel.router.address, 1000 + stream)
                for message in (
                    Batch([(stream, 0, b"data: forged\n\n", ())]),
                    Call(replace(call(), reply=reply)),
                ):
                    # Once it is turned away there is nobody to send to.
                    with suppress(zmq.Again):
                        socket.send(pack(message), zmq.NOBLOCK)
        channel.plays(*frames(3), final(3))
        assert text(await channel.read()) == text(frames(3))
        assert channel.replica.closed == 1
    finally:
        context.destroy(linger=0)


async def test_two_processes_on_one_machine_take_different_ports(channel: Case) -> None:
    second = RouterChannel("127.0.0.1", PORTS, BUFFER_BYTES)
    endpoints = {
        each.address.endpoint for each in (second, channel.router, channel.replica.channel)
    }
    assert len(endpoints) == 3
    taken = int(second.address.endpoint.rpartition(":")[2])
    with pytest.raises(OSError, match=r"channel\.ports"):
        RouterChannel("127.0.0.1", range(taken, taken + 1), BUFFER_BYTES)
    second.close()


async def test_the_load_arrives_for_as_long_as_it_is_watched(case: Case) -> None:
    async with asyncio.timeout(WAIT_S):
        async with aclosing(case.transport.watch(WatchCall(R1))) as views:
            seen = [await anext(views) for _ in range(5)]
    sequences = [view.sequence for view in seen]
    assert sequences == sorted(sequences)
    number = seen[0].sequence
    assert seen[0] == ReplicaView(R1, PoolName("chat"), number, 8, 2, 0, 0.5, 4096)


async def test_a_watched_engine_that_dies_is_told_as_dead(case: Case) -> None:
    case.replica.dead = True
    assert case.following is not None
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(EngineDead, match="the engine died"):
            await case.following


async def test_the_streams_of_a_replica_that_is_lost_end_at_once(channel: Case) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    channel.replica.pause = never
    channel.plays(*frames(1))
    reading = asyncio.create_task(channel.read())
    async with asyncio.timeout(WAIT_S):
        while not channel.replica.channel.open_calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        channel.replica.dead = True
        with pytest.raises(EngineDead, match="the engine died"):
            await reading
    with pytest.raises(EngineDead, match="left the pool"):
        await channel.read()


async def test_a_replica_that_leaves_keeps_its_streams_to_their_end(channel: Case) -> None:
    """Serve stops a replica once no call to it is open, so ours stays open that long."""
    go_on = asyncio.Event()
    channel.replica.pause = go_on.wait
    channel.plays(*frames(3), final(3))
    reading = asyncio.create_task(channel.read())
    async with asyncio.timeout(WAIT_S):
        while not channel.replica.channel.open_calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await channel.unfollow()
        with pytest.raises(EngineDead, match="left the pool"):
            await channel.read("late")
        assert channel.replica.attending == 1
        go_on.set()
        assert text(await reading) == text(frames(3))
        while channel.replica.attending:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_replica_takes_so_many_calls_at_once_and_turns_others_away(
    channel: Case,
) -> None:
    channel.replica.channel._calls_max = 1
    go_on = asyncio.Event()
    channel.replica.pause = go_on.wait
    channel.plays(*frames(1), final(1))
    first = asyncio.create_task(channel.read("first"))
    async with asyncio.timeout(WAIT_S):
        while not channel.replica.channel.open_calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(EngineBusy, match="runs 1 calls already"):
            await channel.read("second")
        go_on.set()
        assert len(await first) == 2


async def test_a_full_replica_takes_all_that_a_lost_one_of_its_pool_had(channel: Case) -> None:
    """They wait in its engine; turned away, they would be tried elsewhere, where it is as full."""
    engine = {"kind": "sim", "max_num_seqs": 100}
    pool = PoolArgs.model_validate({"name": "chat", "engine": engine})
    assert pool.engine.max_num_seqs > SPARE_CALLS, "they alone would not do"
    channel.replica.channel._calls_max = pool.calls_max
    go_on = asyncio.Event()
    channel.replica.pause = go_on.wait
    channel.plays(*frames(1), final(1))
    count = 2 * pool.engine.max_num_seqs
    reading = [asyncio.create_task(channel.read(f"q{number}")) for number in range(count)]
    async with asyncio.timeout(WAIT_S):
        while channel.replica.channel.open_calls < count:
            assert not any(each.done() for each in reading), "one was turned away"
            await asyncio.sleep(0.01)
        go_on.set()
        assert all(len(items) == 2 for items in await asyncio.gather(*reading))


async def test_two_routers_see_the_same_snapshots(channel: Case) -> None:
    """They divide what one snapshot shows free, so it must be one."""
    second = RouterChannel("127.0.0.1", PORTS, BUFFER_BYTES)
    transport = ChannelTransport(LocalHandle(channel.replica), second)
    async with asyncio.timeout(WAIT_S), aclosing(transport.watch(WatchCall(R1))) as views:
        seen = {(await anext(views)).sequence for _ in range(20)}
        await anext(views)
    assert len(seen & {view.sequence for view in channel.views}) >= 15
    second.close()


async def test_a_router_that_ends_frees_its_generations_at_once(channel: Case) -> None:
    """Also those that generate nothing now: no frame is awaited to find out."""
    played = iter([None])

    async def pause() -> None:
        if next(played, ()) == ():
            await asyncio.Event().wait()

    channel.replica.pause = pause
    channel.plays(*frames(2), final(2))
    stream = channel.transport.generate(call(), nothing)
    async with asyncio.timeout(WAIT_S):
        await anext(stream)
        channel.router.close()
        await channel.replica.ended.wait()
        while channel.replica.channel.open_calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


ROUTER = """
import asyncio
from serve_app.engine.channel_router import RouterChannel

async def stay():
    address = RouterChannel("127.0.0.1", range(21_000, 22_000), 4096).address
    print(address.endpoint, address.server_key.decode(), flush=True)
    await asyncio.Event().wait()

asyncio.run(stay())
"""


async def test_a_killed_router_is_noticed_without_waiting_for_any_timer(channel: Case) -> None:
    """Its kernel closes its connections: heartbeats and stalls are for machines that vanish.

    So a slot is free as soon as its engine has aborted, and routers see that a period later.
    None of those timers comes due here.
    """
    channel.replica.pause = asyncio.Event().wait
    channel.plays(*frames(1))
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ROUTER, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert killed.stdout is not None
        async with asyncio.timeout(WAIT_S):
            endpoint, key = (await killed.stdout.readline()).decode().split()
            router = Address(endpoint, key.encode())
            engine = channel.replica.channel
            for stream in range(CALLS_MAX):
                engine._take(Call(replace(call(f"q{stream}"), reply=ReplyTo(router, stream))))
            outlet = engine._sender.outlet(router)
            while outlet._connecting is not None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert engine.open_calls == CALLS_MAX
            killed.kill()
            while engine.open_calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert outlet.failed == "the connection broke"
        assert channel.replica.closed == CALLS_MAX
    finally:
        if killed.returncode is None:
            killed.kill()
        await killed.wait()


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_a_slot_that_was_freed_is_told_of_within_two_seconds_in_every_configuration(
    file: Path,
) -> None:
    """An engine's longest step with an abort in it, and a period until its next snapshot."""
    applications = yaml.safe_load(file.read_text()).get("applications", [])
    for application in applications:
        if application["import_path"] == "serve_app.app:pool":
            assert PoolArgs.model_validate(application["args"]).snapshot_period_s <= 1.0


async def test_a_router_that_is_never_reached_holds_no_generation(
    channel: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_outlet, "CONNECT_S", 0.05)
    nobody = RouterChannel("127.0.0.1", PORTS, BUFFER_BYTES)
    nobody.close()

    async def never() -> None:
        await asyncio.Event().wait()

    channel.replica.pause = never
    channel.plays(*frames(1))
    channel.replica.channel._begin(replace(call(), reply=ReplyTo(nobody.address, 0)))
    async with asyncio.timeout(WAIT_S):
        await channel.replica.ended.wait()


class Wire:
    """A TCP connection in between, which a test can cut; new connections work again."""

    def __init__(self, target: str) -> None:
        self._host, port = target.removeprefix("tcp://").split(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(self._host, self._port)
        self._writers += [writer, back]
        if self._stopped:
            self.stop()
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._pump(source, target))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            target.write(data)

    def stop(self) -> None:
        """Take nothing more of what is sent, as a process does that stands still."""
        self._stopped = True
        for writer in self._writers:
            writer.transport.pause_reading()  # type: ignore[attr-defined]

    def cut(self) -> None:
        """Lose what is under way; from now on connections work."""
        self._stopped = False
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self.cut()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass
class Line:
    """A router before a replica that generates nothing, and the wire that leads to it."""

    case: Case
    wire: Wire

    async def reads(self, name: str, cap: Cap | None = None) -> asyncio.Task[GenerateItem]:
        """Begin to read a stream; return once the replica runs it."""
        stream = self.case.transport.generate(call(name), nothing, cap)
        reading = asyncio.ensure_future(anext(stream))
        await self.until(lambda: bool(self.case.replica.channel.open_calls))
        return reading

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def line() -> AsyncIterator[Line]:
    case = Case("channel")
    wire = Wire(case.replica.channel.address.endpoint)
    inlet = case.replica.channel._inlet
    inlet.address = replace(inlet.address, endpoint=await wire.start())
    case.replica.pause = asyncio.Event().wait
    case.plays(*frames(1))
    await case.connect()
    yield Line(case, wire)
    await case.close()
    await wire.close()


async def leaves(reading: asyncio.Task[GenerateItem]) -> None:
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_a_cancel_that_is_lost_with_its_connection_is_sent_again(line: Line) -> None:
    reading = await line.reads("q")
    line.wire.stop()
    await leaves(reading)
    line.wire.cut()
    await line.until(lambda: not line.case.replica.channel.open_calls)
    assert line.case.replica.closed == 1
    await line.until(lambda: not line.case.router._cancels)


async def test_a_cancel_behind_which_an_engine_stood_still_for_long_is_sent_again(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never left the router: its queue to the engine was full, and was dropped as a whole."""
    monkeypatch.setattr(channel_outlet, "BATCHES_IN_SOCKET", 1)
    monkeypatch.setattr(channel_outlet, "WAITING_BYTES_MAX", 1 << 20)
    router, engine = line.case.router, line.case.replica.channel
    reading = await line.reads("q")
    outlet = router._sender.outlet(engine.address)
    line.wire.stop()
    while not outlet._waiting:
        router.call(replace(call("large"), body=bytes(1 << 19)), nothing)
        await asyncio.sleep(0)
    await leaves(reading)
    while outlet.failed is None:
        last = router.call(replace(call("more"), body=bytes(1 << 19)), nothing)
    with pytest.raises(EngineDead, match="bytes unread"):
        await last.take()
    # Nothing is let in meanwhile: what tries it next is given up too.
    with monkeypatch.context() as soon:
        soon.setattr(channel_outlet, "CONNECT_S", 0.05)
        again = router._sender.outlet(engine.address)
        await line.until(lambda: again.failed is not None)
    line.wire.cut()
    await line.until(lambda: not engine.open_calls)
    assert line.case.replica.closed == 1


async def test_a_cancel_that_comes_before_its_call_ends_it_too(channel: Case) -> None:
    """They come by two connections if the first broke, and in any order."""
    router, engine = channel.router, channel.replica.channel
    asked = Call(replace(call(), reply=ReplyTo(router.address, 10**6)))
    for message in (Cancel(router.address, [10**6]), asked):
        engine._take(message)
    assert not engine.open_calls
    channel.plays(*frames(2), final(2))
    assert len(await channel.read("other")) >= 2


async def test_a_cancel_is_answered_also_of_a_call_that_had_not_begun(channel: Case) -> None:
    router, engine = channel.router, channel.replica.channel
    ends: list[End] = []
    engine._sender.outlet(router.address).end = ends.append  # type: ignore[method-assign]
    engine._take(Call(replace(call(), reply=ReplyTo(router.address, 10**6))))
    engine._take(Cancel(router.address, [10**6]))
    async with asyncio.timeout(WAIT_S):
        while engine.open_calls:  # noqa: ASYNC110
            await asyncio.sleep(0)
    assert [(each.stream, each.error) for each in ends] == [(10**6, "it was cancelled")]
    assert channel.replica.closed == 0


@pytest.mark.parametrize("second", ["cancel", "the router's end"])
async def test_an_engine_that_is_slow_to_abort_a_call_is_not_cut_short_in_it(
    channel: Case, second: str
) -> None:
    aborting, go_on = asyncio.Event(), asyncio.Event()
    aborted = []

    async def generate(request: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        try:
            yield frames(1)[0]
            await asyncio.Event().wait()
        finally:
            aborting.set()
            await go_on.wait()
            aborted.append(request.request_id)

    router, engine = channel.router, channel.replica.channel
    engine._generate = generate
    async with asyncio.timeout(WAIT_S):
        async with aclosing(channel.transport.generate(call(), nothing)) as items:
            await anext(items)
        await aborting.wait()
        outlet = engine._sender.outlet(router.address)
        if second == "cancel":
            engine._take(Cancel(router.address, [reply.stream for reply in engine._tasks]))
        else:
            router.close()
            while outlet.failed is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        go_on.set()
        while engine.open_calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert aborted == ["q"]


async def test_a_stream_whose_extension_may_be_lost_ends_with_an_error(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the engine would end it at what was paid for before, as if that were all."""
    cap = Cap(10, lambda tokens: None)
    reading = await line.reads("q", cap)
    monkeypatch.setattr(channel_outlet, "CONNECT_S", 0.1)
    line.wire.stop()
    # The connection that brought the call was closed: nothing went over it for a minute.
    line.case.router._sender._outlets.pop(line.case.replica.channel.address).close()
    cap.raise_to(30)
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(EngineDead, match="not reached"):
            await reading


async def test_a_stream_that_the_engine_ended_with_an_error_is_not_cancelled(
    channel: Case,
) -> None:
    channel.plays(EngineDead("it broke"))
    with pytest.raises(EngineDead, match="it broke"):
        await channel.read()
    assert not channel.router._cancels


@pytest.mark.parametrize("way", ["to the router", "to the engine"])
async def test_a_cut_connection_ends_its_streams_and_serves_later_ones(way: str) -> None:
    """Whichever way is cut: no stream hangs, no generation goes on for nobody."""
    case = Case("channel")
    inlet = case.router._inlet if way == "to the router" else case.replica.channel._inlet
    wire = Wire(inlet.address.endpoint)
    inlet.address = replace(inlet.address, endpoint=await wire.start())
    await case.connect()
    played = iter(range(5))

    async def pause() -> None:
        if next(played, None) is None:
            await asyncio.Event().wait()

    case.replica.pause = pause
    case.plays(*frames(20), final(20))
    async with asyncio.timeout(WAIT_S):
        async with aclosing(case.transport.generate(call(), nothing)) as items:
            await anext(items)
            wire.cut()
            with pytest.raises(EngineDead, match="the connection broke"):
                _ = [item async for item in items]
        await case.replica.ended.wait()
        case.replica.pause = lambda: asyncio.sleep(0)
        if way == "to the router":  # The subscription is lost with it; the fleet renews it.
            await case.unfollow()
            await case.connect()
        assert text(await case.read()) == text(frames(20))
        while case.replica.channel.open_calls:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await case.close()
    await wire.close()


async def test_a_message_above_the_bound_ends_its_streams_with_an_error_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_inlet, "MAX_MESSAGE_BYTES", 100_000)
    case = Case("channel")
    await case.connect()
    large = [Frame(0, b"x" * 200_000, (1,)), final(1)]
    case.replica.script = lambda request: (
        large if request.request_id == "large" else [*frames(3), final(3)]
    )
    with pytest.raises(EngineDead, match="the connection broke"):
        await case.read("large")
    await case.unfollow()
    await case.connect()
    assert text(await case.read("small")) == text(frames(3))
    await case.close()


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
    channel.router.on_told = heard.set_result
    channel.router.tell(channel.router.address, digest)
    async with asyncio.timeout(WAIT_S):
        assert await heard == digest


def test_messages_travel_unchanged() -> None:
    view = ReplicaView(R1, PoolName("p"), 3, 8, 1, 2, 0, 100, 5, (1, 2, 3), 9, ("a",), True)
    address = Address("tcp://127.0.0.1:1", b"key")
    asked = replace(call(), reply=ReplyTo(address, 7), resume_token_ids=(1, 2), max_tokens=3)
    refusal = Refusal(400, "too long", param="messages")
    for message in (
        Load(view),
        Hello(R1, address),
        Call(asked),
        Cancel(address, [7, 8]),
        Batch([(1, 2, b"x", (3,))], [End(1, final(3)), End(2, refusal=refusal), End(3, error="e")]),
    ):
        assert unpack(pack(message)) == message
