"""From a parsed request to a ticket: lengths, classes, pools, sessions, prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from serve_app.config import LimitSettings, RouterConfig
from serve_app.core.types import (
    Dispatch,
    KeyId,
    PoolName,
    PriorityClass,
    ReplicaId,
    RequestId,
    TenantId,
    UserId,
)
from serve_app.engine.api import Endpoint
from serve_app.errors import ContextLengthExceeded, InvalidRequest
from serve_app.gateway.wire import ParsedRequest, parse_chat, parse_completions
from serve_app.keys import KeyRecord
from serve_app.rules import Rules
from serve_app.tickets import TEMPLATE_TOKENS, Prepared, Tickets

LIMITS = LimitSettings()
CHAT = PoolName("chat")
CONFIG: dict[str, Any] = {
    "pools": {
        "chat": {"heavy": {"pool": "long", "threshold_tokens": 4000}},
        "long": {"prompt": {"context_tokens": 100_000}},
        "sticky": {"routing": "prefix_affinity"},
        "counted": {"prompt": {"tokenizer": "/model", "exact_above_tokens": 3000}},
    },
    "aliases": {
        "chat": "chat",
        "sticky": "sticky",
        "counted": "counted",
        "law": {"pool": "sticky", "adapter": "law"},
        "brief": {"pool": "chat", "max_prompt_tokens": 200, "max_output_tokens": 50},
        "brief-counted": {"pool": "counted", "max_prompt_tokens": 200},
    },
    "tenants": {"acme": {"weight": 3, "class_ceiling": "standard"}},
}


class Learned:
    """What the core knows: every answer has 100 tokens, an engine holds 10,000."""

    def __init__(self, kv_tokens: int = 10_000) -> None:
        self.kv_tokens = kv_tokens

    def expected_output(self, pool: PoolName, tenant: TenantId, max_tokens: int) -> int:
        return min(100, max_tokens)

    def largest_kv_tokens(self, pool: PoolName) -> int:
        return self.kv_tokens if pool != "long" else 200_000


class Counts:
    """A counter that has ``tokens`` for the pools with a tokenizer, and remembers being asked."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        self.asked: list[PoolName] = []

    async def count(self, pool: PoolName, prefix: bytes) -> int | None:
        self.asked.append(pool)
        return self.tokens if pool == "counted" else None


class Desk:
    """A Tickets over the configuration above."""

    def __init__(self, exact: int | None = None, kv_tokens: int = 10_000) -> None:
        self.counts = Counts(exact)
        self.wanted: list[bool] = []
        self.tickets = Tickets(
            Learned(kv_tokens),
            self.counts,  # type: ignore[arg-type]
            LIMITS,
            self.wanted.append,
        )
        config = RouterConfig.model_validate(CONFIG)
        prefixes = {PoolName(n): p.routing == "prefix_affinity" for n, p in config.pools.items()}
        self.tickets.rules = Rules.of(config, prefixes)

    async def prepare(
        self,
        parsed: ParsedRequest,
        *,
        key: KeyRecord | None = None,
        session: str | None = None,
        room_tokens: int | None = None,
    ) -> Prepared:
        key = key or a_key()
        terms = self.tickets.rules.terms(key, parsed.model, parsed.user)
        return await self.tickets.prepare(
            RequestId("q"), key, parsed, terms=terms, session=session, room_tokens=room_tokens
        )


def a_key(tenant: str = "free", user: str | None = None) -> KeyRecord:
    return KeyRecord(
        key_id=KeyId("k"),
        name="",
        digest=b"",
        tenant=TenantId(tenant),
        created_at_s=0.0,
        user=None if user is None else UserId(user),
        priority_ceiling=PriorityClass.CRITICAL,
    )


def completion(prompt: object = "hello", **fields: object) -> ParsedRequest:
    body: Mapping[str, object] = {"model": "chat", "prompt": prompt, "max_tokens": 10, **fields}
    return parse_completions(orjson.dumps(body), LIMITS)


def chat(text: str, **fields: object) -> ParsedRequest:
    messages = [{"role": "user", "content": text}]
    return parse_chat(orjson.dumps({"model": "chat", "messages": messages, **fields}), LIMITS)


