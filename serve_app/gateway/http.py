"""Small ASGI pieces the router is made of: read a body, answer once, stream once.

Nothing here knows what a completion is. Every function takes ASGI's own ``receive`` and
``send``, so that a token costs one call and no framework object.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ExceptionHandler, Message, Receive, Scope, Send

from serve_app.errors import (
    ApiError,
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    UnsupportedMediaType,
)

Headers = list[tuple[bytes, bytes]]

_JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
_SSE: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies in front of us must not collect tokens before passing them on.
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


async def read_body(
    scope: Scope,
    receive: Receive,
    limit_bytes: int,
    *,
    timeout_s: float = 60.0,
    on_bytes: Callable[[int], None] | None = None,
) -> bytes:
    """Return the request's body, at most ``limit_bytes`` of it.

    ``on_bytes`` is called with the size of each piece that is kept; what it raises is raised.

    A body over the limit is refused from its content-length, or when the first byte over
    it arrives. Up to ``limit_bytes`` more are read and thrown away first: a client that
    is still sending would see a broken connection instead of the answer.

    Raises:
        BodyTooLarge: it is longer than ``limit_bytes``.
        InvalidRequest: its content-length is not a number.
        RequestTimeout: it did not arrive in ``timeout_s``.
        ClientGone: the client left before the end of it.
    """
    declared_bytes = _content_length(scope)
    try:
        async with asyncio.timeout(timeout_s):
            if declared_bytes is not None and declared_bytes > limit_bytes:
                if declared_bytes <= 2 * limit_bytes:
                    await _discard(receive, declared_bytes)
                raise _too_large(limit_bytes)
            return await _collect(receive, limit_bytes, on_bytes)
    except TimeoutError:
        raise RequestTimeout(
            f"The request body did not arrive within {timeout_s:g} seconds."
        ) from None


def require_json(scope: Scope) -> None:
    """Check that the body is declared as JSON in UTF-8.

    Raises:
        UnsupportedMediaType: another content type, another charset, or none at all.
    """
    value = _header(scope, b"content-type")
    shown = value.decode("latin-1")[:80] if value else "none"
    media_type, _, parameters = shown.partition(";")
    if media_type.strip().lower() != "application/json":
        raise UnsupportedMediaType(
            f"The content type must be application/json; got {shown}.", param="content-type"
        )
    for parameter in parameters.split(";"):
        name, _, charset = parameter.partition("=")
        if name.strip().lower() == "charset" and charset.strip(' "').lower() not in _UTF8:
            raise UnsupportedMediaType(
                f"The charset must be utf-8; got {shown}.", param="content-type"
            )


_UTF8 = frozenset({"utf-8", "utf8", "us-ascii"})


async def send_json(
    send: Send, body: bytes, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with a JSON body that is already encoded."""
    length = (b"content-length", str(len(body)).encode())
    await _send(
        send,
        {"type": "http.response.start", "status": status, "headers": [_JSON, length, *headers]},
    )
    await _send(send, {"type": "http.response.body", "body": body})


