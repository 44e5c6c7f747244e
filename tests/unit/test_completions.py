"""The completion endpoints over a real core and scripted engines: limits, tiers, pools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
import pytest

from serve_app.audit import Audit
from serve_app.books import Books
from serve_app.completions import Completions
from serve_app.config import LimitSettings, RouterConfig
from serve_app.core.controller import Controller
from serve_app.core.limits import Refused as LimitRefused
from serve_app.core.pricing import PriceBook
from serve_app.core.types import (
    KeyId,
    Outcome,
    PoolName,
    PriorityClass,
    ReplicaId,
    ReplicaView,
    TenantId,
    Ticket,
    Usage,
)
from serve_app.engine.api import (
    Endpoint,
    EngineDead,
    EngineTimings,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    GenerationFailed,
    WatchCall,
)
from serve_app.errors import JournalUnavailable
from serve_app.gate import Gate
from serve_app.keys import KeyRecord, KeyTable, digest_of
from serve_app.limiter import RouterLimits
from serve_app.observer import request_line
from serve_app.overload import LATE_PROBES, BodyMemory, Overload
from serve_app.rules import Rules
from serve_app.tickets import Tickets
from serve_app.token_counts import TokenCounter
from serve_app.usage import UsageRecord, Witness

SECRET = "a-test-key-of-this-file"
LIMITS = LimitSettings()
CONFIG: dict[str, Any] = {
    "pools": {
        "big": {
            "stale_after_s": 30,
            "brownout": {
                "kv_ratios": [0.5, 0.5, 0.5, 2],
                "queue_ratios": [2, 2, 2, 2],
                "fallback_pool": "small",
            },
        },
        "small": {"stale_after_s": 30},
    },
    "aliases": {"m": "big"},
    "tenants": {"t": {"limits": {"requests_per_min": 2, "tokens_per_min": 10_000}}},
}


class Engines:
    """A pool's transport: every answer is one word; ``held`` keeps answers back."""

    def __init__(self) -> None:
        self.calls: list[GenerateCall] = []
        self.called = asyncio.Event()
        self.held: asyncio.Event | None = None
        self.dies = self.dies_once = False
        self.error = EngineDead("gone")

    async def generate(
        self, call: GenerateCall, on_overflow: Callable[[], None]
    ) -> AsyncGenerator[GenerateItem, None]:
        self.calls.append(call)
        self.called.set()
        if self.held is not None:
            await self.held.wait()
        if self.dies or self.dies_once:
            self.dies_once = False
            yield Frame(0, b'data: {"id":"x"}\n\n', (7,))
            raise self.error
        data = b'data: {"id":"x"}\n\ndata: [DONE]\n\n' if call.stream else b'{"id":"x"}'
        yield Frame(0, data, (7,))
        usage = Usage(40, 0, 1, engine_s=0.5)
        yield Final(usage, EngineTimings(), frames=1, finish_reason="stop")

    def watch(self, call: WatchCall) -> AsyncGenerator[ReplicaView, None]:
        raise AssertionError("nothing is watched here")


