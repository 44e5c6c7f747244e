"""Limits: exact to the token, all scopes or none, and nothing leaks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.limits import (
    Granted,
    Limiter,
    LimitKind,
    Limits,
    Refused,
    Scope,
    ScopeKind,
)
from serve_app.core.types import RequestId
from tests.properties import examples


def scope(kind: ScopeKind = ScopeKind.KEY, name: str = "k", **limits: int | None) -> Scope:
    return Scope(kind, name, Limits(**limits))


def take(limiter: Limiter, name: str, *scopes: Scope, tokens: int = 1, now_s: float = 0.0):  # type: ignore[no-untyped-def]
    return limiter.take(RequestId(name), scopes, tokens, now_s)


def test_a_minutes_worth_at_once_then_at_the_limits_rate() -> None:
    limiter, key = Limiter(), scope(requests_per_min=6)
    for number in range(6):
        assert isinstance(take(limiter, f"r{number}", key), Granted)
    refused = take(limiter, "more", key)
    assert isinstance(refused, Refused)
    assert (refused.scope, refused.limit) == (ScopeKind.KEY, LimitKind.REQUESTS)
    assert refused.retry_after_s == 10.0
    assert isinstance(take(limiter, "early", key, now_s=9.999), Refused)
    assert isinstance(take(limiter, "due", key, now_s=10.0), Granted)


def test_all_scopes_are_taken_or_none() -> None:
    limiter = Limiter()
    key = scope(requests_per_min=10, tokens_per_min=100)
    tenant = scope(ScopeKind.TENANT, "t", tokens_per_min=50)
    assert isinstance(take(limiter, "a", key, tenant, tokens=40), Granted)
    refused = take(limiter, "b", key, tenant, tokens=20)
    assert isinstance(refused, Refused)
    assert refused.scope is ScopeKind.TENANT
    assert refused.figures.requests is not None
    assert refused.figures.requests.remaining == 9
    assert isinstance(take(limiter, "c", key, tokens=60), Granted)


def test_figures_are_of_the_tightest_scope() -> None:
    limiter = Limiter()
    granted = take(
        limiter,
        "a",
        scope(requests_per_min=100, tokens_per_min=1000),
        scope(ScopeKind.MODEL, "m", requests_per_min=5),
        tokens=300,
    )
    assert isinstance(granted, Granted)
    requests, tokens = granted.figures.requests, granted.figures.tokens
    assert requests is not None
    assert tokens is not None
    assert (requests.limit, requests.remaining, requests.reset_s) == (5, 4, 12.0)
    assert (tokens.limit, tokens.remaining, tokens.reset_s) == (1000, 700, 18.0)


def test_unlimited_scopes_have_no_figures() -> None:
    granted = take(Limiter(), "a", scope())
    assert isinstance(granted, Granted)
    assert granted.figures.requests is granted.figures.tokens is None


def test_unused_tokens_are_given_back_and_overuse_is_owed() -> None:
    limiter, key = Limiter(), scope(tokens_per_min=100)
    take(limiter, "a", key, tokens=80)
    limiter.settle(RequestId("a"), 30, 0.0)
    assert isinstance(take(limiter, "b", key, tokens=70), Granted)
    limiter.settle(RequestId("b"), 170, 0.0)
    refused = take(limiter, "c", key, tokens=10)
    assert isinstance(refused, Refused)
    assert refused.retry_after_s == 66.0
    assert isinstance(take(limiter, "d", key, tokens=10, now_s=66.0), Granted)


def test_concurrency_is_freed_once_by_settling() -> None:
    limiter, key = Limiter(), scope(concurrent=1)
    assert isinstance(take(limiter, "a", key), Granted)
    refused = take(limiter, "b", key)
    assert isinstance(refused, Refused)
    assert refused.limit is LimitKind.CONCURRENT
    limiter.settle(RequestId("a"), 1, 1.0)
    limiter.settle(RequestId("a"), 1, 1.0)
    limiter.settle(RequestId("unknown"), 1, 1.0)
    assert isinstance(take(limiter, "c", key), Granted)
    assert isinstance(take(limiter, "d", key), Refused)
    assert limiter.open_requests == 1


@pytest.mark.parametrize("name", ["requests_per_min", "tokens_per_min", "concurrent"])
def test_limit_of_zero_refuses_for_ever(name: str) -> None:
    refused = take(Limiter(), "a", scope(**{name: 0}))
    assert isinstance(refused, Refused)
    assert refused.retry_after_s is None


def test_request_above_the_limit_can_never_be_served() -> None:
    refused = take(Limiter(), "a", scope(tokens_per_min=100), tokens=101)
    assert isinstance(refused, Refused)
    assert refused.retry_after_s is None


def test_changed_limit_keeps_what_was_used() -> None:
    limiter = Limiter()
    take(limiter, "a", scope(tokens_per_min=100), tokens=60)
    figures = limiter.figures([scope(tokens_per_min=200)], 0.0)
    assert figures.tokens is not None
    assert figures.tokens.remaining == 140
    assert figures.tokens.reset_s == 18.0
    lowered = limiter.figures([scope(tokens_per_min=10)], 0.0)
    assert lowered.tokens is not None
    assert lowered.tokens.remaining == 0


def test_clock_running_backwards_gives_nothing_away() -> None:
    limiter, key = Limiter(), scope(requests_per_min=1)
    take(limiter, "a", key, now_s=100.0)
    refused = take(limiter, "b", key, now_s=-1e6)
    assert isinstance(refused, Refused)
    assert refused.retry_after_s == 60.0


def test_tables_are_bounded_and_keep_scopes_with_open_requests() -> None:
    limiter = Limiter(scopes_max=100)
    kept = scope(ScopeKind.TENANT, "kept", concurrent=1)
    take(limiter, "open", kept)
    for number in range(10_000):
        take(limiter, f"r{number}", scope(ScopeKind.USER, f"u{number}", requests_per_min=9))
        limiter.settle(RequestId(f"r{number}"), 1, 0.0)
        assert len(limiter) <= 101
    assert isinstance(take(limiter, "again", kept), Refused)


@examples(150)
@given(
    limit=st.integers(1, 100),
    steps=st.lists(
        st.tuples(st.floats(0.0, 20.0), st.integers(0, 60), st.integers(0, 60)), max_size=60
    ),
)
def test_granted_tokens_never_exceed_a_minutes_worth_plus_the_rate(
    limit: int, steps: list[tuple[float, int, int]]
) -> None:
    """Used tokens stay below limit x (1 + minutes), whatever is taken and given back."""
    limiter, key, now_s, used = Limiter(), scope(tokens_per_min=limit), 0.0, 0
    for number, (elapsed_s, tokens, returned) in enumerate(steps):
        now_s += elapsed_s
        answer = take(limiter, f"r{number}", key, tokens=tokens, now_s=now_s)
        if isinstance(answer, Granted):
            kept = max(0, tokens - returned)
            limiter.settle(RequestId(f"r{number}"), kept, now_s)
            used += kept
            assert used <= limit * (1 + now_s / 60.0) + 1e-6
        elif answer.retry_after_s is not None:
            assert answer.retry_after_s > 0
    assert limiter.open_requests == 0