async def test_the_upper_bound_admits_until_counts_teach_the_ratio() -> None:
    desk = Desk()
    parsed = completion("x" * 800)
    before = await desk.prepare(parsed)
    assert before.ticket.prompt_tokens == 800 + TEMPLATE_TOKENS
    assert before.prompt.expected_tokens == 200 + TEMPLATE_TOKENS
    for _ in range(60):
        desk.tickets.learn(before, CHAT, 200 + TEMPLATE_TOKENS)
    after = await desk.prepare(parsed)
    assert 200 <= after.ticket.prompt_tokens - TEMPLATE_TOKENS <= 230
    assert desk.tickets.error_ratio(CHAT) < 0.05


async def test_what_is_no_text_teaches_nothing() -> None:
    desk = Desk()
    parsed = completion("x" * 80_000, model="counted")
    prepared = await Desk(kv_tokens=0).prepare(parsed)
    desk.tickets.learn(prepared, PoolName("counted"), 100)
    assert desk.tickets.error_ratio(PoolName("counted")) == 0.0


async def test_token_ids_are_counted_not_estimated() -> None:
    desk = Desk()
    prepared = await desk.prepare(completion([1, 2, 3], n=2))
    assert prepared.ticket.prompt_tokens == 3
    assert prepared.ticket.max_tokens == 20
    assert prepared.expected_tokens == prepared.upper_tokens == 23
    desk.tickets.learn(prepared, CHAT, 5000)
    assert desk.tickets.error_ratio(CHAT) == 0.0


async def test_tenant_policies_stand_in_the_ticket() -> None:
    parsed = chat("hello", service_tier="priority")
    acme = await Desk().prepare(parsed, key=a_key("acme"))
    free = await Desk().prepare(parsed)
    assert (acme.ticket.weight, acme.ticket.priority_class) == (3.0, PriorityClass.STANDARD)
    assert (free.ticket.weight, free.ticket.priority_class) == (1.0, PriorityClass.CRITICAL)


async def test_a_session_is_the_clients_hint_or_else_the_user_and_its_tenants_own() -> None:
    desk = Desk()

    async def session(header: str | None = None, user: str | None = None, **fields: object) -> Any:
        prepared = await desk.prepare(chat("hi", **fields), key=a_key(user=user), session=header)
        return prepared.ticket.session

    assert await session(prompt_cache_key="p", user="u") == "free\0p"
    assert await session(header="h", user="u") == "free\0h"
    assert await session(user="u") == "free\0u"
    assert await session() is None
    other = await desk.prepare(chat("hi", prompt_cache_key="p"), key=a_key("acme"))
    assert other.ticket.session == "acme\0p"


async def test_prefixes_are_hashed_where_routing_reads_them_apart_by_tenant_and_adapter() -> None:
    desk = Desk()
    text = "a shared beginning of some length " * 10
    plain = await desk.prepare(chat(text))
    sticky = await desk.prepare(chat(text, model="sticky"))
    again = await desk.prepare(chat(text + "more", model="sticky"))
    stranger = await desk.prepare(chat(text, model="sticky"), key=a_key("acme"))
    adapted = await desk.prepare(chat(text, model="law"))

    assert plain.ticket.prefix_hashes == ()
    hashes = sticky.ticket.prefix_hashes
    assert len(hashes) >= 5
    assert again.ticket.prefix_hashes[: len(hashes)] == hashes
    assert not set(hashes) & set(stranger.ticket.prefix_hashes)
    assert not set(hashes) & set(adapted.ticket.prefix_hashes)
    assert adapted.ticket.adapter == "law"


@pytest.mark.parametrize(
    ("parsed", "pool"),
    [
        (completion("x" * 800), "chat"),
        (completion("x" * 20_000), "long"),
        (completion("x" * 800, max_tokens=3900), "long"),
        (completion("x" * 800, max_tokens=1000, n=4), "long"),
        (chat("hello"), "chat"),
    ],
)
async def test_long_contexts_go_to_the_heavy_pool(parsed: ParsedRequest, pool: str) -> None:
    assert (await Desk().prepare(parsed)).ticket.pool == pool