class Writer:
    """Keeps the router's records; ``refuses`` and ``held`` stand for a disk in trouble."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.refuses = self.fails = False
        self.held: asyncio.Event | None = None
        self.asked = asyncio.Event()

    def check(self) -> None:
        if self.refuses:
            raise JournalUnavailable("no room")

    async def append(self, record: UsageRecord) -> None:
        self.asked.set()
        if self.held is not None:
            await self.held.wait()
        if self.fails:
            raise JournalUnavailable("no disk")
        self.records.append(record)

    def note(self, record: UsageRecord) -> None:
        self.records.append(record)


class Site:
    """One router's completions with a replica in each pool; ``spot`` bounds the big one."""

    def __init__(
        self,
        ceiling: PriorityClass = PriorityClass.STANDARD,
        spot: dict[str, float] | None = None,
    ) -> None:
        self.now_s = 50.0
        self.audits: list[Audit] = []
        self.over: list[LimitRefused] = []
        self.engines = {PoolName("big"): Engines(), PoolName("small"): Engines()}
        self.gate = Gate(Controller(), self.clock, lambda notice: None)
        big = CONFIG["pools"]["big"] | {"spot": spot}
        pools = CONFIG["pools"] | {"big": big}
        config = RouterConfig.model_validate(CONFIG | {"pools": pools})
        self.gate.configure({PoolName(n): p.to_core() for n, p in config.pools.items()})
        self.load("big", 0.0)
        self.load("small", 0.0)
        self.rates = RouterLimits(self.clock, self.over.append)
        self.writer = Writer()
        self.books = Books(self.writer, self.clock)
        self.descriptors = (10, 100)
        self.overload = Overload(LIMITS.loop_lag_s, lambda: self.descriptors)
        self.completions = Completions(
            gate=self.gate,
            transport=self.engines.__getitem__,
            tickets=Tickets(self.gate, TokenCounter(), LIMITS, lambda exact: None),
            rates=self.rates,
            limits=LIMITS,
            books=self.books,
            overload=self.overload,
            on_audit=self.audits.append,
            clock=self.clock,
        )
        self.completions.configure(Rules.of(config, dict.fromkeys(self.engines, False)))
        key = KeyRecord(
            key_id=KeyId("k"),
            name="",
            digest=digest_of(SECRET),
            tenant=TenantId("t"),
            created_at_s=0.0,
            priority_ceiling=ceiling,
        )
        self.completions.keys = KeyTable([key], 1)
        self._sequence = 0

    def clock(self) -> float:
        return self.now_s

    def load(self, pool: str, kv_usage_ratio: float, replica: str | None = None) -> None:
        """Have a pool's replica report its load."""
        self.now_s += 1.0
        view = ReplicaView(
            replica=ReplicaId(replica or f"{pool}-1"),
            pool=PoolName(pool),
            sequence=int(self.now_s),
            slots=64,
            running=0,
            waiting=0,
            kv_usage_ratio=kv_usage_ratio,
            kv_tokens_capacity=100_000,
        )
        self.gate.observe(view)

    async def ask(
        self,
        body: dict[str, Any] | bytes,
        secret: str = SECRET,
        session: bytes | None = None,
        tag: bytes | None = None,
        answer: Answer | None = None,
    ) -> Answer:
        """Post to chat completions."""
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        answer = answer or Answer()

        async def receive() -> Any:
            return {"type": "http.request", "body": data, "more_body": False}

        scope = {
            "type": "http",
            "headers": [
                (b"authorization", b"Bearer " + secret.encode()),
                (b"content-type", b"application/json"),
                (b"x-request-id", b"label-1"),
                *([] if tag is None else [(b"x-headrace-tag", tag)]),
                *([] if session is None else [(b"x-headrace-session", session)]),
            ],
        }
        await self.completions.serve(Endpoint.CHAT, scope, receive, answer.send)
        return answer


