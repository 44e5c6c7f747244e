"""A stream whose replica was lost goes on elsewhere: over scripts, and over simulated engines."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import SimSettings
from serve_app.continuation import Continuation, NotContinued
from serve_app.core.types import (
    KeyId,
    Outcome,
    PoolName,
    PriorityClass,
    RejectReason,
    ReplicaId,
    RequestId,
    TenantId,
    Ticket,
    Usage,
)
from serve_app.engine.api import (
    STREAM_END,
    Endpoint,
    EngineBusy,
    EngineDead,
    EngineTimings,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    Refusal,
)
from serve_app.engine.sim import SimEngine
from serve_app.errors import EngineFailed
from serve_app.gate import Lease
from serve_app.gateway.wire import Sampling
from serve_app.relay import Relay
from tests.generate_calls import generate_call
from tests.properties import examples
from tests.replica_slots import ReplicaSlots

POOL = PoolName("chat")
HEAD = b'data: {"id":"x","created":1700000000,"text":"%s"}\n\n'
SAID = b": continued elsewhere after %d tokens; sampling: %s\n\n"
DONE = Frame(1, STREAM_END, (9,))


def frame(word: bytes, *token_ids: int) -> Frame:
    return Frame(0, HEAD % word, token_ids)


def final(output_tokens: int) -> Final:
    return Final(Usage(7, 3, output_tokens), EngineTimings(), frames=2, finish_reason="stop")


Generate = Callable[[GenerateCall], AsyncGenerator[GenerateItem, None]]


class Replicas:
    """A transport to replicas that are generators by name."""

    def __init__(self, **replicas: Generate) -> None:
        self.replicas = replicas
        self.calls: list[GenerateCall] = []

    async def generate(
        self, call: GenerateCall, on_overflow: Callable[[], None], cap: Any = None
    ) -> AsyncGenerator[GenerateItem, None]:
        self.calls.append(call)
        assert call.target is not None
        async with aclosing(self.replicas[call.target](call)) as items:
            async for item in items:
                yield item

    def watch(self, call: Any) -> Any:
        raise AssertionError("a relay watches nothing")

    async def wake(self) -> None:
        raise AssertionError("a relay wakes nothing")


def script(*items: GenerateItem | Exception) -> Generate:
    async def generate(call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return generate


class Case:
    """A relay between replicas and a recording client."""

    def __init__(
        self,
        reason: RejectReason = RejectReason.NO_REPLICA,
        *,
        most: int = 2,
        sampled_too: bool = True,
        sampling: Sampling = "greedy",
        choices: int = 1,
        **replicas: Generate,
    ) -> None:
        self.transport = Replicas(**replicas)
        self.slots = ReplicaSlots(POOL, list(replicas), reason)
        self.body = b""
        self.ends = 0
        self.relay = Relay(self.send, [], lambda: 1.0)
        self.relay.continuation = Continuation(
            most=most, sampled_too=sampled_too, sampling=sampling, choices=choices
        )
        ticket = Ticket(
            RequestId("q"), POOL, TenantId("t"), KeyId("k"), PriorityClass.STANDARD, 10, 10
        )
        self.lease = Lease(self.slots, ticket, self.slots.dispatch(), 0.0)  # type: ignore[arg-type]
        self.request = generate_call("q", endpoint=Endpoint.CHAT)

    async def send(self, message: Any) -> None:
        self.body += message.get("body", b"")
        self.ends += message["type"] == "http.response.body" and not message.get("more_body")

    def call(self, lease: Lease) -> GenerateCall:
        attempt = self.relay.delivery.attempts
        return dataclasses.replace(self.request, target=lease.replica, attempt=attempt)

    async def run(self) -> Case:
        await self.relay.run(self.lease, self.transport, self.call)
        return self

    async def cut(self) -> NotContinued | None:
        """Run what ends with an error of ours; return why it did not go on."""
        with pytest.raises(EngineFailed) as caught:
            await self.run()
        assert caught.value.should_retry
        assert self.ends == 0
        assert STREAM_END not in self.body
        return self.relay.delivery.not_continued


LOST = EngineDead("gone")


async def test_a_stream_that_lost_its_replica_goes_on_after_the_delivered_tokens() -> None:
    case = await Case(
        r1=script(frame(b"a", 1, 2), frame(b"b", 3), LOST),
        r2=script(frame(b"c", 4), DONE, final(2)),
    ).run()
    assert case.body == (
        HEAD % b"a" + HEAD % b"b" + SAID % (3, b"greedy") + HEAD % b"c" + STREAM_END
    )
    first, second = case.transport.calls
    assert first.resume_token_ids == ()
    assert (second.target, second.attempt) == ("r2", 2)
    assert second.resume_token_ids == (1, 2, 3)
    assert second.resume_created_s == 1_700_000_000
    # One response: the prompt once and every token, as if it had never been cut.
    delivery = case.relay.delivery
    assert case.lease.usage == delivery.usage == Usage(7, 3, 5)
    assert (case.lease.outcome, case.ends) == (Outcome.COMPLETED, 1)
    assert case.slots.tokens == delivery.output_tokens == 5
    assert case.slots.firsts == 2, "each replica's first token is one to the core"
    assert (delivery.attempts, delivery.continuations, delivery.continued) == (2, 1, 1)
    assert delivery.not_continued is None


async def test_it_goes_on_as_often_as_configured_and_no_more() -> None:
    dying = {f"r{n}": script(frame(b"a", n), LOST) for n in range(4)}
    case = Case(**dying, most=2)
    assert await case.cut() is NotContinued.LIMIT
    assert [call.resume_token_ids for call in case.transport.calls] == [(), (0,), (0, 1)]
    assert (case.relay.delivery.continuations, case.relay.delivery.continued) == (2, 2)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"most": 0}, NotContinued.OFF),
        ({"choices": 2}, NotContinued.SEVERAL_CHOICES),
        ({"sampling": "random", "sampled_too": False}, NotContinued.SAMPLED),
    ],
)
async def test_what_may_not_go_on_ends_with_the_error_event_and_no_other_replica_is_asked(
    options: dict[str, Any], why: NotContinued
) -> None:
    case = Case(**options, r1=script(frame(b"a", 1), LOST), r2=script(DONE, final(1)))
    assert await case.cut() is why
    assert len(case.transport.calls) == 1
    assert case.slots.left == ["r1", "r2"], "it was not moved"


@pytest.mark.parametrize("sampling", ["random", "seeded"])
async def test_the_comment_tells_what_the_client_cannot_rely_on(sampling: Sampling) -> None:
    case = await Case(
        sampling=sampling, r1=script(frame(b"a", 1), LOST), r2=script(DONE, final(1))
    ).run()
    assert SAID % (1, sampling.encode()) in case.body


async def test_nothing_to_go_on_from_and_nothing_left_to_say_are_no_continuations() -> None:
    untold = Case(r1=script(frame(b"a"), LOST), r2=script(DONE, final(1)))
    assert await untold.cut() is NotContinued.NO_TOKENS
    ended = Case(r1=script(frame(b"a", 1), DONE, LOST), r2=script(DONE, final(1)))
    assert await ended.cut() is NotContinued.ENDED


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        (RejectReason.NO_REPLICA, NotContinued.NO_REPLICA),
        (RejectReason.RETRY_BUDGET, NotContinued.REFUSED),
    ],
)
async def test_without_a_place_elsewhere_the_error_is_of_the_engine_that_was_lost(
    reason: RejectReason, why: NotContinued
) -> None:
    assert await Case(reason, r1=script(frame(b"a", 1), LOST)).cut() is why


async def test_an_engine_that_cannot_go_on_ends_the_stream() -> None:
    unsupported = Refusal(400, "no", code="resume_unsupported")
    case = Case(r1=script(frame(b"a", 1), LOST), r2=script(unsupported), r3=script(DONE, final(1)))
    assert await case.cut() is NotContinued.REFUSED
    assert len(case.transport.calls) == 2


async def test_replicas_without_a_place_do_not_count_as_having_gone_on_there() -> None:
    full = script(EngineBusy("full"))
    case = await Case(
        r1=script(frame(b"a", 1), LOST), r2=full, r3=full, r4=full, r5=script(DONE, final(1))
    ).run()
    assert case.body == HEAD % b"a" + SAID % (1, b"greedy") + STREAM_END


async def test_what_a_replica_without_a_place_had_begun_itself_counts_for_nothing() -> None:
    """It gave a token before it took no more: nothing had gone on there."""
    full = EngineBusy("full")
    r1, r2 = script(frame(b"a", 1), full), script(frame(b"b", 2), LOST)
    case = Case(most=1, r1=r1, r2=r2, r3=script(DONE, final(1)))
    assert await case.cut() is NotContinued.LIMIT


async def test_an_engine_that_is_leaving_is_passed_over() -> None:
    leaving = Refusal(503, "draining", code="unavailable")
    case = await Case(
        r1=script(frame(b"a", 1), LOST), r2=script(leaving), r3=script(DONE, final(1))
    ).run()
    assert case.body == HEAD % b"a" + SAID % (1, b"greedy") + STREAM_END
    assert (case.relay.delivery.continuations, case.relay.delivery.continued) == (2, 1)


# ---- over engines ------------------------------------------------------------------------


def question(**options: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, **options}
    return json.dumps({"stream_options": {"include_usage": True}, **body}).encode()


async def answer(body: bytes, cuts: Sequence[int]) -> Case:
    """Return a stream that every replica but the last leaves after so many frames, if it has."""
    settings = SimSettings(zero_latency=True)
    engines = [
        SimEngine(settings, POOL, ReplicaId(f"r{n}"), time.monotonic) for n in range(len(cuts) + 1)
    ]

    def dying(engine: SimEngine, frames: int | None) -> Generate:
        async def generate(call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
            async with aclosing(engine.generate(call)) as items:
                async for item in items:
                    yield item
                    if (
                        frames is not None
                        and isinstance(item, Frame)
                        and item.sequence + 1 >= frames
                    ):
                        raise EngineDead("killed")

        return generate

    replicas = {f"r{n}": dying(engine, [*cuts, None][n]) for n, engine in enumerate(engines)}
    case = Case(most=len(cuts), **replicas)
    case.request = generate_call("q", body, endpoint=Endpoint.CHAT)
    for engine in engines:
        await engine.start()
    try:
        return await case.run()
    finally:
        for engine in engines:
            await engine.stop()


def events(body: bytes) -> list[Any]:
    data = [part for part in body.decode().split("\n\n") if part.startswith("data: {")]
    return [json.loads(part.removeprefix("data: ")) for part in data]


@examples(40)
@given(
    cuts=st.lists(st.integers(1, 5), max_size=4),
    stop=st.integers(0, 30),
    seed=st.integers(0, 3),
)
def test_an_answer_is_the_same_however_often_and_wherever_it_was_cut(
    cuts: list[int], stop: int, seed: int
) -> None:
    async def both() -> None:
        body = question(seed=seed, max_tokens=30)
        plain = await answer(body, [])
        if stop:
            text = "".join(
                c["delta"].get("content") or "" for e in events(plain.body) for c in e["choices"]
            )
            body = question(seed=seed, max_tokens=30, stop=text[stop + 60 :][:5])
            plain = await answer(body, [])
        cut = await answer(body, cuts)
        times = {event.pop("created") for event in events(cut.body)}
        assert len(times) == 1
        whole, pieces = events(plain.body), events(cut.body)
        for event in whole + pieces:
            del event["created"]
            if event.get("usage"):
                # Another replica has other prompts in its cache.
                del event["usage"]["prompt_tokens_details"]
        assert pieces == whole
        replicas = len(cut.transport.calls)
        assert replicas == len(cuts) + 1 or stop, "without a stop string there is enough to cut"
        assert cut.relay.delivery.continued == replicas - 1
        assert cut.body.count(b": continued elsewhere") == replicas - 1

    asyncio.run(both())
