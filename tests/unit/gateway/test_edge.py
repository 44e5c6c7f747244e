"""The outermost layer: what of a client's headers gets past it, and the names of requests."""

from __future__ import annotations

import asyncio
import pickle
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from serve_app.gateway.edge import (
    MAX_LABEL_BYTES,
    EdgeHeaders,
    middlewares,
    request_names,
    server_send,
)

Headers = list[tuple[bytes, bytes]]


class Inside:
    """The application behind the edge: keeps the scope it saw and answers with ``answer``."""

    def __init__(self, answer: Headers | None = None) -> None:
        self.answer = answer or []
        self.scope: dict[str, Any] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = dict(scope)
        await send({"type": "http.response.start", "status": 200, "headers": self.answer})
        await send({"type": "http.response.body", "body": b"x"})

    @property
    def names(self) -> list[bytes]:
        return [name for name, _ in self.scope["headers"]]


async def passed(inside: Inside, *headers: tuple[bytes, bytes]) -> Headers:
    """Send a request through the edge; return the response's headers."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the edge reads no body")

    scope = {"type": "http", "headers": list(headers), "path": "/"}
    await EdgeHeaders(inside)(scope, receive, send)
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    found: Headers = sent[0]["headers"]
    return found


def values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-disconnect-disabled",
        b"x-request-timeout-seconds",
        b"x-session-id",
        b"X-Session-ID",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
        b"Serve-Multiplexed_Model-Id",
    ],
)
async def test_headers_that_steer_serve_end_at_the_edge(name: bytes) -> None:
    inside = Inside()
    await passed(inside, (name, b"1"), (b"authorization", b"Bearer k"))
    assert inside.names == [b"authorization", b"x-request-id"]


async def test_other_headers_pass_in_order() -> None:
    inside = Inside()
    others = [(b"accept", b"a"), (b"content-type", b"b"), (b"x-session", b"c"), (b"accept", b"d")]
    await passed(inside, *others)
    assert inside.scope["headers"][:4] == others


async def test_a_short_label_is_echoed_and_goes_no_further() -> None:
    inside = Inside()
    answer = await passed(inside, (b"x-request-id", b"mine"))
    own = inside.scope["headers"][-1][1]
    assert own.startswith(b"req_")
    assert values(answer, b"x-request-id") == [b"mine"]
    assert values(answer, b"x-headrace-request-id") == [own]
    assert request_names(inside.scope) == (own.decode(), "mine")


@pytest.mark.parametrize("label", [b"x" * (MAX_LABEL_BYTES + 1), b"", b"a b", b"\xff", b"a\x00"])
async def test_a_label_that_cannot_be_echoed_is_replaced_by_our_id(label: bytes) -> None:
    inside = Inside()
    answer = await passed(inside, (b"x-request-id", label))
    own = inside.scope["headers"][-1][1]
    assert values(answer, b"x-request-id") == values(answer, b"x-headrace-request-id") == [own]
    assert request_names(inside.scope) == (own.decode(), None)


async def test_names_that_the_application_set_are_not_doubled() -> None:
    theirs = [(b"X-Request-Id", b"serve"), (b"x-headrace-request-id", b"app"), (b"a", b"b")]
    answer = await passed(Inside(theirs))
    lowered = [(name.lower(), value) for name, value in answer]
    assert len(values(lowered, b"x-request-id")) == 1
    assert len(values(lowered, b"x-headrace-request-id")) == 1
    assert values(lowered, b"a") == [b"b"]
    assert b"serve" not in values(lowered, b"x-request-id")


async def test_every_request_gets_an_id_of_its_own() -> None:
    first, second = await passed(Inside()), await passed(Inside())
    assert values(first, b"x-request-id") != values(second, b"x-request-id")


async def test_the_callers_scope_is_not_changed() -> None:
    scope = {"type": "http", "headers": [(b"x-request-id", b"mine")]}

    async def send(_message: Any) -> None:
        return None

    await EdgeHeaders(Inside())(scope, send, send)  # type: ignore[arg-type]
    assert scope == {"type": "http", "headers": [(b"x-request-id", b"mine")]}


@pytest.mark.parametrize(
    ("header", "parts", "closes"),
    [
        ((b"accept", b"*/*"), [], False),
        ((b"content-length", b"0"), [], False),
        ((b"Content-Length", b"4"), [], True),
        ((b"content-length", b"4"), [b"ab"], True),
        ((b"content-length", b"4"), [b"ab", b"cd"], False),
        ((b"transfer-encoding", b"chunked"), [b"ab"], True),
    ],
)
async def test_a_response_before_the_whole_body_ends_the_connection(
    header: tuple[bytes, bytes], parts: list[bytes], closes: bool
) -> None:
    sent: list[Any] = []
    body = iter([(part, part != b"cd") for part in parts])

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        for _ in parts:
            await receive()
        headers = [(b"Connection", b"keep-alive"), (b"x-own", b"1")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})

    async def receive() -> Any:
        part, more = next(body)
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [header], "path": "/"}
    await EdgeHeaders(inside)(scope, receive, send)
    found = sent[0]["headers"]
    assert values(found, b"x-own") == [b"1"]
    assert values(found, b"connection") == ([b"close"] if closes else [])
    assert values(found, b"Connection") == ([] if closes else [b"keep-alive"])


async def test_what_is_not_http_passes_unchanged() -> None:
    seen: list[Any] = []

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    scope, receive, send = {"type": "lifespan"}, object(), object()
    await EdgeHeaders(inside)(scope, receive, send)  # type: ignore[arg-type]
    assert seen == [(scope, receive, send)]


def test_without_the_edge_a_request_is_named_where_it_is_served() -> None:
    named, label = request_names({"type": "http", "headers": [(b"x-request-id", b"mine")]})
    assert named.startswith("req_")
    assert label == "mine"
    assert request_names({"type": "http", "headers": []})[1] is None


def test_serve_is_given_the_layer() -> None:
    [middleware] = middlewares()
    assert middleware.cls is EdgeHeaders


async def test_the_middle_of_a_body_may_go_straight_to_the_server() -> None:
    seen: list[Any] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(server_send(scope))

    async def send(message: Any) -> None:
        return

    async def receive() -> Any:
        return {}

    scope = {"type": "http", "headers": []}
    await EdgeHeaders(application)(scope, receive, send)
    await application(scope, receive, send)
    assert seen == [send, None]


def test_a_server_on_another_loop_is_not_written_to_from_here() -> None:
    inner: list[Scope] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        inner.append(scope)

    async def nothing(*_: Any) -> Any:
        return {}

    async def elsewhere() -> Any:
        return server_send(inner[0])

    asyncio.run(EdgeHeaders(application)({"type": "http", "headers": []}, nothing, nothing))
    assert asyncio.run(elsewhere()) is None


async def test_serves_fallback_proxy_can_send_the_scope_to_a_router() -> None:
    """It pickles the scope; what belongs to this process stays behind."""
    inner: list[Scope] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        inner.append(pickle.loads(pickle.dumps(scope)))

    async def nothing(*_: Any) -> Any:
        return {}

    await EdgeHeaders(application)({"type": "http", "headers": []}, nothing, nothing)
    assert server_send(inner[0]) is None
