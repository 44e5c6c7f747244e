"""OpenAI's rate limit headers, and the error of whoever is over a limit."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from serve_app.core.limits import LimitKind, RateFigures, Refused, Scope
from serve_app.errors import RateLimited

Headers = list[tuple[bytes, bytes]]

_COUNTED = {
    LimitKind.REQUESTS: "requests per minute",
    LimitKind.TOKENS: "tokens per minute",
    LimitKind.CONCURRENT: "concurrent requests",
}


def rate_headers(figures: RateFigures) -> Headers:
    """Return ``x-ratelimit-{limit,remaining,reset}-{requests,tokens}`` of the tightest scopes."""
    headers: Headers = []
    for name, figure in (("requests", figures.requests), ("tokens", figures.tokens)):
        if figure is not None:
            headers += [
                (b"x-ratelimit-limit-" + name.encode(), str(figure.limit).encode()),
                (b"x-ratelimit-remaining-" + name.encode(), str(figure.remaining).encode()),
                (b"x-ratelimit-reset-" + name.encode(), duration(figure.reset_s).encode()),
            ]
    return headers


def rate_limited(refused: Refused, scopes: Sequence[Scope], tokens: int) -> RateLimited:
    """Return the error of a request that its limits refused; ``tokens`` is what it asked for."""
    scope = next(each for each in scopes if each.kind is refused.scope)
    limits = scope.limits
    limit = {
        LimitKind.REQUESTS: limits.requests_per_min,
        LimitKind.TOKENS: limits.tokens_per_min,
        LimitKind.CONCURRENT: limits.concurrent,
    }[refused.limit]
    what = f"{_COUNTED[refused.limit]} of this {refused.scope.value}: limit {limit}"
    if refused.retry_after_s is not None:
        return RateLimited(
            f"Rate limit reached for {what}. Try again in {duration(refused.retry_after_s)}.",
            retry_after_s=refused.retry_after_s,
        )
    asked = f", about {tokens} needed" if refused.limit is LimitKind.TOKENS and limit else ""
    return RateLimited(
        f"Rate limit for {what}{asked}; this request can never be served within it.",
        should_retry=False,
    )


def duration(seconds: float) -> str:
    """Return a duration as OpenAI writes it: ``850ms``, ``7.5s``, ``6m0s``, ``2h0m0s``."""
    milliseconds = ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms"
    minutes, rest_ms = divmod(milliseconds, 60_000)
    text = f"{rest_ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if not minutes:
        return text
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
