"""Limits of requests and tokens per minute and of concurrent requests, per scope.

A request names all its scopes (key, user, tenant, model); it takes from all of them or
from none. Tokens are taken by estimate and settled by count; what was used beyond the
estimate is owed, and delays the next requests.

A router holds a part of each limit (``core/parts.py``). Where the parts suffice, or the
router holds the whole limit, it decides at once and alone; otherwise ``Short`` says what
has to be got first (``core/holder.py``).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from serve_app.core.calendar import NS_PER_S
from serve_app.core.parts import (
    MINUTE_NS,
    WHOLE,
    Part,
    RateFigure,
    RatePart,
    SlotPart,
)
from serve_app.core.types import RequestId

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
class RateFigures:
    """The tightest scope's figures for OpenAI's headers; None where nothing is limited."""

    requests: RateFigure | None = None
    tokens: RateFigure | None = None


class SliceKey(NamedTuple):
    """Names one limit: of what, whose, and what it counts."""

    scope: ScopeKind
    id: str
    limit: LimitKind


class Moved(NamedTuple):
    """Parts of a limit on their way, with the fill that lies on them (0 for concurrency)."""

    key: SliceKey
    parts: int
    fill: int


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


class Lack(NamedTuple):
    """An ``amount`` of a limit for which the router's parts do not suffice."""

    key: SliceKey
    amount: int
    limit: int


@dataclass(frozen=True, slots=True)
class Short:
    """Nothing was taken: the router's parts do not suffice, others' may."""

    lacks: tuple[Lack, ...]


class _State:
    """A scope's parts."""

    __slots__ = ("concurrent", "requests", "tokens")

    def __init__(self, parts: int) -> None:
        self.requests = RatePart(parts)
        self.tokens = RatePart(parts)
        self.concurrent = SlotPart(parts)

    def part(self, limit: LimitKind) -> Part:
        if limit is LimitKind.REQUESTS:
            return self.requests
        return self.tokens if limit is LimitKind.TOKENS else self.concurrent

    def asks(self, limits: Limits, tokens: int) -> Iterator[tuple[LimitKind, Part, int, int]]:
        """Yield what a request takes: the limit's kind, the part, the amount, the limit."""
        if limits.requests_per_min is not None:
            yield LimitKind.REQUESTS, self.requests, 1, limits.requests_per_min
        if limits.tokens_per_min is not None:
            yield LimitKind.TOKENS, self.tokens, tokens, limits.tokens_per_min
        if limits.concurrent is not None:
            yield LimitKind.CONCURRENT, self.concurrent, 1, limits.concurrent


