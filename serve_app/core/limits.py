"""Rate limits in integers: requests and tokens per minute and concurrent requests, per scope.

GCRA (the generic cell rate algorithm; Redis-cell, Envoy and Stripe use it): a bucket of one
minute's worth that drains at the limit's rate. Its fill is kept exactly, in units of
1/60e9 of a request or token: taking n adds n x 60e9, each nanosecond drains ``limit``.

A request names all its scopes (key, user, tenant, model); it takes from all of them or
from none. Tokens are taken by estimate and settled by count; what was used beyond the
estimate is owed, and delays the next requests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from serve_app.core.types import RequestId

MINUTE_NS = 60_000_000_000
NS_PER_S = 1_000_000_000
EVICTION_LOOKS = 16


class ScopeKind(StrEnum):
    """What a limit is counted by."""

    KEY = "key"
    USER = "user"
    TENANT = "tenant"
    MODEL = "model"


class LimitKind(StrEnum):
    """What a limit counts."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    CONCURRENT = "concurrent"


@dataclass(frozen=True, slots=True)
class Limits:
    """What a scope may use; None is unlimited, 0 refuses everything."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    concurrent: int | None = None

    def __post_init__(self) -> None:
        for limit in (self.requests_per_min, self.tokens_per_min, self.concurrent):
            assert limit is None or limit >= 0


@dataclass(frozen=True, slots=True)
class Scope:
    """One counted thing: a kind, its id, and its limits as they are now."""

    kind: ScopeKind
    id: str
    limits: Limits


@dataclass(frozen=True, slots=True)
class RateFigure:
    """One ``x-ratelimit-*`` triple: of ``limit``, ``remaining`` can be used now.

    ``reset_s`` is when the whole limit is available again.
    """

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class RateFigures:
    """The tightest scope's figures for OpenAI's headers; None where nothing is limited."""

    requests: RateFigure | None = None
    tokens: RateFigure | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """The request took its share of every scope; end it with ``settle``."""

    figures: RateFigures


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was taken. ``retry_after_s`` is None if waiting cannot help.

    ``scope`` and ``limit`` name the one that keeps the request out longest.
    """

    scope: ScopeKind
    limit: LimitKind
    retry_after_s: float | None
    figures: RateFigures