async def test_a_prompt_that_only_may_be_too_long_is_left_to_the_engine() -> None:
    desk = Desk()
    doubtful = await desk.prepare(completion("x" * 30_000, model="sticky"))
    assert doubtful.ticket.prompt_tokens == 9_999
    with pytest.raises(ContextLengthExceeded, match="an engine holds 9999"):
        await desk.prepare(completion("x" * 100_000, model="sticky"))
    unknown = await Desk(kv_tokens=0).prepare(completion("x" * 100_000, model="sticky"))
    assert unknown.ticket.prompt_tokens > 100_000
    several = await desk.prepare(completion(["x" * 60_000, "y" * 60_000], model="sticky"))
    assert several.ticket.prompt_tokens == 9_999


async def test_a_prompt_is_counted_only_where_that_decides() -> None:
    desk = Desk(exact=150)
    await desk.prepare(completion("x" * 400, model="counted"))
    assert desk.counts.asked == []
    near_policy = await desk.prepare(completion("x" * 600, model="brief-counted"))
    assert near_policy.ticket.prompt_tokens == 150 + TEMPLATE_TOKENS
    near_room = await desk.prepare(completion("x" * 600, model="counted"), room_tokens=400)
    assert near_room.upper_tokens == 150 + TEMPLATE_TOKENS + 10
    assert near_room.expected_tokens == 150 + 10
    await desk.prepare(completion("x" * 600, model="counted"), room_tokens=4000)
    assert len(desk.counts.asked) == 2
    await desk.prepare(completion("x" * 12_000, model="counted"))
    assert len(desk.counts.asked) == 3
    assert desk.wanted == [True, True, True]


async def test_a_count_refuses_only_what_is_too_long_without_any_template() -> None:
    for counted, fits in ((9_000, True), (9_990, True), (10_000, False)):
        desk = Desk(exact=counted)
        parsed = completion("x" * 30_000, model="counted")
        if fits:
            found = (await desk.prepare(parsed)).ticket.prompt_tokens
            assert found == min(9_999, counted + TEMPLATE_TOKENS)
        else:
            with pytest.raises(ContextLengthExceeded, match="about 10000 tokens"):
                await desk.prepare(parsed)


async def test_without_a_tokenizer_the_estimate_decides() -> None:
    desk = Desk(exact=None)
    prepared = await desk.prepare(completion("x" * 600, model="brief-counted"))
    assert prepared.prompt.expected_tokens == 150 + TEMPLATE_TOKENS
    assert desk.wanted == [False]
    with pytest.raises(ContextLengthExceeded, match="at most 200 are allowed"):
        await desk.prepare(completion("x" * 6000, model="brief-counted"))


async def test_an_output_policy_refuses_more_and_caps_what_was_left_open() -> None:
    desk = Desk()
    with pytest.raises(InvalidRequest) as caught:
        await desk.prepare(completion(model="brief", max_tokens=51))
    assert (caught.value.param, caught.value.code) == ("max_tokens", "number_above_max_value")
    asked = await desk.prepare(completion(model="brief", max_tokens=50))
    silent = await desk.prepare(completion(model="brief", max_tokens=None, n=2))
    assert silent.ticket.max_tokens == 100

    def cap(prepared: Prepared, most: int | None) -> int | None:
        placed = Dispatch(RequestId("q"), CHAT, (ReplicaId("a"), ReplicaId("b")), 0.0, most)
        call = prepared.call(Endpoint.COMPLETIONS, placed)
        assert (call.target, call.fallbacks) == ("a", ("b",))
        return call.max_tokens

    assert cap(asked, None) is None
    assert cap(silent, None) == 50
    # The core caps all answers of a request together.
    assert cap(silent, 60) == 30
    assert cap(silent, 1000) == 50


async def test_a_chat_without_a_limit_is_capped_by_what_is_reserved_for_it() -> None:
    prepared = await Desk().prepare(chat("hello"))
    assert prepared.output_cap == prepared.ticket.max_tokens == LIMITS.max_output_tokens


async def test_an_answer_repeats_the_clients_name_of_the_model() -> None:
    prepared = await Desk().prepare(completion("x" * 20_000))
    placed = Dispatch(RequestId("q"), PoolName("long"), (ReplicaId("a"),), 0.0)
    call = prepared.call(Endpoint.COMPLETIONS, placed)
    assert orjson.loads(call.body)["model"] == "chat"
    assert call.cache_salt == prepared.salt
