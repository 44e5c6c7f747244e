"""The rate limits of one router: taken before admission, settled when a request ends.

``core/limits.py`` decides; here its answers become headers and errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serve_app.core.limits import Limiter, Refused, Scope
from serve_app.core.types import RequestId
from serve_app.errors import RateLimited
from serve_app.gateway.rate_headers import Headers, rate_headers, rate_limited


class RouterLimits:
    """One per router. Limits are this router's: several routers each allow the whole."""

    def __init__(self, clock: Callable[[], float], on_refused: Callable[[Refused], None]) -> None:
        self._limiter = Limiter()
        self._clock = clock
        self._on_refused = on_refused

    def headers(self, scopes: Sequence[Scope]) -> Headers:
        """Return the headers of an answer that took nothing; none where nothing is limited."""
        return rate_headers(self._limiter.figures(scopes, self._clock())) if scopes else []

    def room_tokens(self, scopes: Sequence[Scope]) -> int | None:
        """Return how many tokens may be used now; None where tokens are not limited."""
        if not scopes:
            return None
        figure = self._limiter.figures(scopes, self._clock()).tokens
        return None if figure is None else figure.remaining

    def take(
        self, request_id: RequestId, scopes: Sequence[Scope], expected: int, upper: int
    ) -> tuple[Headers, RateLimited | None]:
        """Take a request from all its scopes or, with an error, from none; see ``settle``.

        ``upper`` tokens are taken, fewer where a whole limit is smaller than that but not
        smaller than ``expected``: an estimate alone keeps nobody out for ever.
        """
        if not scopes:
            return [], None
        limits = [each.limits.tokens_per_min for each in scopes]
        smallest = min((limit for limit in limits if limit is not None), default=upper)
        tokens = max(expected, min(upper, smallest))
        answer = self._limiter.take(request_id, scopes, tokens, self._clock())
        headers = rate_headers(answer.figures)
        if isinstance(answer, Refused):
            self._on_refused(answer)
            return headers, rate_limited(answer, scopes, tokens)
        return headers, None

    def settle(self, request_id: RequestId, tokens: int) -> None:
        """Correct what a request took to the ``tokens`` it used; unknown ids have no effect."""
        self._limiter.settle(request_id, tokens, self._clock())
