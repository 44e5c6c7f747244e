"""The routes beside completions: is it alive, can it serve, what does it offer, its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve_app.completions import Completions
from serve_app.gateway.auth import require_admin

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Below the 10 s for which Prometheus waits by itself.
SCRAPE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Readiness:
    """What a router can do right now.

    ``limits_loaded``: Control has told which parts of limits this router has, so that they can be
    taken. ``pools`` are the replicas of each; ``sleeping`` those that may have none while idle, and
    wake for a request.
    """

    keys_loaded: bool
    limits_loaded: bool
    pools: Mapping[str, int]
    fast_path: bool
    control_away: bool
    notes: Sequence[str] = ()
    draining: bool = False
    sleeping: frozenset[str] = frozenset()

    @property
    def ready(self) -> bool:
        """Whether requests of at least one pool can be served, if need be after it woke."""
        served = self.sleeping or any(replicas > 0 for replicas in self.pools.values())
        loaded = self.keys_loaded and self.limits_loaded
        return loaded and bool(served) and not self.draining


class MetricsCopy:
    """The application's metrics: Control's answer, or the last one and its age."""

    def __init__(self, scrape: Callable[[], Awaitable[bytes]], clock: Callable[[], float]) -> None:
        self._scrape = scrape
        self._clock = clock
        self._text = b""
        self._taken_at_s: float | None = None

    async def text(self) -> bytes:
        """Return Prometheus text; the last sample is the copy's age in seconds."""
        try:
            async with asyncio.timeout(SCRAPE_S):
                self._text = await self._scrape()
            self._taken_at_s = self._clock()
        except Exception:  # noqa: BLE001, S110  # Control away in any way: serve the last copy
            pass
        if self._taken_at_s is None:
            return b""
        age_s = self._clock() - self._taken_at_s
        return self._text + (
            b"# HELP headrace_scrape_age_seconds Age of this copy of the application's metrics.\n"
            b"# TYPE headrace_scrape_age_seconds gauge\n"
            b"headrace_scrape_age_seconds %.3f\n" % age_s
        )


class Operations:
    """Handlers of the routes that are not completions."""

    def __init__(
        self,
        *,
        completions: Completions,
        readiness: Callable[[], Readiness],
        metrics: MetricsCopy,
        metrics_public: bool,
        started_at_s: float,
    ) -> None:
        self._completions = completions
        self._readiness = readiness
        self._metrics = metrics
        self._metrics_public = metrics_public
        self._started_at_s = started_at_s

    async def health(self, _request: Request) -> Response:
        """200 while this process answers at all."""
        return _json({"status": "alive"})

    async def ready(self, _request: Request) -> Response:
        """200 if at least one pool can serve, else 503; replicas per pool either way."""
        state = self._readiness()
        notes = [*state.notes]
        if state.control_away:
            notes.append("Control does not answer; keys and routes are those last known")
        body = {
            "status": "ready" if state.ready else "not_ready",
            "pools": {
                name: {"ready": replicas > 0, "replicas": replicas}
                | ({"asleep": True} if not replicas and name in state.sleeping else {})
                for name, replicas in sorted(state.pools.items())
            },
            "keys_loaded": state.keys_loaded,
            "limits_loaded": state.limits_loaded,
            "fast_path": state.fast_path,
            "notes": notes,
        }
        headers = {} if state.ready else {"retry-after": "1"}
        return _json(body, status=200 if state.ready else 503, headers=headers)

    async def models(self, request: Request) -> Response:
        """The models this key may use, as OpenAI lists them."""
        key = self._completions.caller(request.scope)
        names = [name for name in self._completions.rules.aliases if key.may_use(name)]
        return _json({"object": "list", "data": [self._model(name) for name in sorted(names)]})

    async def model(self, request: Request) -> Response:
        """One model by name."""
        key = self._completions.caller(request.scope)
        name = request.path_params["name"]
        # A model outside the key's scope does not exist for it.
        self._completions.rules.alias(name if key.may_use(name) else "")
        return _json(self._model(name))

    async def metrics(self, request: Request) -> Response:
        """The whole application's metrics, one scrape."""
        if not self._metrics_public:
            require_admin(self._completions.caller(request.scope))
        return Response(await self._metrics.text(), media_type=METRICS_TYPE)

    def _model(self, name: str) -> dict[str, object]:
        return {
            "id": name,
            "object": "model",
            "created": int(self._started_at_s),
            "owned_by": "headrace",
        }


def _json(
    body: Mapping[str, object] | Sequence[object],
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
