"""The ASGI pieces: bodies in, one answer out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import orjson
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from serve_app.errors import (
    BodyTooLarge,
    EngineFailed,
    InvalidRequest,
    RateLimited,
    RequestTimeout,
    UnsupportedMediaType,
)
from serve_app.gateway.http import (
    ClientGone,
    StreamSender,
    exception_handlers,
    read_body,
    require_json,
    send_error,
    until_disconnect,
)

LIMIT_BYTES = 100


class Wire:
    """A client that has sent some chunks; records what it receives and how much was read."""

    def __init__(self, chunks: Iterable[bytes | None] = ()) -> None:
        self.waiting = list(chunks)
        self.sent: list[dict[str, Any]] = []
        self.closed = False

    async def receive(self) -> dict[str, Any]:
        if not self.waiting:
            await asyncio.Event().wait()
        chunk = self.waiting.pop(0)
        if chunk is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": bool(self.waiting)}

    async def send(self, message: Any) -> None:
        if self.closed:
            raise OSError("connection lost")
        self.sent.append(dict(message))

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.sent if m["type"] == "http.response.body")

    @property
    def ended(self) -> int:
        """How many times the response ended."""
        bodies = [m for m in self.sent if m["type"] == "http.response.body"]
        return sum(not message.get("more_body", False) for message in bodies)


def scope(**headers: str) -> dict[str, Any]:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "headers": pairs}


async def read(wire: Wire, **headers: str) -> bytes:
    return await read_body(scope(**headers), wire.receive, LIMIT_BYTES)


@pytest.mark.parametrize("chunks", [[b"x" * 100], [b"x" * 60, b"x" * 40], [b"x" * 100, b""]])
async def test_a_body_of_exactly_the_limit_is_read(chunks: list[bytes]) -> None:
    assert await read(Wire(chunks)) == b"x" * 100


@pytest.mark.parametrize("chunks", [[b"x" * 101], [b"x" * 100, b"x"]])
async def test_one_byte_over_the_limit_is_refused(chunks: list[bytes]) -> None:
    with pytest.raises(BodyTooLarge):
        await read(Wire(chunks))


async def test_a_declared_length_over_the_limit_is_refused_after_the_client_has_sent_it() -> None:
    wire = Wire([b"x" * 50, b"x" * 51])
    with pytest.raises(BodyTooLarge):
        await read(wire, content_length="101")
    assert wire.waiting == []


async def test_a_declared_length_far_over_the_limit_is_refused_unread() -> None:
    wire = Wire([b"x" * 100])
    with pytest.raises(BodyTooLarge):
        await read(wire, content_length="1000000000")
    assert len(wire.waiting) == 1


async def test_an_endless_chunked_body_is_not_read_to_its_end() -> None:
    wire = Wire([b"x" * 60] * 100)
    with pytest.raises(BodyTooLarge):
        await read(wire)
    assert len(wire.waiting) > 90


async def test_a_body_that_is_refused_on_the_way_is_read_to_its_end_and_not_kept() -> None:
    wire = Wire([b"x" * 10] * 6)
    kept: list[int] = []

    def room_for_two(size_bytes: int) -> None:
        if len(kept) == 2:
            raise RateLimited("no room")
        kept.append(size_bytes)

    with pytest.raises(RateLimited):
        await read_body(scope(), wire.receive, LIMIT_BYTES, on_bytes=room_for_two)
    assert kept == [10, 10]
    assert wire.waiting == []


@pytest.mark.parametrize("value", ["-1", "1e3", "abc", "9" * 30])
async def test_a_content_length_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest):
        await read(Wire([b""]), content_length=value)


async def test_a_client_that_leaves_in_the_middle_is_noticed() -> None:
    with pytest.raises(ClientGone):
        await read(Wire([b"x" * 10, None]))


async def test_a_body_that_never_ends_times_out() -> None:
    wire = Wire([b"x", b"y"])
    wire.waiting[1:] = []

    async def receive() -> dict[str, Any]:
        if wire.waiting:
            return {"type": "http.request", "body": wire.waiting.pop(), "more_body": True}
        return await wire.receive()

    with pytest.raises(RequestTimeout):
        await read_body(scope(), receive, LIMIT_BYTES, timeout_s=0.001)


@pytest.mark.parametrize(
    "value",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
    ],
)
def test_json_in_utf8_is_accepted(value: str) -> None:
    require_json(scope(content_type=value))


@pytest.mark.parametrize(
    "value",
    [
        "text/plain",
        "application/jsonp",
        "application/json; charset=utf-16",
        "",
        "multipart/form-data",
    ],
)
def test_other_content_types_are_refused(value: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        require_json(scope(content_type=value))


def test_a_missing_content_type_is_refused() -> None:
    with pytest.raises(UnsupportedMediaType, match="got none"):
        require_json(scope())


async def test_an_error_is_sent_with_its_headers() -> None:
    wire = Wire()
    error = RateLimited("slow down", retry_after_s=1.2, should_retry=False)
    await send_error(wire.send, error, headers=[(b"x-request-id", b"r")])
    start = wire.sent[0]
    assert start["status"] == 429
    headers = dict(start["headers"])
    assert headers[b"retry-after"] == b"2"
    assert headers[b"x-should-retry"] == b"false"
    assert headers[b"x-request-id"] == b"r"
    assert int(headers[b"content-length"]) == len(wire.body)
    assert orjson.loads(wire.body)["error"]["code"] == "rate_limit_exceeded"


async def test_a_stream_begins_with_its_first_byte_and_ends_once() -> None:
    wire = Wire()
    stream = StreamSender(wire.send, [(b"x-request-id", b"r")])
    assert wire.sent == []
    await stream.write(b"data: 1\n\n")
    await stream.write(b"data: [DONE]\n\n")
    await stream.finish()
    assert dict(wire.sent[0]["headers"])[b"content-type"].startswith(b"text/event-stream")
    assert wire.body == b"data: 1\n\ndata: [DONE]\n\n"
    assert stream.sent_bytes == len(wire.body)
    assert wire.ended == 1
    for late in (stream.finish(), stream.write(b"x"), stream.fail(EngineFailed("x"))):
        with pytest.raises(AssertionError):
            await late


async def test_an_error_before_the_first_byte_is_a_status() -> None:
    wire = Wire()
    stream = StreamSender(wire.send, [(b"x-request-id", b"r")])
    await stream.fail(EngineFailed("it died"))
    assert wire.sent[0]["status"] == 500
    headers = dict(wire.sent[0]["headers"])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"x-request-id"] == b"r"
    assert wire.ended == 1


async def test_an_error_after_the_first_byte_is_the_last_event() -> None:
    wire = Wire()
    stream = StreamSender(wire.send)
    await stream.write(b"data: 1\n\n")
    await stream.fail(EngineFailed("it died"))
    assert wire.sent[0]["status"] == 200
    last = wire.body.split(b"\n\n")[1]
    assert orjson.loads(last.removeprefix(b"data: "))["error"]["message"] == "it died"
    assert wire.ended == 1


async def test_writing_to_a_closed_connection_says_that_the_client_is_gone() -> None:
    wire = Wire()
    stream = StreamSender(wire.send)
    await stream.write(b"data: 1\n\n")
    wire.closed = True
    with pytest.raises(ClientGone):
        await stream.write(b"data: 2\n\n")


async def test_a_disconnect_is_awaited() -> None:
    await until_disconnect(Wire([b"", None]).receive)


def client() -> TestClient:
    async def fail(_request: Request) -> Response:
        raise RateLimited("slow down", retry_after_s=3)

    async def crash(_request: Request) -> Response:
        raise RuntimeError("a bug with a secret in it")

    routes = [Route("/fail", fail, methods=["POST"]), Route("/crash", crash)]
    app = Starlette(routes=routes, exception_handlers=exception_handlers())
    return TestClient(app, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "unknown_url"),
        ("GET", "/fail", 405, "method_not_allowed"),
        ("POST", "/fail", 429, "rate_limit_exceeded"),
        ("GET", "/crash", 500, "internal_error"),
    ],
)
def test_what_no_route_answers_has_openais_shape(
    method: str, path: str, status: int, code: str
) -> None:
    answer = client().request(method, path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert "secret" not in answer.text


def test_a_wrong_method_is_told_the_right_one_and_a_refusal_when_to_retry() -> None:
    assert client().get("/fail").headers["allow"] == "POST"
    assert client().post("/fail").headers["retry-after"] == "3"
