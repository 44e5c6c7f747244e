"""Limits on the wire: OpenAI's headers, and who is told to come back when."""

from __future__ import annotations

import pytest

from serve_app.core.limits import (
    LimitKind,
    Limits,
    RateFigure,
    RateFigures,
    Refused,
    Scope,
    ScopeKind,
)
from serve_app.gateway.rate_headers import duration, rate_headers, rate_limited

SCOPES = (
    Scope(ScopeKind.KEY, "k", Limits(requests_per_min=10)),
    Scope(ScopeKind.TENANT, "t", Limits(3, 500, 2)),
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0ms"),
        (0.0101, "11ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (59.9999, "1m0s"),
        (360.0, "6m0s"),
        (3723.25, "1h2m3.25s"),
    ],
)
def test_durations_read_as_openai_writes_them_and_never_promise_too_early(
    seconds: float, text: str
) -> None:
    assert duration(seconds) == text


def test_headers_name_limit_remaining_and_reset_of_what_is_limited() -> None:
    figures = RateFigures(requests=RateFigure(60, 59, 1.0), tokens=None)

    assert rate_headers(figures) == [
        (b"x-ratelimit-limit-requests", b"60"),
        (b"x-ratelimit-remaining-requests", b"59"),
        (b"x-ratelimit-reset-requests", b"1s"),
    ]
    assert rate_headers(RateFigures()) == []
    both = rate_headers(RateFigures(RateFigure(1, 0, 2), RateFigure(9, 4, 3)))
    assert [name for name, _ in both][3:] == [
        b"x-ratelimit-limit-tokens",
        b"x-ratelimit-remaining-tokens",
        b"x-ratelimit-reset-tokens",
    ]


def test_whoever_may_come_back_is_told_when() -> None:
    refused = Refused(ScopeKind.TENANT, LimitKind.REQUESTS, 19.2, RateFigures())
    error = rate_limited(refused, SCOPES, 40)

    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    assert error.message == (
        "Rate limit reached for requests per minute of this tenant: limit 3. Try again in 19.2s."
    )
    assert dict(error.headers()) == {b"retry-after": b"20"}


def test_whoever_can_never_be_served_is_told_not_to_retry() -> None:
    refused = Refused(ScopeKind.TENANT, LimitKind.TOKENS, None, RateFigures())
    error = rate_limited(refused, SCOPES, 900)

    assert "limit 500, about 900 needed" in error.message
    assert dict(error.headers()) == {b"x-should-retry": b"false"}
