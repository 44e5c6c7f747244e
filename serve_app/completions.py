"""The completion endpoints: one request, top to bottom.

Authenticate, parse, resolve the pool, then hold a place for the request while its answer
is streamed; whatever happens, one audit record says how it ended.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)

from starlette.types import Receive, Scope, Send

from serve_app.audit import Audit
from serve_app.books import Books
from serve_app.config import LimitSettings
from serve_app.config_policy import SpotLimits
from serve_app.continuation import Continuation
from serve_app.core.limits import Short
from serve_app.core.purses import Reserved
from serve_app.core.types import (
    Outcome,
    PoolName,
    Reject,
    RejectReason,
)
from serve_app.engine.api import Endpoint
from serve_app.engine.transport import Transport
from serve_app.errors import (
    ApiError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    RateLimited,
    Unavailable,
)
from serve_app.gate import Gate, Refused
from serve_app.gateway.auth import authenticate, require_model
from serve_app.gateway.edge import request_names, server_send
from serve_app.gateway.http import ClientGone, internal_error, read_body, require_json
from serve_app.gateway.wire import ParsedRequest, parse_chat, parse_completions
from serve_app.hold import hold
from serve_app.keys import KeyRecord, KeyTable
from serve_app.limiter import RouterLimits
from serve_app.money import Money
from serve_app.overload import BodyMemory, Overload
from serve_app.relay import Relay
from serve_app.rules import Rules
from serve_app.tickets import Prepared, Tickets, asked_class

SESSION_HEADER = b"x-headrace-session"
SESSION_BYTES_MAX = 256
TAG_HEADER = b"x-headrace-tag"
# Says that an answer may be shorter than was asked for: so much is what its budget pays.
BUDGET_HEADER = b"x-headrace-budget"
# Says the same of a model on spot nodes, which may be taken away at short notice.
SPOT_HEADER = b"x-headrace-spot"

CLIENT_CLOSED_REQUEST = 499

_TAG = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:@-]{0,63}")

_PARSERS = {Endpoint.CHAT: parse_chat, Endpoint.COMPLETIONS: parse_completions}
_TOO_MANY = frozenset(
    {
        RejectReason.QUEUE_FULL,
        RejectReason.TENANT_CONCURRENCY,
        RejectReason.SHED,
        RejectReason.CLIENT_THROTTLED,
    }
)


class Completions:
    """Serves chat and text completions. One per router, shared by all its requests."""

    def __init__(
        self,
        *,
        gate: Gate,
        transport: Callable[[PoolName], Transport],
        tickets: Tickets,
        rates: RouterLimits,
        limits: LimitSettings,
        books: Books,
        money: Money | None = None,
        overload: Overload,
        on_audit: Callable[[Audit], None],
        clock: Callable[[], float],
    ) -> None:
        self._gate = gate
        self._transport = transport
        self._tickets = tickets
        self._rates = rates
        self._limits = limits
        self._books = books
        self._money = money
        self._overload = overload
        self.bodies = BodyMemory(limits.bodies_bytes)
        self._on_audit = on_audit
        self._clock = clock
        self.keys: KeyTable | None = None

    @property
    def rules(self) -> Rules:
        """The configuration in force; replaced as a whole by ``configure``."""
        return self._tickets.rules

    def configure(self, rules: Rules) -> None:
        """Serve by other rules from the next request on."""
        self._tickets.rules = rules

    def endpoint(self, endpoint: Endpoint) -> _EndpointApp:
        """Return the ASGI application of one endpoint."""
        return _EndpointApp(self, endpoint)

    async def serve(self, endpoint: Endpoint, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every path writes exactly one response and one audit."""
        audit = self._open_audit(endpoint, scope)
        names = [(b"x-headrace-request-id", audit.request_id.encode())]
        relay = Relay(send, names, self._clock, server_send(scope))
        audit.delivery = relay.delivery
        with self._closing(audit):
            try:
                async with asyncio.timeout(self._limits.max_stream_s):
                    await self._answer(endpoint, scope, receive, relay, audit)
            except ApiError as error:
                await self._fail(relay, audit, error)
            except Refused as refused:
                audit.reason = refused.reject.reason.value
                await self._fail(relay, audit, refusal_error(refused.reject))
            except TimeoutError:
                late = DeadlineExceeded(
                    f"The response took longer than {self._limits.max_stream_s:g} seconds."
                )
                audit.reason = "deadline"
                await self._fail(relay, audit, late)
            except ClientGone:
                self._note_gone(audit)
            except asyncio.CancelledError:
                self._note_gone(audit)
                raise
            except Exception:
                await self._fail(relay, audit, internal_error())
                raise

    @staticmethod
    def _note_gone(audit: Audit) -> None:
        """Record a client that left; a response that was settled is complete none the less."""
        if audit.delivery.usage is not None:
            audit.outcome = Outcome.COMPLETED
        else:
            audit.outcome, audit.status = Outcome.CANCELLED, CLIENT_CLOSED_REQUEST

    async def _answer(
        self, endpoint: Endpoint, scope: Scope, receive: Receive, relay: Relay, audit: Audit
    ) -> None:
        key = self.caller(scope)
        audit.key = key
        self._books.check()
        self._overload.check(key.priority_ceiling)
        require_json(scope)
        with self.bodies.of(key.tenant) as on_bytes:
            most = self._limits.max_body_bytes
            body = await read_body(scope, receive, most, on_bytes=on_bytes)
            parsed = _PARSERS[endpoint](body, self._limits)
            del body
            await self._answer_parsed(endpoint, scope, parsed, relay, audit)

    async def _answer_parsed(
        self, endpoint: Endpoint, scope: Scope, parsed: ParsedRequest, relay: Relay, audit: Audit
    ) -> None:
        key = audit.key
        assert key is not None, "the caller is known"
        if parsed.stream:
            relay.continuation = self._continuation(parsed)
        prepared = await self._prepare(scope, parsed, audit, key)
        ticket, scopes = prepared.ticket, prepared.terms.scopes
        audit.pool, audit.served_class = ticket.pool, ticket.priority_class
        audit.expected_prompt_tokens = prepared.prompt.expected_tokens
        wanted = (ticket.request_id, scopes, prepared.expected_tokens, prepared.upper_tokens)
        taken = self._rates.take(*wanted)
        if isinstance(taken, Short):
            taken = await self._rates.fetch(*wanted, short=taken)
        headers, refused = taken
        relay.add_headers(headers)
        audit.rated = True
        if refused is not None:
            raise refused
        try:
            prepared = await self._pay(prepared, relay, audit)
            await self._serve(endpoint, prepared, relay, audit)
        finally:
            self._rates.settle(ticket.request_id, _used_tokens(prepared, audit))
            if self._money is not None:
                self._money.settle(audit)

    def _continuation(self, parsed: ParsedRequest) -> Continuation:
        return Continuation(
            most=self._limits.continuations,
            sampled_too=self._limits.continue_sampled,
            sampling=parsed.sampling,
            choices=parsed.choices,
        )

    async def _pay(self, prepared: Prepared, relay: Relay, audit: Audit) -> Prepared:
        """Reserve what the request may cost; return it with an answer as long as that pays.

        A stream goes on beyond that for as long as there is more to reserve.
        """
        self._books.price(audit)
        fare = None if self._money is None else self._money.fare(audit, prepared)
        if self._money is None or fare is None:
            return prepared
        answer = self._money.reserve(fare)
        if not isinstance(answer, Reserved):
            answer = await self._money.fetch(fare, answer)
        tokens = fare.output_tokens(answer.amount)
        if tokens >= prepared.ticket.max_tokens:
            return prepared
        relay.add_headers([(BUDGET_HEADER, b"max_tokens=%d" % tokens)])
        if prepared.parsed.stream and prepared.parsed.choices == 1:
            relay.cap = self._money.tranches(fare, answer, prepared.ticket.max_tokens)
            return prepared
        return prepared.capped(tokens)

    async def _prepare(
        self, scope: Scope, parsed: ParsedRequest, audit: Audit, key: KeyRecord
    ) -> Prepared:
        """Apply who asks and for what to a request that could be read."""
        audit.model = parsed.model
        audit.user = parsed.user
        audit.tag = _tag_header(scope)
        audit.asked_class = asked_class(parsed)
        require_model(key, parsed.model)
        terms = self.rules.terms(key, parsed.model, parsed.user)
        audit.pool = terms.pool
        audit.served_class = max(audit.asked_class, terms.ceiling)
        return await self._tickets.prepare(
            audit.request_id,
            key,
            parsed,
            terms=terms,
            session=_session_header(scope),
            room_tokens=self._rates.room_tokens(terms.scopes),
        )

    async def _serve(
        self, endpoint: Endpoint, prepared: Prepared, relay: Relay, audit: Audit
    ) -> None:
        """Wait for a place and deliver the answer while it is held."""
        async with self._gate.place(prepared.ticket, lambda: self._hold(prepared, relay)) as lease:
            dispatch = lease.dispatch
            # A fallback pool may have taken it.
            audit.pool = dispatch.pool
            audit.decision = "dispatched"
            audit.queued_s = dispatch.queued_s
            audit.degraded = dispatch.degraded
            audit.charge = charge = self._books.charge(audit, dispatch.pool)
            relay.before_end = lambda: self._books.complete(audit, lease.replica)
            relay.describe(dispatch, prepared.ticket.priority_class)
            spot = self.rules.spot(dispatch.pool)
            # What was reserved for the pool asked for holds where another takes it.
            bounds = (self.rules.spot(prepared.ticket.pool), spot)
            prepared = _short_enough(prepared, bounds, relay)
            try:
                async with nullcontext() if spot is None else _in_time(spot, audit):
                    await relay.run(
                        lease,
                        self._transport(dispatch.pool),
                        lambda held: prepared.call(
                            endpoint,
                            held.dispatch,
                            charge,
                            relay.delivery.attempts,
                            None if relay.cap is None else relay.cap.tokens,
                        ),
                    )
                audit.outcome = Outcome.COMPLETED
            finally:
                audit.replica = lease.replica
        if lease.usage.prompt_tokens:
            self._tickets.learn(prepared, dispatch.pool, lease.usage.prompt_tokens)

    def _hold(self, prepared: Prepared, relay: Relay) -> AbstractAsyncContextManager[None]:
        return hold(
            relay.stream,
            streamed=prepared.parsed.stream,
            comment_s=self._limits.hold_comment_s,
            plain_s=self._limits.hold_plain_s,
        )

    def caller(self, scope: Scope) -> KeyRecord:
        """Return the key that a request came with.

        Raises:
            Unavailable: no key table has come from Control yet.
            KeyRejected: no valid key.
        """
        if self.keys is None:
            raise Unavailable("The service is starting.", code="starting", retry_after_s=1.0)
        return authenticate(scope["headers"], self.keys, time.time())

    def _open_audit(self, endpoint: Endpoint, scope: Scope) -> Audit:
        request_id, label = request_names(scope)
        return Audit(request_id, endpoint.value, self._clock(), label)

    @contextmanager
    def _closing(self, audit: Audit) -> Iterator[None]:
        try:
            yield
        finally:
            audit.ended_at_s = self._clock()
            self._books.close(audit)
            self._on_audit(audit)

    async def _fail(self, relay: Relay, audit: Audit, error: ApiError) -> None:
        """End the response with an error; its headers tell the limits as every answer's do."""
        if audit.key is not None and not audit.rated:
            relay.add_headers(self._rates.headers(self.rules.scopes(audit.key, None)))
        audit.status = error.status
        audit.reason = audit.reason or error.code or error.type
        if audit.decision == "dispatched":
            audit.outcome = Outcome.FAILED
        await relay.fail(error)


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


