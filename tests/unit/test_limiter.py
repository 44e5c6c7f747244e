"""A router's limits: what is taken, what is given back, what the client reads."""

from __future__ import annotations

from serve_app.core.limits import Limits, Refused, Scope, ScopeKind
from serve_app.core.types import RequestId
from serve_app.limiter import RouterLimits


class Clock:
    """Monotonic seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def scope(kind: ScopeKind = ScopeKind.TENANT, name: str = "t", **limits: int) -> Scope:
    return Scope(kind, name, Limits(**limits))


def made(clock: Clock | None = None) -> tuple[RouterLimits, list[Refused]]:
    refused: list[Refused] = []
    return RouterLimits(clock or Clock(), refused.append), refused


def test_without_limits_nothing_is_taken_told_or_kept() -> None:
    limits, _ = made()
    assert limits.take(RequestId("a"), (), 10, 10) == ([], None)
    assert limits.headers(()) == []
    assert limits.room_tokens(()) is None
    limits.settle(RequestId("a"), 5)


def test_all_scopes_are_taken_or_none() -> None:
    limits, refused = made()
    wide = scope(ScopeKind.KEY, "k", requests_per_min=10)
    narrow = scope(requests_per_min=1)
    assert limits.take(RequestId("a"), (wide, narrow), 1, 1)[1] is None
    headers, error = limits.take(RequestId("b"), (wide, narrow), 1, 1)

    assert error is not None
    assert error.code == "rate_limit_exceeded"
    assert dict(headers)[b"x-ratelimit-remaining-requests"] == b"0"
    assert [each.scope for each in refused] == [ScopeKind.TENANT]
    assert dict(limits.headers((wide,)))[b"x-ratelimit-remaining-requests"] == b"9"


def test_the_estimate_is_corrected_to_what_was_used() -> None:
    limits, _ = made()
    tokens = (scope(tokens_per_min=1000),)
    limits.take(RequestId("a"), tokens, 100, 400)
    assert limits.room_tokens(tokens) == 600
    limits.settle(RequestId("a"), 150)
    assert limits.room_tokens(tokens) == 850
    limits.settle(RequestId("a"), 0)
    assert limits.room_tokens(tokens) == 850


def test_an_upper_bound_alone_keeps_nobody_out_for_ever() -> None:
    limits, _ = made()
    tokens = (scope(tokens_per_min=100),)
    assert limits.take(RequestId("a"), tokens, 60, 400)[1] is None
    assert limits.room_tokens(tokens) == 0
    limits.settle(RequestId("a"), 55)
    error = limits.take(RequestId("b"), tokens, 101, 400)[1]
    assert error is not None
    assert error.should_retry is False


def test_what_was_used_beyond_the_estimate_is_owed() -> None:
    clock = Clock()
    limits, _ = made(clock)
    tokens = (scope(tokens_per_min=60),)
    limits.take(RequestId("a"), tokens, 10, 10)
    limits.settle(RequestId("a"), 90)
    clock.now_s += 20
    error = limits.take(RequestId("b"), tokens, 10, 10)[1]
    assert error is not None
    assert error.retry_after_s == 20.0
    clock.now_s += 20
    assert limits.take(RequestId("b"), tokens, 10, 10)[1] is None


def test_zero_allows_nothing_and_says_not_to_retry() -> None:
    limits, _ = made()
    for kind in ("requests_per_min", "tokens_per_min", "concurrent"):
        error = limits.take(RequestId("a"), (scope(**{kind: 0}),), 5, 5)[1]
        assert error is not None
        assert (error.retry_after_s, error.should_retry) == (None, False)


def test_ten_thousand_tenants_in_a_minute_stay_bounded() -> None:
    limits, _ = made()
    for number in range(10_000):
        name = RequestId(f"r{number}")
        assert limits.take(name, (scope(name=f"t{number}", requests_per_min=1),), 1, 1)[1] is None
        limits.settle(name, 1)
    assert len(limits._limiter) <= 100_000
    assert limits._limiter.open_requests == 0
