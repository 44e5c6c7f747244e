"""The outermost ASGI layer, around Serve's own: what a client may say to Serve, and who is who.

Ray Serve reads request headers before any application sees them: some let a client switch
off the cancellation of a request it abandoned, set Serve's timeout or pick a replica. They
end here. So does the client's ``x-request-id``: inside, every request bears an id of ours;
the client's is a label, echoed if it is short and printable.

A response that begins before the request's body is there ends the connection: a body that
trickles in for ever would hold it, here and in HAProxy, though nobody waits for it.

Serve applies this where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (configs/ray.env) names
``middlewares``.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.core.types import RequestId
from serve_app.gateway.request_id import client_label, new_request_id

SCOPE_REQUEST_ID = "headrace.request_id"
SCOPE_CLIENT_LABEL = "headrace.client_label"
SCOPE_SERVER_SEND = "headrace.server_send"

MAX_LABEL_BYTES = 128

_SERVES_OWN = frozenset(
    {
        b"x-request-disconnect-disabled",
        b"x-request-timeout-seconds",
        b"x-session-id",
        b"x-request-id",
    }
)
_BODY = frozenset({b"content-length", b"transfer-encoding"})
_CLOSE = (b"connection", b"close")
_MULTIPLEX = b"serve_multiplexed_model_id"


class EdgeHeaders:
    """Removes Serve's control headers, names the request, waits for no body in vain."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an HTTP request on with headers of ours; anything else unchanged."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        label = client_label(scope["headers"], MAX_LABEL_BYTES)
        request_id = new_request_id(time.time_ns(), os.urandom(10))
        kept, body_comes = _sorted_out(scope["headers"])
        inner = {
            **scope,
            "headers": [*kept, (b"x-request-id", request_id.encode())],
            SCOPE_REQUEST_ID: request_id,
            SCOPE_CLIENT_LABEL: label,
            SCOPE_SERVER_SEND: _ServerSend(send, asyncio.get_running_loop()),
        }
        names = [
            (b"x-request-id", (label or request_id).encode()),
            (b"x-headrace-request-id", request_id.encode()),
        ]

        async def receive_noted() -> Message:
            nonlocal body_comes
            message = await receive()
            if not message.get("more_body", False):
                body_comes = False
            return message

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [*names, _CLOSE] if body_comes else names
                dropped = {name for name, _ in ours}
                others = [h for h in message["headers"] if h[0].lower() not in dropped]
                message = {**message, "headers": [*others, *ours]}
            await send(message)

        await self._app(inner, receive_noted if body_comes else receive, send_named)


def middlewares() -> list[Middleware]:
    """Return what Serve wraps its HTTP servers in."""
    return [Middleware(EdgeHeaders)]


def request_names(scope: Scope) -> tuple[RequestId, str | None]:
    """Return a request's id and its client's label.

    Without the edge layer (a plain ``serve run``) the id is made here, and the label is
    whatever ``x-request-id`` Serve found or made.
    """
    request_id = scope.get(SCOPE_REQUEST_ID)
    if request_id is not None:
        return request_id, scope[SCOPE_CLIENT_LABEL]
    own = new_request_id(time.time_ns(), os.urandom(10))
    return own, client_label(scope["headers"], MAX_LABEL_BYTES)


def server_send(scope: Scope) -> Send | None:
    """Return the HTTP server's own ``send``, for the middle of a body.

    None without the edge layer, and where the application runs on another loop. What begins
    and what ends a response goes through every layer: Serve counts and names it there.
    """
    known: _ServerSend | None = scope.get(SCOPE_SERVER_SEND)
    return known.send if known and known.loop is asyncio.get_running_loop() else None


class _ServerSend:
    """A server's ``send`` and its loop; in another process, where Serve's fallback proxy may
    send the scope, neither."""

    def __init__(self, send: Send | None = None, loop: asyncio.AbstractEventLoop | None = None):
        self.send = send
        self.loop = loop

    def __reduce__(self) -> tuple[type[_ServerSend], tuple[()]]:
        return (_ServerSend, ())


def _sorted_out(headers: Iterable[tuple[bytes, bytes]]) -> tuple[list[tuple[bytes, bytes]], bool]:
    """Return the headers that are not Serve's own, and whether a body comes."""
    kept: list[tuple[bytes, bytes]] = []
    body_comes = False
    for header in headers:
        name = header[0].lower()
        if name in _SERVES_OWN or name.replace(b"-", b"_") == _MULTIPLEX:
            continue
        kept.append(header)
        if name in _BODY and header[1] != b"0":
            body_comes = True
    return kept, body_comes