def _short_enough(
    prepared: Prepared, bounds: Iterable[SpotLimits | None], relay: Relay
) -> Prepared:
    """Return the request with an answer no longer than spot nodes promise to last."""
    most = min((each.max_output_tokens for each in bounds if each is not None), default=None)
    if most is None:
        return prepared
    asked = prepared.parsed.max_tokens
    if asked is None or asked > most:
        relay.add_headers([(SPOT_HEADER, b"max_tokens=%d" % most)])
    return prepared.capped(most * prepared.parsed.choices)


@asynccontextmanager
async def _in_time(spot: SpotLimits, audit: Audit) -> AsyncIterator[None]:
    """Bound how long a request stays on a spot node.

    Raises:
        DeadlineExceeded: its time is over.
    """
    try:
        async with asyncio.timeout(spot.max_stream_s) as within:
            yield
    except TimeoutError:
        if not within.expired():
            raise
        audit.reason = "deadline"
        raise DeadlineExceeded(
            f"The response took longer than {spot.max_stream_s:g} seconds, which is what this "
            "model's spot nodes allow."
        ) from None


def _used_tokens(prepared: Prepared, audit: Audit) -> int:
    """Return what a request used of its token limits; nothing if no engine saw it."""
    usage, delivery = audit.delivery.usage, audit.delivery
    if usage is not None:
        return usage.prompt_tokens + usage.completion_tokens
    if audit.decision != "dispatched" or not delivery.output_tokens:
        return 0
    return prepared.prompt.expected_tokens + delivery.output_tokens


def _tag_header(scope: Scope) -> str:
    """Return what the client wants its usage summed up by, empty if it says nothing.

    Raises:
        InvalidRequest: it is no name; a bill under another one would surprise.
    """
    for name, value in scope["headers"]:
        if name == TAG_HEADER:
            if not _TAG.fullmatch(value):
                raise InvalidRequest(
                    "Invalid header 'x-headrace-tag': 1 to 64 letters, digits and ._:@- are "
                    "allowed, a letter or digit first.",
                    param="x-headrace-tag",
                )
            return str(value.decode("ascii"))
    return ""


def _session_header(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == SESSION_HEADER and 0 < len(value) <= SESSION_BYTES_MAX:
            return str(value.decode("latin-1"))
    return None
