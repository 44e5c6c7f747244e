"""One completion from an engine's items to a client's bytes, over a transport of a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import orjson
import pytest

from serve_app import relay as relay_module
from serve_app.core.types import (
    Dispatch,
    Failure,
    KeyId,
    Outcome,
    PoolName,
    PriorityClass,
    ReplicaId,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)
from serve_app.engine.api import (
    Endpoint,
    EngineBusy,
    EngineDead,
    EngineTimings,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    GenerationFailed,
    Refusal,
)
from serve_app.errors import (
    ApiError,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    RequestTimeout,
    Unavailable,
)
from serve_app.gate import Lease, Refused
from serve_app.gateway.http import ClientGone
from serve_app.relay import Relay, error_of, with_service_tier
from tests.generate_calls import generate_call
from tests.replica_slots import ReplicaSlots

POOL = PoolName("chat")
USAGE = Usage(prompt_tokens=7, completion_tokens=2)
FIRST = Frame(0, b'data: {"a":1}\n\n', (5,))
LAST = Frame(1, b"data: [DONE]\n\n", (6,))
FINAL = Final(USAGE, EngineTimings(), frames=2, finish_reason="stop")


class Script:
    """A transport that yields, per replica, a list of items; an exception in it is raised."""

    def __init__(self, **scripts: Sequence[GenerateItem | Exception]) -> None:
        self._scripts = scripts
        self.calls: list[GenerateCall] = []
        self.closed = 0

    async def generate(
        self, call: GenerateCall, on_overflow: Callable[[], None]
    ) -> AsyncGenerator[GenerateItem, None]:
        self.calls.append(call)
        assert call.target is not None
        try:
            for item in self._scripts[call.target]:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed += 1

    def watch(self, call: Any) -> Any:
        raise AssertionError("a relay watches nothing")


class Client:
    """Records the response; ``gone_after`` messages later its connection is closed."""

    def __init__(self, gone_after: int | None = None) -> None:
        self.sent: list[Any] = []
        self._gone_after = gone_after

    async def send(self, message: Any) -> None:
        if self._gone_after is not None and len(self.sent) >= self._gone_after:
            raise OSError("connection lost")
        self.sent.append(message)

    @property
    def start(self) -> Any:
        [start] = [m for m in self.sent if m["type"] == "http.response.start"]
        return start

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.start["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.sent if m["type"] == "http.response.body")

    @property
    def ends(self) -> int:
        bodies = [m for m in self.sent if m["type"] == "http.response.body"]
        return sum(not message.get("more_body", False) for message in bodies)


class Case:
    """A relay between a scripted transport and a recording client."""

    def __init__(
        self, transport: Script, *replicas: str, stream: bool = True, client: Client | None = None
    ) -> None:
        self.transport = transport
        self.slots = ReplicaSlots(POOL, replicas or ("r1",))
        self.client = client or Client()
        self.relay = Relay(self.client.send, [(b"x-own", b"1")], lambda: 1.0)
        self.lease = Lease(self.slots, ticket(), self.slots.dispatch(), 0.0)  # type: ignore[arg-type]
        self.stream = stream

    async def run(self) -> None:
        await self.relay.run(self.lease, self.transport, self._call)

    def _call(self, lease: Lease) -> GenerateCall:
        return generate_call(
            lease.ticket.request_id,
            endpoint=Endpoint.CHAT,
            stream=self.stream,
            target=lease.replica,
        )


def ticket() -> Ticket:
    return Ticket(
        request_id=RequestId("q"),
        pool=POOL,
        tenant=TenantId("t"),
        key=KeyId("k"),
        priority_class=PriorityClass.STANDARD,
        prompt_tokens=10,
        max_tokens=10,
    )


async def test_a_stream_is_relayed_byte_by_byte_and_ends_once() -> None:
    case = Case(Script(r1=[FIRST, LAST, FINAL]))
    await case.run()
    assert case.client.start["status"] == 200
    assert case.client.body == FIRST.data + LAST.data
    assert case.client.ends == 1
    assert case.lease.outcome is Outcome.COMPLETED
    assert case.lease.usage == USAGE
    assert case.slots.tokens == 2
    delivery = case.relay.delivery
    assert (delivery.output_tokens, delivery.frames, delivery.attempts) == (2, 2, 1)
    assert (delivery.streamed, delivery.finish_reason) == (True, "stop")
    assert delivery.usage == USAGE


async def test_a_whole_body_is_sent_with_its_length() -> None:
    final = Final(USAGE, EngineTimings(), frames=1)
    case = Case(Script(r1=[Frame(0, b'{"id":1}', (5, 6)), final]), stream=False)
    await case.run()
    assert case.client.headers[b"content-type"] == b"application/json"
    assert case.client.headers[b"content-length"] == b"8"
    assert case.client.headers[b"x-own"] == b"1"
    assert (case.client.body, case.client.ends) == (b'{"id":1}', 1)
    assert not case.relay.delivery.streamed


@pytest.mark.parametrize("stream", [True, False])
async def test_the_response_says_where_and_how_it_was_served(stream: bool) -> None:
    frames = [FIRST, LAST] if stream else [FIRST]
    case = Case(Script(r1=[*frames, FINAL]), stream=stream)
    dispatch = Dispatch(RequestId("q"), POOL, (ReplicaId("r1"),), 0.0, degraded="capped")
    case.relay.describe(dispatch, PriorityClass.SHEDDABLE)
    await case.run()
    assert case.client.headers[b"x-headrace-pool"] == b"chat"
    assert case.client.headers[b"x-headrace-class"] == b"sheddable"
    assert case.client.headers[b"x-headrace-degraded"] == b"capped"


async def test_before_the_first_byte_a_lost_replica_costs_another_try_only() -> None:
    transport = Script(r1=[EngineDead("gone")], r2=[EngineDead("too")], r3=[FIRST, LAST, FINAL])
    case = Case(transport, "r1", "r2", "r3")
    await case.run()
    assert [call.target for call in transport.calls] == ["r1", "r2", "r3"]
    assert case.slots.failed == ["r1", "r2"]
    assert case.relay.delivery.attempts == 3
    assert (case.client.body, case.client.ends) == (FIRST.data + LAST.data, 1)


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (EngineDead("gone"), Failure.LOST),
        (EngineBusy("full"), Failure.BUSY),
        (Refusal(503, "draining", code="unavailable"), Failure.BUSY),
        (GenerationFailed("broken"), Failure.REQUEST),
    ],
)
async def test_the_core_is_told_why_another_replica_is_wanted(
    error: Refusal | Exception, why: Failure
) -> None:
    case = Case(Script(r1=[error], r2=[FIRST, LAST, FINAL]), "r1", "r2")
    await case.run()
    assert case.slots.reasons == [why]
    assert case.client.ends == 1


async def test_a_request_that_kills_engines_is_begun_on_three_of_them_at_most() -> None:
    names = [f"r{number}" for number in range(9)]
    full = [EngineBusy("full")]
    scripts = {name: full if name in names[1:4] else [EngineDead("gone")] for name in names}
    case = Case(Script(**scripts), *names)
    with pytest.raises(EngineFailed) as caught:
        await case.run()
    assert not caught.value.should_retry
    assert case.slots.reasons == [Failure.LOST] + [Failure.BUSY] * 3 + [Failure.LOST]
    assert case.lease.outcome is Outcome.FAILED
    assert case.client.sent == []


def test_what_a_replica_refused_is_not_held_against_the_next_one() -> None:
    case = Case(Script(), "r1", "r2")
    case.lease.fail()
    case.lease.move(Failure.BUSY)
    assert case.lease.outcome is Outcome.CANCELLED


async def test_without_another_replica_nothing_is_sent() -> None:
    case = Case(Script(r1=[EngineDead("gone")]), "r1")
    with pytest.raises(Refused):
        await case.run()
    assert case.client.sent == []


async def test_after_the_first_byte_a_lost_replica_ends_the_stream_with_an_error() -> None:
    transport = Script(r1=[FIRST, EngineDead("gone")], r2=[FIRST, LAST, FINAL])
    case = Case(transport, "r1", "r2")
    with pytest.raises(EngineFailed) as caught:
        await case.run()
    assert caught.value.should_retry is True
    assert case.slots.failed == []
    assert case.client.ends == 0
    await case.relay.fail(caught.value)
    await case.relay.fail(caught.value)
    assert case.client.ends == 1
    event = case.client.body.removeprefix(FIRST.data)
    assert event.startswith(b"data: ")
    assert orjson.loads(event.removeprefix(b"data: "))["error"]["code"] == "engine_error"
    assert b"[DONE]" not in event
    assert case.lease.outcome is Outcome.FAILED


@pytest.mark.parametrize(("status", "outcome"), [(400, Outcome.CANCELLED), (500, Outcome.FAILED)])
async def test_a_refusal_in_mid_stream_is_the_replicas_failure_if_it_is_a_servers(
    status: int, outcome: Outcome
) -> None:
    case = Case(Script(r1=[FIRST, Refusal(status, "no")]))
    with pytest.raises(ApiError):
        await case.run()
    assert case.lease.outcome is outcome


async def test_an_engines_refusal_is_the_clients_error_and_nothing_was_sent() -> None:
    case = Case(Script(r1=[Refusal(400, "too long", code="context_length_exceeded")]))
    with pytest.raises(ContextLengthExceeded) as caught:
        await case.run()
    await case.relay.fail(caught.value)
    assert case.client.start["status"] == 400
    assert case.client.headers[b"x-own"] == b"1"
    assert case.client.ends == 1
    assert case.slots.failed == []


async def test_a_client_that_left_closes_the_engines_stream() -> None:
    case = Case(Script(r1=[FIRST, LAST, FINAL]), client=Client(gone_after=0))
    with pytest.raises(ClientGone):
        await case.run()
    assert case.transport.closed == 1
    assert case.lease.outcome is Outcome.CANCELLED


async def test_a_cancelled_request_closes_the_engines_stream() -> None:
    reached = asyncio.Event()

    class Endless(Script):
        async def generate(
            self, call: GenerateCall, on_overflow: Callable[[], None]
        ) -> AsyncGenerator[GenerateItem, None]:
            try:
                yield FIRST
                reached.set()
                await asyncio.Event().wait()
            finally:
                self.closed += 1

    case = Case(Endless())
    task = asyncio.create_task(case.run())
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert case.transport.closed == 1
    assert case.client.body == FIRST.data


@pytest.mark.parametrize("stream", [True, False])
async def test_what_ends_a_response_goes_out_when_it_is_settled(stream: bool) -> None:
    """Whoever has read the end may leave at once, and the request is still complete."""
    frames = [FIRST, LAST] if stream else [Frame(0, b"{}", (5, 6))]
    case = Case(Script(r1=[*frames, FINAL]), stream=stream)
    settled: list[tuple[bytes, Outcome]] = []
    send = case.client.send

    async def watched(message: Any) -> None:
        if message["type"] == "http.response.body":
            settled.append((message["body"], case.lease.outcome))
        await send(message)

    case.relay = Relay(watched, [], lambda: 1.0)
    await case.run()
    ends = [outcome for body, outcome in settled if body in (LAST.data, b"{}")]
    assert ends == [Outcome.COMPLETED]
    assert case.slots.tokens == case.relay.delivery.output_tokens == 2


async def test_a_whole_answer_without_its_account_is_made_again_elsewhere() -> None:
    lost = [Frame(0, b"{}", (1,)), EngineDead("gone")]
    again = [Frame(0, b'{"a":1}', (2,)), FINAL]
    case = Case(Script(r1=lost, r2=again), "r1", "r2", stream=False)
    await case.run()
    assert (case.client.body, case.client.ends) == (b'{"a":1}', 1)
    assert case.relay.delivery.output_tokens == 1


async def test_a_stream_that_only_stops_is_an_error_and_no_end() -> None:
    case = Case(Script(r1=[FIRST]))
    with pytest.raises(EngineFailed):
        await case.run()
    assert case.client.body == FIRST.data


@pytest.mark.parametrize(
    ("refusal", "kind", "status"),
    [
        (Refusal(400, "m", param="n"), InvalidRequest, 400),
        (Refusal(404, "m", type="not_found_error"), InvalidRequest, 404),
        (Refusal(400, "m", code="context_length_exceeded"), ContextLengthExceeded, 400),
        (Refusal(503, "m", type="server_error", code="draining"), Unavailable, 503),
    ],
)
def test_refusals_keep_their_status_and_names(
    refusal: Refusal, kind: type[ApiError], status: int
) -> None:
    error = error_of(refusal)
    assert type(error) is kind
    assert (error.status, error.message, error.param) == (status, "m", refusal.param)
    assert error.type == refusal.type
    assert error.code == refusal.code
    assert (error.retry_after_s is not None) == (status == 503)


@pytest.mark.parametrize(
    ("data", "streamed", "expected"),
    [
        (b'{"id":"x","n":1}', False, b'{"id":"x","n":1,"service_tier":"flex"}'),
        # An engine that knows the field leaves it null; the object must not have it twice.
        (
            b'{"id":"x","service_tier":null,"usage":{}}',
            False,
            b'{"id":"x","service_tier":"flex","usage":{}}',
        ),
        (
            b'{"text":"say \\"service_tier\\":null"}\n',
            False,
            b'{"text":"say \\"service_tier\\":null","service_tier":"flex"}\n',
        ),
        (
            b'data: {"a":{"b":1}}\n\ndata: {"a":2}\n\n',
            True,
            b'data: {"a":{"b":1},"service_tier":"flex"}\n\ndata: {"a":2}\n\n',
        ),
        (b"data: [DONE]\n\n", True, b"data: [DONE]\n\n"),
    ],
)
def test_the_served_tier_is_put_into_the_first_object_once(
    data: bytes, streamed: bool, expected: bytes
) -> None:
    assert with_service_tier(data, b',"service_tier":"flex"', streamed=streamed) == expected


class Overflowing(Script):
    """A transport whose reader is found not to read while it is busy with its first frame."""

    async def generate(
        self, call: GenerateCall, on_overflow: Callable[[], None]
    ) -> AsyncGenerator[GenerateItem, None]:
        asyncio.get_running_loop().call_later(0.01, on_overflow)
        async for item in super().generate(call, on_overflow):
            yield item


class Stuck(Client):
    """A client that takes the first message and then reads no more."""

    async def send(self, message: Any) -> None:
        if self.sent:
            await asyncio.Event().wait()
        self.sent.append(message)


async def test_a_client_that_does_not_read_is_let_go_of_and_its_generation_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a write that is never taken nor the error event after it holds the request."""
    monkeypatch.setattr(relay_module, "ERROR_WRITE_S", 0.01)
    case = Case(Overflowing(r1=[FIRST, LAST, FINAL]), client=Stuck())
    async with asyncio.timeout(120):
        with pytest.raises(RequestTimeout) as caught:
            await case.run()
        await case.relay.fail(caught.value)
    assert caught.value.code == "client_too_slow"
    assert case.transport.closed == 1
    assert case.lease.outcome is Outcome.CANCELLED, "its replica did nothing wrong"
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling(), "whoever awaits next is not cancelled too"
