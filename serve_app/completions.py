"""The completion endpoints: one request, top to bottom.

Authenticate, parse, resolve the pool, then hold a place for the request while its answer
is streamed; whatever happens, one audit record says how it ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from starlette.types import Receive, Scope, Send

from serve_app.config import LimitSettings
from serve_app.core.types import (
    Outcome,
    PoolName,
    PriorityClass,
    Reject,
    RejectReason,
    ReplicaId,
    RequestId,
    Ticket,
)
from serve_app.engine.api import Endpoint, GenerateCall
from serve_app.engine.transport import Transport
from serve_app.errors import (
    ApiError,
    ContextLengthExceeded,
    DeadlineExceeded,
    ModelNotFound,
    RateLimited,
    Unavailable,
)
from serve_app.gate import Gate, Lease, Refused
from serve_app.gateway.auth import authenticate, require_model
from serve_app.gateway.edge import request_names
from serve_app.gateway.http import ClientGone, read_body, require_json
from serve_app.gateway.wire import ParsedRequest, ServiceTier, parse_chat, parse_completions
from serve_app.keys import KeyRecord, KeyTable
from serve_app.relay import Delivery, Relay

# Text has rarely fewer than three bytes per token, and a chat template adds some. The
# engine's own count replaces the estimate when the request ends.
BYTES_PER_TOKEN = 3
TEMPLATE_TOKENS = 64

CLIENT_CLOSED_REQUEST = 499

_PARSERS = {Endpoint.CHAT: parse_chat, Endpoint.COMPLETIONS: parse_completions}
_CLASS_OF_TIER: Mapping[ServiceTier, PriorityClass] = {
    "priority": PriorityClass.CRITICAL,
    "auto": PriorityClass.STANDARD,
    "default": PriorityClass.STANDARD,
    "flex": PriorityClass.SHEDDABLE,
}
_TOO_MANY = frozenset(
    {
        RejectReason.QUEUE_FULL,
        RejectReason.TENANT_CONCURRENCY,
        RejectReason.SHED,
        RejectReason.CLIENT_THROTTLED,
    }
)


@dataclass(slots=True)
class Audit:
    """Everything the log and the metrics say of one request. Times are monotonic seconds."""

    request_id: RequestId
    endpoint: str
    arrived_at_s: float
    client_label: str | None = None
    key: KeyRecord | None = None
    model: str | None = None
    pool: PoolName | None = None
    asked_class: PriorityClass | None = None
    served_class: PriorityClass | None = None
    decision: str = "refused"
    reason: str | None = None
    replica: ReplicaId | None = None
    queued_s: float | None = None
    outcome: Outcome | None = None
    degraded: str | None = None
    status: int = 200
    ended_at_s: float | None = None
    delivery: Delivery = field(default_factory=Delivery)


@dataclass(frozen=True, slots=True)
class Routes:
    """Which pool serves which model name; replaced as a whole by a configuration change."""

    aliases: Mapping[str, PoolName] = field(default_factory=dict)

    def pool_of(self, model: str) -> PoolName:
        """Return the pool behind a client's model name.

        Raises:
            ModelNotFound: no pool serves that name.
        """
        pool = self.aliases.get(model)
        if pool is None:
            raise ModelNotFound(
                f"The model {model!r:.200} does not exist or you do not have access to it.",
                param="model",
            )
        return pool


class Completions:
    """Serves chat and text completions. One per router, shared by all its requests."""

    def __init__(
        self,
        *,
        gate: Gate,
        transport: Callable[[PoolName], Transport],
        limits: LimitSettings,
        on_audit: Callable[[Audit], None],
        clock: Callable[[], float],
    ) -> None:
        self._gate = gate
        self._transport = transport
        self._limits = limits
        self._on_audit = on_audit
        self._clock = clock
        self.keys: KeyTable | None = None
        self.routes = Routes()

    def endpoint(self, endpoint: Endpoint) -> _EndpointApp:
        """Return the ASGI application of one endpoint."""
        return _EndpointApp(self, endpoint)

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every path writes exactly one response and one audit."""
        audit = self._open_audit(endpoint, scope)
        relay = Relay(send, [(b"x-headrace-request-id", audit.request_id.encode())], self._clock)
        audit.delivery = relay.delivery
        with self._closing(audit):
            try:
                async with asyncio.timeout(self._limits.max_stream_s):
                    await self._answer(endpoint, scope, receive, relay, audit)
            except ApiError as error:
                self._note_error(audit, error)
                await relay.fail(error)
            except Refused as refused:
                audit.reason = refused.reject.reason.value
                refusal = refusal_error(refused.reject)
                self._note_error(audit, refusal)
                await relay.fail(refusal)
            except TimeoutError:
                late = DeadlineExceeded(
                    f"The response took longer than {self._limits.max_stream_s:g} seconds."
                )
                audit.reason = "deadline"
                self._note_error(audit, late)
                await relay.fail(late)
            except ClientGone:
                audit.outcome, audit.status = Outcome.CANCELLED, CLIENT_CLOSED_REQUEST
            except asyncio.CancelledError:
                audit.outcome, audit.status = Outcome.CANCELLED, CLIENT_CLOSED_REQUEST
                raise

    async def _answer(
        self, endpoint: Endpoint, scope: Scope, receive: Receive, relay: Relay, audit: Audit
    ) -> None:
        key = self.caller(scope)
        audit.key = key
        require_json(scope)
        body = await read_body(scope, receive, self._limits.max_body_bytes)
        parsed = _PARSERS[endpoint](body, self._limits)
        audit.model = parsed.model
        require_model(key, parsed.model)
        audit.pool = pool = self.routes.pool_of(parsed.model)
        audit.asked_class = _CLASS_OF_TIER[parsed.service_tier]
        audit.served_class = max(audit.asked_class, key.priority_ceiling)
        ticket = self._ticket(audit, key, pool, parsed)
        call = self._call(endpoint, ticket, parsed)
        async with self._gate.place(ticket) as lease:
            audit.decision = "dispatched"
            audit.queued_s = lease.dispatch.queued_s
            audit.degraded = lease.dispatch.degraded
            relay.describe(lease.dispatch, audit.served_class)
            try:
                await relay.run(lease, self._transport(pool), lambda held: _aimed(call, held))
                audit.outcome = Outcome.COMPLETED
            finally:
                audit.replica = lease.replica

    def caller(self, scope: Scope) -> KeyRecord:
        """Return the key that a request came with.

        Raises:
            Unavailable: no key table has come from Control yet.
            KeyRejected: no valid key.
        """
        if self.keys is None:
            raise Unavailable("The service is starting.", code="starting", retry_after_s=1.0)
        return authenticate(scope["headers"], self.keys, time.time())

    def _ticket(
        self, audit: Audit, key: KeyRecord, pool: PoolName, parsed: ParsedRequest
    ) -> Ticket:
        assert audit.served_class is not None
        exact = parsed.prompt_token_ids
        estimate = parsed.prompt_bytes // BYTES_PER_TOKEN + TEMPLATE_TOKENS
        per_choice = parsed.max_tokens or self._limits.max_output_tokens
        return Ticket(
            request_id=audit.request_id,
            pool=pool,
            tenant=key.tenant,
            key=key.key_id,
            priority_class=audit.served_class,
            prompt_tokens=estimate if exact is None else exact,
            max_tokens=per_choice * parsed.choices,
            user=key.user,
            session=parsed.session,
        )

    def _call(self, endpoint: Endpoint, ticket: Ticket, parsed: ParsedRequest) -> GenerateCall:
        return GenerateCall(
            request_id=ticket.request_id,
            endpoint=endpoint,
            body=parsed.body_for_engine(parsed.model),
            stream=parsed.stream,
            tenant=ticket.tenant,
            cache_salt=hashlib.sha256(ticket.tenant.encode()).hexdigest()[:16],
            priority_class=ticket.priority_class,
        )

    def _open_audit(self, endpoint: Endpoint, scope: Scope) -> Audit:
        request_id, label = request_names(scope)
        return Audit(request_id, endpoint.value, self._clock(), label)

    @contextmanager
    def _closing(self, audit: Audit) -> Iterator[None]:
        try:
            yield
        finally:
            audit.ended_at_s = self._clock()
            self._on_audit(audit)

    @staticmethod
    def _note_error(audit: Audit, error: ApiError) -> None:
        audit.status = error.status
        audit.reason = audit.reason or error.code or error.type
        if audit.decision == "dispatched":
            audit.outcome = Outcome.FAILED


