"""Bytes that nobody would send in good faith: to the gateway, and on the token channel.

Each target also runs for minutes on end (``make proof``; HEADRACE_FUZZ_S says how long for each).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve_app.config import LimitSettings
from serve_app.core.exchange import Digest, PoolDigest, RouterId, TenantHeld, TenantWaiting
from serve_app.core.types import (
    PoolName,
    PriorityClass,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Usage,
)
from serve_app.engine.address import Address, ReplyTo
from serve_app.engine.api import (
    Endpoint,
    EngineTimings,
    Final,
    Frame,
    GenerateCall,
    GenerateItem,
    Refusal,
)
from serve_app.engine.channel import (
    Batch,
    Call,
    Cancel,
    End,
    Extend,
    Hello,
    Load,
    Message,
    Told,
    pack,
    unpack,
)
from serve_app.engine.channel_engine import EngineChannel
from serve_app.engine.channel_router import RouterChannel
from serve_app.errors import ApiError
from serve_app.gateway.auth import KeyRejected, authenticate
from serve_app.gateway.edge import EdgeHeaders
from serve_app.gateway.wire import ParsedRequest, parse_chat, parse_completions
from serve_app.keys import KeyTable
from tests.properties import examples

FUZZ_S = float(os.environ.get("HEADRACE_FUZZ_S", "150"))

pytestmark = pytest.mark.slow
LIMITS = LimitSettings()
CANARY = "zebra-4711-crossing"
R1, ROUTER = ReplicaId("r1"), RouterId("a")
NOWHERE = Address("no endpoint", b"no key")
HERE = Address("tcp://127.0.0.1:9", b"k" * 40)

BODIES = [
    orjson.dumps(body)
    for body in (
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": CANARY},
                {"role": "user", "content": [{"type": "text", "text": CANARY}]},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": CANARY},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
            "stream": True,
            "stream_options": {"include_usage": True},
            "metadata": {"a": "b"},
            "stop": ["x", "y"],
            "logit_bias": {"7": 1.5},
        },
        {"model": "m", "prompt": [[1, 2], [3]], "max_tokens": 5, "n": 2, "seed": 7},
        {"model": "m", "prompt": [CANARY, CANARY], "temperature": 0, "user": "u"},
    )
]

MESSAGES: list[Message] = [
    Batch([(1, 0, b"data: x\n\n", (7, 8))], [End(1, Final(Usage(1, 0, 1), EngineTimings(), 1))]),
    Batch([], [End(2, refusal=Refusal(400, "no", param="p")), End(3, error="dead", busy=True)]),
    Call(
        GenerateCall(
            request_id=RequestId("q"),
            endpoint=Endpoint.CHAT,
            body=b"{}",
            stream=True,
            tenant="t",
            cache_salt="s",
            priority_class=PriorityClass.STANDARD,
            target=R1,
            reply=ReplyTo(HERE, 4),
            resume_token_ids=(1, 2),
        )
    ),
    Cancel(HERE, [4, 5]),
    Cancel(NOWHERE, [4]),
    Hello(R1, NOWHERE),
    Hello(R1, HERE),
    Load(ReplicaView(R1, PoolName("p"), 3, 8, 1, 2, 0, 100, 5, (1, 2, 3), 9, ("a",), True)),
    Told(
        Digest(
            ROUTER,
            3,
            {
                PoolName("p"): PoolDigest(
                    waiting=((TenantWaiting(TenantId("t"), 1.0, 2.0),), (), ()),
                    large=(TenantHeld(TenantId("t"), 1, 2),),
                )
            },
        )
    ),
    Extend(RequestId("q"), 9),
]

# Where, what is taken away there, what comes instead.
EDITS = st.lists(
    st.tuples(
        st.integers(0, 2**16),
        st.integers(0, 8),
        st.binary(max_size=6)
        | st.sampled_from(
            [
                b"\x00",
                b"\xff",
                b'"',
                b"[",
                b"{",
                b"]",
                b"}",
                b",",
                b"null",
                b"1e999",
                b"-",
                b"\\u",
                b"\xc0",
                b"\xc1",
                b"\xdd\xff\xff\xff\xff",
                b"\xdf\xff\xff\xff\xff",
                b"\xd9\xff",
                b"\xcf" + b"\xff" * 8,
                b"\xcb\x7f\xf8" + bytes(6),
                b"\x91" * 40,
                b"[" * 200,
            ]
        ),
    ),
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for where, gone, instead in edits:
        at = where % (len(data) + 1)
        data = data[:at] + instead + data[at + gone :]
    return data


def gateway_body(body: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    """Any body is a request, or a 400 that repeats no text of it."""
    data = edited(body, edits)
    for parse in (parse_chat, parse_completions):
        made = outcome(parse, data)
        if isinstance(made, ApiError):
            assert made.status == 400
            assert CANARY.encode() not in made.body()
        else:
            assert orjson.loads(made.body_for_engine("m"))["model"] == "m"
            assert 0 < len(made.fields) <= 8 * len(data) + 100


def outcome(
    parse: Callable[[bytes, LimitSettings], ParsedRequest], body: bytes
) -> ParsedRequest | ApiError:
    try:
        return parse(body, LIMITS)
    except ApiError as error:
        return error


def gateway_headers(headers: list[tuple[bytes, bytes]]) -> None:
    """Any headers are nobody's, and reach nothing that Serve would obey."""
    with pytest.raises(KeyRejected):
        authenticate(headers, KeyTable([], 1), 0.0)
    inner: list[Any] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        inner.extend(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    outer: list[Any] = []

    async def send(message: Any) -> None:
        outer.extend(message["headers"])

    async def receive() -> Any:
        raise AssertionError("nothing is read here")

    asyncio.run(EdgeHeaders(application)({"type": "http", "headers": headers}, receive, send))
    names = [name.lower().replace(b"_", b"-") for name, _ in inner]
    assert names.count(b"x-request-id") == 1
    assert not {b"x-request-timeout-seconds", b"serve-multiplexed-model-id"} & set(names)
    assert all(b"\r" not in value and b"\n" not in value for _, value in outer)


def channel_decoder(message: Message, edits: list[tuple[int, int, bytes]]) -> None:
    """Any bytes are one of the messages, or a ValueError that names the channel."""
    said = ""
    try:
        assert isinstance(unpack(edited(pack(message), edits)), Message)
    except ValueError as error:
        said = str(error)
    assert not said or said.startswith("no message of the token channel")


def channel_ends(packed: list[bytes]) -> None:
    """Whatever comes, a call that comes after it is answered."""
    asyncio.run(_answered_after(packed))


async def _answered_after(packed: list[bytes]) -> None:
    async def generate(call: GenerateCall) -> AsyncGenerator[GenerateItem, None]:
        yield Frame(0, b"data: x\n\n", (7,))
        yield Final(Usage(1, 0, 1), EngineTimings(), 1)

    router = RouterChannel("127.0.0.1", range(23_000, 24_000), 1 << 20)
    engine = EngineChannel(R1, "127.0.0.1", range(23_000, 24_000), generate, 100)
    try:
        line = router.open_line(R1)
        for each in packed:
            router._inlet.take(each)
            engine._inlet.take(each)
        line.address = engine.address
        request = MESSAGES[2].call  # type: ignore[union-attr]
        inflow = router.call(replace(request, request_id=RequestId("after")), lambda: None)
        async with asyncio.timeout(120):
            assert isinstance(await inflow.take(), Frame)
            assert isinstance(await inflow.take(), Final)
    finally:
        await engine.close()
        router.close()


NAMES = st.sampled_from(
    [
        b"authorization",
        b"api-key",
        b"x-request-id",
        b"x-request-timeout-seconds",
        b"Serve_Multiplexed_Model_Id",
        b"x-headrace-request-id",
        b"X-REQUEST-ID",
    ]
)
HEADERS = st.lists(st.tuples(NAMES | st.binary(max_size=12), st.binary(max_size=60)), max_size=8)
PACKED = st.builds(
    lambda message, edits: edited(pack(message), edits),
    st.sampled_from(MESSAGES),
    st.just([]) | EDITS,
)
TARGETS: dict[str, tuple[Callable[..., None], dict[str, st.SearchStrategy[Any]], int]] = {
    "body": (gateway_body, {"body": st.sampled_from(BODIES), "edits": EDITS}, 200),
    "headers": (gateway_headers, {"headers": HEADERS}, 60),
    "decoder": (channel_decoder, {"message": st.sampled_from(MESSAGES), "edits": EDITS}, 400),
    "ends": (channel_ends, {"packed": st.lists(PACKED, max_size=6)}, 30),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """What is dropped is told of in the log; here that is thousands of lines."""
    logging.getLogger("headrace.channel").disabled = True
    yield
    logging.getLogger("headrace.channel").disabled = False


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_do_no_harm(name: str) -> None:
    target, strategies, count = TARGETS[name]
    examples(count)(given(**strategies)(target))()


@pytest.mark.proof
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", TARGETS)
def test_hostile_bytes_do_no_harm_for_minutes(name: str) -> None:
    """New bytes each time: a failure prints what reproduces it."""
    target, strategies, _ = TARGETS[name]
    until_s = time.monotonic() + FUZZ_S
    more = settings(
        max_examples=500,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    tried = 0
    while time.monotonic() < until_s:
        more(given(**strategies)(target))()
        tried += 500
    print(f"{name}: {tried} cases in {FUZZ_S:g} s")


def test_a_call_that_nobody_can_answer_holds_up_no_other() -> None:
    asked = MESSAGES[2].call  # type: ignore[union-attr]
    channel_ends([pack(Call(replace(asked, reply=ReplyTo(NOWHERE, 1))))])


def test_a_canary_in_a_good_body_is_one() -> None:
    """The search for it means something: bodies that pass carry it on to the engine."""
    assert CANARY.encode() in parse_chat(BODIES[0], LIMITS).fields
    assert CANARY.encode() in parse_completions(BODIES[2], LIMITS).fields