class Answer:
    """A response, collected."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            pairs = [(n.decode(), v.decode()) for n, v in message["headers"]]
            self.headers = dict(pairs)
            assert len(self.headers) == len(pairs), "a header stands twice"
        else:
            self.body += message.get("body", b"")

    @property
    def code(self) -> str:
        return str(orjson.loads(self.body)["error"]["code"])


def question(**fields: object) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "m", "messages": messages, "max_tokens": 5, **fields}


async def test_an_answer_tells_limits_class_and_tier() -> None:
    site = Site()
    answer = await site.ask(question(service_tier="priority"))
    assert answer.status == 200
    assert orjson.loads(answer.body) == {"id": "x", "service_tier": "default"}
    assert answer.headers["x-headrace-class"] == "standard"
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert site.audits[0].asked_class is PriorityClass.CRITICAL
    assert site.audits[0].served_class is PriorityClass.STANDARD


@pytest.mark.parametrize(
    ("ceiling", "tier"),
    [
        (PriorityClass.CRITICAL, b"priority"),
        (PriorityClass.STANDARD, b"default"),
        (PriorityClass.SHEDDABLE, b"flex"),
    ],
)
async def test_a_streams_first_event_tells_the_tier(ceiling: PriorityClass, tier: bytes) -> None:
    answer = await Site(ceiling).ask(question(stream=True, service_tier="priority"))
    first = b'data: {"id":"x","service_tier":"%s"}\n\n' % tier
    assert answer.body == first + b"data: [DONE]\n\n"


async def test_over_a_limit_is_a_429_and_no_engine_is_asked() -> None:
    site = Site()
    for _ in range(2):
        assert (await site.ask(question())).status == 200
    refused = await site.ask(question())
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert len(site.engines[PoolName("big")].calls) == 2
    assert len(site.over) == 1
    assert site.audits[-1].outcome is None
    assert site.audits[-1].reason == "rate_limit_exceeded"
    assert site.gate.open_requests() == 0


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (question(model="nowhere"), 404), (question(max_tokens=0), 400)],
)
async def test_an_error_tells_the_limits_too_and_costs_nothing(
    body: dict[str, Any] | bytes, status: int
) -> None:
    site = Site()
    answer = await site.ask(body)
    assert answer.status == status
    assert answer.headers["x-ratelimit-remaining-requests"] == "2"
    unknown = await site.ask(question(), secret="not-a-key-of-ours")
    assert unknown.status == 401
    assert "x-ratelimit-limit-requests" not in unknown.headers


async def test_tokens_are_settled_to_the_engines_count_or_given_back() -> None:
    site = Site()
    await site.ask(question())
    answer = await site.ask(b"{")
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(10_000 - 41)

    site = Site()
    engines = site.engines[PoolName("big")]
    held = engines.held = asyncio.Event()
    task = asyncio.create_task(site.ask(question()))
    await engines.called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.set()
    answer = await site.ask(b"{")
    assert answer.headers["x-ratelimit-remaining-tokens"] == "10000"
    assert site.audits[0].outcome is Outcome.CANCELLED
    assert site.gate.open_requests() == 0


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"max_tokens": 5000}, "max_tokens=64"),
        ({"max_tokens": None}, "max_tokens=64"),
        ({"max_tokens": 64}, None),
        ({"max_tokens": 5, "n": 2}, None),
    ],
)
async def test_a_spot_pools_answers_are_no_longer_than_it_promises(
    asked: dict[str, Any], told: str | None
) -> None:
    site = Site(spot={"max_output_tokens": 64, "max_stream_s": 100})
    answer = await site.ask(question(**asked))
    assert answer.status == 200
    assert answer.headers.get("x-headrace-spot") == told
    [call] = site.engines[PoolName("big")].calls
    assert call.max_tokens == 64


async def test_a_spot_pools_answer_that_takes_too_long_is_ended_and_billed() -> None:
    site = Site(spot={"max_output_tokens": 64, "max_stream_s": 0.01})
    engines = site.engines[PoolName("big")]
    engines.held = asyncio.Event()
    answer = await site.ask(question())
    assert (answer.status, answer.code) == (504, "deadline_exceeded")
    assert b"spot nodes" in answer.body
    [record] = site.writer.records
    assert (record.outcome, record.reason, record.billable) == ("failed", "deadline", True)
    assert site.gate.open_requests() == 0


async def test_answers_that_take_too_long_are_no_failures_of_their_replica(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = Site(spot={"max_output_tokens": 64, "max_stream_s": 0.01})
    site.engines[PoolName("big")].held = asyncio.Event()
    ended: list[Outcome] = []
    finish = site.gate._core.finish

    def seen(request_id: Any, usage: Any, outcome: Outcome, now_s: float) -> Any:
        ended.append(outcome)
        return finish(request_id, usage, outcome, now_s)

    cancel = site.gate._core.cancel

    def left(request_id: Any, now_s: float) -> Any:
        ended.append(Outcome.CANCELLED)
        return cancel(request_id, now_s)

    monkeypatch.setattr(site.gate._core, "finish", seen)
    monkeypatch.setattr(site.gate._core, "cancel", left)
    assert (await site.ask(question())).status == 504
    assert ended == [Outcome.CANCELLED]


async def test_where_a_spot_pool_falls_back_the_answer_stays_as_short_as_was_reserved() -> None:
    site = Site(spot={"max_output_tokens": 64, "max_stream_s": 100})
    site.load("big", 0.9)
    answer = await site.ask(question(max_tokens=500))
    assert answer.headers["x-headrace-pool"] == "small"
    assert answer.headers["x-headrace-spot"] == "max_tokens=64"
    [call] = site.engines[PoolName("small")].calls
    assert call.max_tokens == 64


async def test_a_fallback_pool_is_called_in_place_of_the_one_asked_for() -> None:
    site = Site()
    site.load("big", 0.9)
    answer = await site.ask(question())
    assert answer.status == 200
    assert answer.headers["x-headrace-pool"] == "small"
    assert answer.headers["x-headrace-degraded"] == "fallback_model"
    assert not site.engines[PoolName("big")].calls
    [call] = site.engines[PoolName("small")].calls
    assert call.target == "small-1"
    assert (site.audits[0].pool, site.audits[0].degraded) == ("small", "fallback_model")


@pytest.mark.parametrize(
    ("header", "session"), [(b"s-1", "t\0s-1"), (b"", None), (b"x" * 300, None), (None, None)]
)
async def test_a_session_header_of_sensible_length_reaches_routing(
    header: bytes | None, session: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site()
    placed: list[Ticket] = []
    place = site.gate.place

    def spy(ticket: Ticket, while_waiting: Any) -> Any:
        placed.append(ticket)
        return place(ticket, while_waiting)

    monkeypatch.setattr(site.gate, "place", spy)
    assert (await site.ask(question(), session=header)).status == 200
    assert [ticket.session for ticket in placed] == [session]


# The books.


async def test_a_completed_response_is_written_down_once_with_the_engines_count() -> None:
    site = Site()
    site.books.prices = PriceBook(7)
    answer = await site.ask(question(user="ann"))
    [record] = site.writer.records
    charge = record.charge
    assert (record.witness, record.attempt, record.outcome) == (Witness.ROUTER, 1, "completed")
    assert (record.prompt_tokens, record.output_tokens, record.exact) == (40, 1, True)
    assert (charge.tenant, charge.key, charge.user, charge.model) == ("t", "k", "ann", "m")
    assert (charge.pool, charge.price_version, charge.endpoint) == ("big", 7, "chat")
    assert charge.request_id == answer.headers["x-headrace-request-id"]
    assert charge.client_label == "label-1"
    assert (record.replica, record.finish_reason) == ("big-1", "stop")
    # The engine is told who pays and which attempt it is, for a record of its own.
    [call] = site.engines[PoolName("big")].calls
    assert (call.charge, call.attempt) == (charge, 1)


async def test_a_request_keeps_the_prices_it_came_with_however_long_it_waits() -> None:
    site = Site()
    site.books.prices = PriceBook(7)
    await site.ask(question())
    [audit] = site.audits
    site.books.prices = PriceBook(8)
    assert site.books.charge(audit, PoolName("small")).price_version == 7


@pytest.mark.parametrize("stream", [True, False])
async def test_the_end_of_a_response_waits_until_it_is_written_down(stream: bool) -> None:
    site, answer = Site(), Answer()
    site.writer.held = asyncio.Event()
    task = asyncio.create_task(site.ask(question(stream=stream), answer=answer))
    await site.writer.asked.wait()
    assert b"[DONE]" not in answer.body
    assert (answer.body != b"") == stream, "only the end waits"
    site.writer.held.set()
    await task
    assert answer.body.endswith(b"[DONE]\n\n" if stream else b"}")
    assert len(site.writer.records) == 1


async def test_a_client_that_leaves_while_the_record_is_written_is_billed_once() -> None:
    site = Site()
    site.writer.held = asyncio.Event()
    task = asyncio.create_task(site.ask(question()))
    await site.writer.asked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    # The record was handed over before: it is the journal's to write.
    assert site.writer.records == []
    assert site.audits[0].outcome is Outcome.COMPLETED


async def test_a_client_that_leaves_is_written_down_with_what_it_got() -> None:
    site = Site()
    engines = site.engines[PoolName("big")]
    engines.held = asyncio.Event()
    task = asyncio.create_task(site.ask(question()))
    await engines.called.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    [record] = site.writer.records
    assert (record.outcome, record.billable, record.exact) == ("cancelled", True, False)
    assert (record.prompt_tokens, record.output_tokens) == (0, 0)


async def test_a_response_that_our_engine_cut_off_is_written_down_and_not_billed() -> None:
    site = Site()
    site.engines[PoolName("big")].dies = True
    await site.ask(question(stream=True))
    [record] = site.writer.records
    assert (record.outcome, record.reason) == ("failed", "engine_error")
    assert (record.billable, record.output_tokens) == (False, 1)


async def test_a_continued_response_is_one_response_in_books_audit_and_limits() -> None:
    site = Site()
    engines = site.engines[PoolName("big")]
    site.load("big", 0.0, replica="big-2")
    engines.dies_once = True
    answer = await site.ask(question(stream=True, seed=3))
    said = b": continued elsewhere after 1 tokens; sampling: seeded\n\n"
    assert said in answer.body
    assert answer.body.endswith(b"[DONE]\n\n")
    first, second = engines.calls
    assert (first.attempt, second.attempt) == (1, 2)
    assert first.target != second.target
    assert second.resume_token_ids == (7,)
    [record] = site.writer.records
    assert (record.attempt, record.outcome, record.billable) == (2, "completed", True)
    assert (record.prompt_tokens, record.output_tokens) == (40, 2)
    assert record.replica == second.target
    # What the lost replica measured went with it: a part is not taken for the whole.
    assert record.engine_ns == 0
    [audit] = site.audits
    line = request_line(audit, 0.0)
    assert (line.attempts, line.continuations, line.not_continued) == (2, 1, None)
    assert (line.output_tokens, line.replica) == (2, second.target)
    assert site.gate.open_requests() == 0


async def test_a_generation_that_fails_by_itself_is_tried_on_no_other_engine() -> None:
    site = Site()
    engines = site.engines[PoolName("big")]
    site.load("big", 0.0, replica="big-2")
    engines.dies_once, engines.error = True, GenerationFailed("its tool call cannot be parsed")
    answer = await site.ask(question(stream=True, seed=3))
    assert b"engine_error" in answer.body
    assert len(engines.calls) == 1
    [audit] = site.audits
    assert request_line(audit, 0.0).not_continued == "failed"


async def test_a_tag_is_in_the_books_and_one_that_is_no_name_is_refused() -> None:
    site = Site()
    await site.ask(question(), tag=b"batch:7")
    await site.ask(question())
    assert [record.charge.tag for record in site.writer.records] == ["batch:7", ""]
    site = Site()
    for wrong in (b"", b"two words", b"x" * 65, b"\xff", b".dot"):
        answer = await site.ask(question(), tag=wrong)
        assert (answer.status, orjson.loads(answer.body)["error"]["param"]) == (
            400,
            "x-headrace-tag",
        )
    assert site.writer.records == []


async def test_what_no_engine_saw_is_not_in_the_books() -> None:
    site = Site()
    await site.ask(b"{")
    await site.ask(question(model="nowhere"))
    await site.ask(question(), secret="not-a-key-of-ours")
    assert site.writer.records == []


async def test_nothing_begins_while_its_end_could_not_be_written_down() -> None:
    site = Site()
    site.writer.refuses = True
    answer = await site.ask(question())
    assert (answer.status, answer.code) == (503, "usage_unavailable")
    assert "retry-after" in answer.headers
    assert not site.engines[PoolName("big")].calls


@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_that_cannot_be_written_down_does_not_end_as_complete(
    stream: bool,
) -> None:
    site = Site()
    site.writer.fails = True
    answer = await site.ask(question(stream=stream))
    assert b"[DONE]" not in answer.body
    assert b"usage_unavailable" in answer.body
    assert answer.status == (200 if stream else 503)
    # It is noted as failed, should the disk come back.
    [record] = site.writer.records
    assert (record.outcome, record.billable) == ("failed", False)


async def test_a_bug_of_ours_is_a_500_in_the_clients_shape_and_still_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = Site()
    monkeypatch.setattr(site.gate, "place", lambda ticket, while_waiting: 1 / 0)
    answer = Answer()

    async def receive() -> Any:
        return {"type": "http.request", "body": orjson.dumps(question()), "more_body": False}

    headers = [
        (b"authorization", b"Bearer " + SECRET.encode()),
        (b"content-type", b"application/json"),
    ]
    scope = {"type": "http", "headers": headers}
    with pytest.raises(ZeroDivisionError):
        await site.completions.serve(Endpoint.CHAT, scope, receive, answer.send)
    assert (answer.status, answer.code) == (500, "internal_error")
    assert site.audits[-1].status == 500


async def test_an_overloaded_router_refuses_unread_what_is_not_critical() -> None:
    standard, critical = Site(), Site(PriorityClass.CRITICAL)
    for site in (standard, critical):
        for _ in range(LATE_PROBES):
            site.overload.note_lag(LIMITS.loop_lag_s)
    refused = await standard.ask(b"not even JSON")
    assert (refused.status, refused.code) == (503, "overloaded_loop")
    assert refused.headers["retry-after"] == "1"
    assert standard.audits[0].reason == "overloaded_loop"
    assert (await critical.ask(question())).status == 200
    unknown = await standard.ask(question(), secret="not-a-key-of-ours")
    assert unknown.status == 401


async def test_a_body_is_held_until_its_request_ends_however_it_ends() -> None:
    site = Site()
    engines = site.engines[PoolName("big")]
    engines.held = asyncio.Event()
    running = asyncio.create_task(site.ask(question()))
    await engines.called.wait()
    assert site.completions.bodies.held_bytes == len(orjson.dumps(question()))
    engines.held.set()
    assert (await running).status == 200
    await site.ask(b"{")
    engines.held = asyncio.Event()
    engines.called.clear()
    leaves = asyncio.create_task(site.ask(question()))
    await engines.called.wait()
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    assert site.completions.bodies.held_bytes == 0


async def test_bodies_beyond_what_a_router_may_hold_are_refused() -> None:
    site = Site()
    site.completions.bodies = BodyMemory(1000)
    engines = site.engines[PoolName("big")]
    engines.held = asyncio.Event()
    large = question(messages=[{"role": "user", "content": "a" * 350}])
    running = asyncio.create_task(site.ask(large))
    await engines.called.wait()
    refused = await site.ask(large)
    assert (refused.status, refused.code) == (429, "overloaded_memory")
    engines.held.set()
    assert (await running).status == 200