async def send_error(
    send: Send, error: ApiError, *, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Answer with an error in OpenAI's shape, with its own headers and ``headers``."""
    everything = [*error.headers(), *headers]
    await send_json(send, error.body(), status=error.status, headers=everything)


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection. Call it after read_body."""
    while (await receive())["type"] != "http.disconnect":
        pass


class StreamSender:
    """One streamed response: begun by its first byte, ended exactly once.

    Until the first ``write`` nothing is on the wire, so another replica may still be
    tried and an error is still a status. After it an error is the stream's last event.
    """

    def __init__(
        self,
        send: Send,
        headers: Iterable[tuple[bytes, bytes]] = (),
        send_middle: Send | None = None,
    ) -> None:
        """``send_middle`` is a shorter way for what neither begins nor ends the response."""
        self._send = send
        self._send_middle = send_middle or send
        self._headers: Headers = [*_SSE, *headers]
        self.started = False
        self.ended = False
        self.sent_bytes = 0

    def add_header(self, name: bytes, value: bytes) -> None:
        """Add a response header, before the first byte."""
        assert not self.started, "headers have been sent"
        self._headers.append((name, value))

    async def write(self, data: bytes) -> None:
        """Send whole SSE events.

        Raises:
            ClientGone: the connection is closed.
        """
        assert not self.ended, "a stream ends once"
        if not self.started:
            await self._start()
        self.sent_bytes += len(data)
        try:
            await self._send_middle({"type": "http.response.body", "body": data, "more_body": True})
        except OSError as error:
            raise ClientGone from error

    async def finish(self) -> None:
        """End the stream after its last event."""
        assert not self.ended, "a stream ends once"
        self.ended = True
        await self._start()
        await _send(self._send, {"type": "http.response.body", "body": b""})

    async def fail(self, error: ApiError) -> None:
        """End the response with ``error``: as a status if nothing was sent, else as an event."""
        assert not self.ended, "a stream ends once"
        self.ended = True
        if not self.started:
            self.started = True
            own = [header for header in self._headers if header not in _SSE]
            await send_error(self._send, error, headers=own)
            return
        event = error.sse_event()
        self.sent_bytes += len(event)
        await _send(self._send, {"type": "http.response.body", "body": event})

    async def _start(self) -> None:
        if self.started:
            return
        self.started = True
        await _send(
            self._send,
            {"type": "http.response.start", "status": 200, "headers": self._headers},
        )


def internal_error() -> ApiError:
    """Return the client's error for a bug of ours."""
    return ApiError("The server failed on this request.", code="internal_error")


def exception_handlers() -> dict[int | type[Exception], ExceptionHandler]:
    """Return Starlette's handlers for whatever no route has answered."""
    return {
        HTTPException: _on_http_exception,
        ApiError: _on_api_error,
        Exception: _on_unexpected,
    }


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"[:200]
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        problem = MethodNotAllowed(f"{where} is not allowed; use {allowed}.")
        return _response(problem, {"allow": allowed})
    if error.status_code == 404:
        return _response(NotFound(f"There is no route {where}.", code="unknown_url"))
    other = ApiError(str(error.detail)) if error.status_code >= 500 else None
    problem_4xx = other or InvalidRequest(str(error.detail))
    problem_4xx.status = error.status_code
    return _response(problem_4xx)


async def _on_api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _response(error)


async def _on_unexpected(_request: Request, _error: Exception) -> Response:
    """Answer for a bug. Starlette raises the exception again behind it, to be logged."""
    return _response(internal_error())


def _response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    own = {name.decode(): value.decode() for name, value in error.headers()}
    return Response(
        error.body(), error.status, {**own, **(headers or {})}, media_type="application/json"
    )


async def _collect(
    receive: Receive, limit_bytes: int, on_bytes: Callable[[int], None] | None
) -> bytes:
    chunks: list[bytes] = []
    size_bytes = 0
    while True:
        chunk, more = await _next_chunk(receive)
        size_bytes += len(chunk)
        try:
            if size_bytes > limit_bytes:
                raise _too_large(limit_bytes)
            if on_bytes is not None:
                on_bytes(len(chunk))
        except ApiError:
            chunks.clear()
            if more:
                await _discard(receive, limit_bytes)
            raise
        chunks.append(chunk)
        if not more:
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


async def _discard(receive: Receive, most_bytes: int) -> None:
    while most_bytes > 0:
        chunk, more = await _next_chunk(receive)
        most_bytes -= len(chunk)
        if not more:
            return


async def _next_chunk(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientGone
    return message.get("body", b""), message.get("more_body", False)


async def _send(send: Send, message: Message) -> None:
    try:
        await send(message)
    except OSError as error:
        raise ClientGone from error


def _content_length(scope: Scope) -> int | None:
    value = _header(scope, b"content-length")
    if value is None:
        return None
    if not (value.isdigit() and len(value) < 20):
        raise InvalidRequest("The content-length is not a number.", param="content-length")
    return int(value)


def _header(scope: Scope, name: bytes) -> bytes | None:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return None


def _too_large(limit_bytes: int) -> BodyTooLarge:
    return BodyTooLarge(f"The request body is larger than {limit_bytes} bytes.")