class Limiter:
    """The limits of one router. Pure: time is passed in and never runs backwards inside.

    A ``shared`` one begins without any parts. The least recently used of more than
    ``scopes_max`` scopes are forgotten, unless requests of theirs are open; the parts they
    had are in ``dropped`` until somebody takes them.
    """

    def __init__(self, scopes_max: int = 100_000, *, shared: bool = False) -> None:
        assert scopes_max >= 1
        self._scopes_max = scopes_max
        self._parts = 0 if shared else WHOLE
        self._states: OrderedDict[tuple[ScopeKind, str], _State] = OrderedDict()
        self._open: dict[RequestId, tuple[tuple[Scope, ...], int]] = {}
        self._now_ns = 0
        self.dropped: deque[Moved] = deque(maxlen=scopes_max)

    def __len__(self) -> int:
        return len(self._states)

    @property
    def open_requests(self) -> int:
        """Granted requests that are not settled."""
        return len(self._open)

    def take(
        self, request_id: RequestId, scopes: Sequence[Scope], tokens: int, now_s: float
    ) -> Granted | Refused | Short:
        """Take one request, ``tokens`` >= 0 and one concurrent slot of every scope, or nothing.

        Ids are made by the server; one that is open may not be taken again (asserted).
        """
        assert request_id not in self._open, "a request takes its limits once"
        assert tokens >= 0
        now_ns = self._advance(now_s)
        states = [self._state(scope) for scope in scopes]
        obstacle = self._obstacle(scopes, states, tokens, now_ns)
        if isinstance(obstacle, Short):
            return obstacle
        if obstacle is not None:
            scope, limit, wait_ns = obstacle
            retry_after_s = None if wait_ns is None else wait_ns / NS_PER_S
            figures = self._figures(scopes, states, now_ns)
            return Refused(scope.kind, limit, retry_after_s, figures)
        for scope, state in zip(scopes, states, strict=True):
            limits = scope.limits
            if limits.requests_per_min is not None:
                state.requests.add(1, limits.requests_per_min, now_ns)
            if limits.tokens_per_min is not None:
                state.tokens.add(tokens, limits.tokens_per_min, now_ns)
            state.concurrent.add(1, now_ns)
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
            state.concurrent.add(-1, now_ns)
            limit = scope.limits.tokens_per_min
            if limit is not None:
                state.tokens.add(tokens - taken, limit, now_ns)

    def figures(self, scopes: Sequence[Scope], now_s: float) -> RateFigures:
        """Return the header figures of a request's scopes without taking anything."""
        now_ns = self._advance(now_s)
        return self._figures(scopes, [self._state(scope) for scope in scopes], now_ns)

    def room_tokens(self, scopes: Sequence[Scope], now_s: float) -> int | None:
        """Return how many tokens may be used now; None where no scope limits them."""
        now_ns = self._advance(now_s)
        rooms = [
            self._state(scope).tokens.figure(scope.limits.tokens_per_min, now_ns).remaining
            for scope in scopes
            if scope.limits.tokens_per_min is not None
        ]
        return min(rooms, default=None)

    def held(self, key: SliceKey) -> int:
        """Return how many parts of a limit are here."""
        state = self._states.get((key.scope, key.id))
        return 0 if state is None else state.part(key.limit).parts

    def missing(self, lack: Lack, now_s: float) -> int:
        """Return how many free parts are wanting for an amount."""
        state = self._states.get((lack.key.scope, lack.key.id))
        if state is None:
            return 0
        part = state.part(lack.key.limit)
        return part.missing(lack.amount, lack.limit, self._advance(now_s))

    def give(self, key: SliceKey, parts: int, need: int, now_s: float) -> Moved:
        """Hand over ``parts`` of a limit, and ``need`` free ones, as far as there are."""
        state = self._states.get((key.scope, key.id))
        if state is None:
            return Moved(key, 0, 0)
        return Moved(key, *state.part(key.limit).give(parts, need, self._advance(now_s)))

    def receive(self, moved: Moved, now_s: float) -> None:
        """Take over parts; those of a scope that is no longer known are dropped again."""
        state = self._states.get((moved.key.scope, moved.key.id))
        if state is None:
            self.dropped.append(moved)
            return
        state.part(moved.key.limit).receive(moved.parts, moved.fill, self._advance(now_s))

    def cut(self, key: SliceKey, parts: int, now_s: float) -> None:
        """Keep at most ``parts`` of a limit."""
        state = self._states.get((key.scope, key.id))
        if state is not None:
            state.part(key.limit).cut(parts, self._advance(now_s))

    def deny(self, key: SliceKey, missing: int, now_s: float) -> None:
        """Refuse what does not fit for a moment: nobody has anything free."""
        state = self._states.get((key.scope, key.id))
        if state is not None:
            state.part(key.limit).deny(missing, self._advance(now_s))

    def holdings(self, now_s: float) -> Iterator[Moved]:
        """Yield all parts held here, and none of the limits that were used within a minute."""
        now_ns = self._advance(now_s)
        for (scope, name), state in self._states.items():
            for limit in LimitKind:
                part = state.part(limit)
                recent = part.touched_ns is not None and now_ns - part.touched_ns <= MINUTE_NS
                if part.parts or recent:
                    yield Moved(SliceKey(scope, name, limit), part.parts, 0)

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
            if kept.concurrent.used:
                self._states.move_to_end(oldest)
            else:
                self._drop(oldest, kept)
        state = self._states[name] = _State(self._parts)
        return state

    def _drop(self, name: tuple[ScopeKind, str], state: _State) -> None:
        del self._states[name]
        if self._parts:
            return
        for limit in LimitKind:
            part = state.part(limit)
            if part.parts:
                moved, fill = part.give(part.parts, part.parts, self._now_ns)
                self.dropped.append(Moved(SliceKey(*name, limit), moved, fill))

    def _obstacle(
        self, scopes: Sequence[Scope], states: Sequence[_State], tokens: int, now_ns: int
    ) -> tuple[Scope, LimitKind, int | None] | Short | None:
        """Return the limit that keeps the request out longest, or what has to be got first."""
        worst: tuple[Scope, LimitKind, int | None] | None = None
        lacks: list[Lack] = []
        for scope, state in zip(scopes, states, strict=True):
            for limit, part, amount, most in state.asks(scope.limits, tokens):
                wait_ns: int | None = None
                if amount <= most and most:
                    missing = part.missing(amount, most, now_ns)
                    if not missing:
                        continue
                    if part.parts < WHOLE and not part.denied(now_ns):
                        key = SliceKey(scope.kind, scope.id, limit)
                        lacks.append(Lack(key, amount, most))
                        continue
                    wait_ns = part.wait_ns(missing)
                if worst is not None and worst[2] is None:
                    continue
                if worst is None or wait_ns is None or wait_ns > (worst[2] or 0):
                    worst = (scope, limit, wait_ns)
        if worst is None and lacks:
            return Short(tuple(lacks))
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