class _Bucket:
    """A GCRA bucket. ``_zero`` is the time it would be empty, scaled by the limit."""

    __slots__ = ("_limit", "_zero")

    def __init__(self) -> None:
        self._limit = 0
        self._zero = 0

    def used(self, limit: int, now_ns: int) -> int:
        """Return the fill in units; a changed limit keeps what was used."""
        fill = max(0, self._zero - now_ns * self._limit)
        self._limit = limit
        self._zero = fill + now_ns * limit
        return fill

    def add(self, amount: int, limit: int, now_ns: int) -> None:
        """Take ``amount`` >= 0, or give back -``amount``, never below empty."""
        fill = self.used(limit, now_ns)
        self._zero += max(-fill, amount * MINUTE_NS)

    def wait_ns(self, amount: int, limit: int, now_ns: int) -> int | None:
        """Return when ``amount`` may be taken: 0 now, None never."""
        if amount > limit:
            return None
        over = self.used(limit, now_ns) + (amount - limit) * MINUTE_NS
        return -(-over // limit) if over > 0 else 0

    def figure(self, limit: int, now_ns: int) -> RateFigure:
        fill = self.used(limit, now_ns)
        remaining = max(0, (limit * MINUTE_NS - fill) // MINUTE_NS)
        return RateFigure(limit, remaining, fill / limit / NS_PER_S if limit else 0.0)


class _State:
    __slots__ = ("concurrent", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = _Bucket()
        self.tokens = _Bucket()
        self.concurrent = 0


class Limiter:
    """The limits of one router. Pure: time is passed in and never runs backwards inside.

    The least recently used of more than ``scopes_max`` scopes are forgotten, unless
    requests of theirs are open.
    """

    def __init__(self, scopes_max: int = 100_000) -> None:
        assert scopes_max >= 1
        self._scopes_max = scopes_max
        self._states: OrderedDict[tuple[ScopeKind, str], _State] = OrderedDict()
        self._open: dict[RequestId, tuple[tuple[Scope, ...], int]] = {}
        self._now_ns = 0

    def __len__(self) -> int:
        return len(self._states)

    @property
    def open_requests(self) -> int:
        """Granted requests that are not settled."""
        return len(self._open)

    def take(
        self, request_id: RequestId, scopes: Sequence[Scope], tokens: int, now_s: float
    ) -> Granted | Refused:
        """Take one request, ``tokens`` >= 0 and one concurrent slot of every scope, or nothing.

        Ids are made by the server; one that is open may not be taken again (asserted).
        """
        assert request_id not in self._open, "a request takes its limits once"
        assert tokens >= 0
        now_ns = self._advance(now_s)
        states = [self._state(scope) for scope in scopes]
        refused = self._refusal(scopes, states, tokens, now_ns)
        if refused is not None:
            scope, limit, wait_ns = refused
            retry_after_s = None if wait_ns is None else wait_ns / NS_PER_S
            figures = self._figures(scopes, states, now_ns)
            return Refused(scope.kind, limit, retry_after_s, figures)
        for scope, state in zip(scopes, states, strict=True):
            limits = scope.limits
            if limits.requests_per_min is not None:
                state.requests.add(1, limits.requests_per_min, now_ns)
            if limits.tokens_per_min is not None:
                state.tokens.add(tokens, limits.tokens_per_min, now_ns)
            state.concurrent += 1
        self._open[request_id] = (tuple(scopes), tokens)
        return Granted(self._figures(scopes, states, now_ns))

    def settle(self, request_id: RequestId, tokens: int, now_s: float) -> None:
        """End a granted request that used ``tokens`` >= 0; unknown ids have no effect."""
        opened = self._open.pop(request_id, None)
        if opened is None:
            return
        now_ns = self._advance(now_s)
        scopes, taken = opened
        for scope in scopes:
            state = self._state(scope)
            state.concurrent -= 1
            assert state.concurrent >= 0
            limit = scope.limits.tokens_per_min
            if limit is not None:
                state.tokens.add(tokens - taken, limit, now_ns)

    def figures(self, scopes: Sequence[Scope], now_s: float) -> RateFigures:
        """Return the header figures of a request's scopes without taking anything."""
        now_ns = self._advance(now_s)
        return self._figures(scopes, [self._state(scope) for scope in scopes], now_ns)

    def _advance(self, now_s: float) -> int:
        self._now_ns = max(self._now_ns, int(now_s * NS_PER_S))
        return self._now_ns

    def _state(self, scope: Scope) -> _State:
        name = (scope.kind, scope.id)
        state = self._states.get(name)
        if state is not None:
            self._states.move_to_end(name)
            return state
        looks = EVICTION_LOOKS
        while len(self._states) >= self._scopes_max and looks:
            looks -= 1
            oldest, kept = next(iter(self._states.items()))
            if kept.concurrent:
                self._states.move_to_end(oldest)
            else:
                del self._states[oldest]
        state = self._states[name] = _State()
        return state

    def _refusal(
        self, scopes: Sequence[Scope], states: Sequence[_State], tokens: int, now_ns: int
    ) -> tuple[Scope, LimitKind, int | None] | None:
        """Return the limit that keeps the request out longest, or None if none does."""
        worst: tuple[Scope, LimitKind, int | None] | None = None
        for scope, state in zip(scopes, states, strict=True):
            limits = scope.limits
            waits: list[tuple[LimitKind, int | None]] = []
            if limits.requests_per_min is not None:
                wait_ns = state.requests.wait_ns(1, limits.requests_per_min, now_ns)
                waits.append((LimitKind.REQUESTS, wait_ns))
            if limits.tokens_per_min is not None:
                wait_ns = state.tokens.wait_ns(tokens, limits.tokens_per_min, now_ns)
                waits.append((LimitKind.TOKENS, wait_ns))
            if limits.concurrent is not None and state.concurrent >= limits.concurrent:
                waits.append((LimitKind.CONCURRENT, NS_PER_S if limits.concurrent else None))
            for limit, wait_ns in waits:
                if wait_ns == 0 or (worst is not None and worst[2] is None):
                    continue
                if worst is None or wait_ns is None or wait_ns > (worst[2] or 0):
                    worst = (scope, limit, wait_ns)
        return worst

    def _figures(
        self, scopes: Sequence[Scope], states: Sequence[_State], now_ns: int
    ) -> RateFigures:
        requests: RateFigure | None = None
        tokens: RateFigure | None = None
        for scope, state in zip(scopes, states, strict=True):
            limits = scope.limits
            if limits.requests_per_min is not None:
                figure = state.requests.figure(limits.requests_per_min, now_ns)
                if requests is None or figure.remaining < requests.remaining:
                    requests = figure
            if limits.tokens_per_min is not None:
                figure = state.tokens.figure(limits.tokens_per_min, now_ns)
                if tokens is None or figure.remaining < tokens.remaining:
                    tokens = figure
        return RateFigures(requests, tokens)
