"""The bare server: the simulated engine behind Starlette and uvicorn, and nothing between.

No keys, no checks, no queue, no log. What another contender takes longer than this is its
overhead; it is also the engine that the peers are put in front of.

    python -m benchmarks.overhead.bare --port 8001
"""

from __future__ import annotations

import argparse
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from benchmarks.overhead.config import ENGINES
from serve_app.config import SimSettings
from serve_app.core.types import PoolName, PriorityClass, ReplicaId, RequestId
from serve_app.engine.api import Endpoint, Frame, GenerateCall
from serve_app.engine.sim import SimEngine

_SSE = [(b"content-type", b"text/event-stream; charset=utf-8")]


class Chat:
    """Chat completions, straight from the engine that the model's name chooses."""

    def __init__(self, engines: dict[str, SimEngine]) -> None:
        self._engines = engines
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        asked = orjson.loads(body)
        self._requests += 1
        call = GenerateCall(
            request_id=RequestId(str(self._requests)),
            endpoint=Endpoint.CHAT,
            body=body,
            stream=bool(asked.get("stream")),
            tenant="bare",
            cache_salt="",
            priority_class=PriorityClass.STANDARD,
        )
        await _answer(self._engines[asked["model"]], call, send)


async def _answer(engine: SimEngine, call: GenerateCall, send: Send) -> None:
    if call.stream:
        await send({"type": "http.response.start", "status": 200, "headers": _SSE})
    async for item in engine.generate(call):
        if not isinstance(item, Frame):
            continue
        if not call.stream:
            length = (b"content-length", str(len(item.data)).encode())
            headers = [(b"content-type", b"application/json"), length]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": item.data, "more_body": call.stream})
    if call.stream:
        await send({"type": "http.response.body", "body": b""})


def application() -> Starlette:
    """Return the ASGI application; its engines start with it."""
    engines = {
        name: SimEngine(SimSettings(**settings), PoolName(name), ReplicaId(name), time.monotonic)
        for name, settings in ENGINES.items()
    }

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        for engine in engines.values():
            await engine.start()
        yield
        for engine in engines.values():
            await engine.stop()

    async def health(_request: Request) -> Response:
        return Response(status_code=200)

    async def models(_request: Request) -> Response:
        data: list[dict[str, Any]] = [
            {"id": name, "object": "model", "created": 0, "owned_by": "bare"} for name in engines
        ]
        return JSONResponse({"object": "list", "data": data})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", Chat(engines), methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        lifespan=lifespan,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    uvicorn.run(
        application(),
        host="127.0.0.1",
        port=options.port,
        access_log=False,
        log_level="warning",
        loop="uvloop",
        http="httptools",
    )


if __name__ == "__main__":
    main()