class _EndpointApp:
    """An ASGI application; Starlette calls a non-function endpoint as one."""

    def __init__(self, completions: Completions, endpoint: Endpoint) -> None:
        self._completions = completions
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._completions.serve(self._endpoint, scope, receive, send)


def refusal_error(reject: Reject) -> ApiError:
    """Return the client's error for a refusal of the core."""
    after_s = reject.retry_after_s
    if reject.reason is RejectReason.UNKNOWN_POOL or reject.reason is RejectReason.POOL_CLOSING:
        return ModelNotFound("The model is no longer served.", param="model")
    if reject.reason is RejectReason.KV_BUDGET and after_s is None:
        return ContextLengthExceeded(
            f"The prompt is longer than this model's context: {reject.detail}."
        )
    if reject.reason in _TOO_MANY:
        return RateLimited(
            "The service is at capacity for this request; retry later.",
            code=f"overloaded_{reject.reason.value}",
            retry_after_s=after_s,
        )
    if reject.reason is RejectReason.NO_REPLICA:
        return Unavailable(
            "No engine can serve this model at the moment; retry later.",
            code="no_replica",
            retry_after_s=after_s,
        )
    return Unavailable(
        "The service could not start this request in time; retry later.",
        code=f"overloaded_{reject.reason.value}",
        retry_after_s=after_s,
    )


def _aimed(call: GenerateCall, lease: Lease) -> GenerateCall:
    """Return the call with the places and the cap the core decided on."""
    first, *others = lease.dispatch.replicas
    return replace(
        call, target=first, fallbacks=tuple(others), max_tokens=lease.dispatch.max_tokens
    )
