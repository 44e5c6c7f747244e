"""The limits of a request: taken before admission, settled when the request ends.

``core/limits.py`` decides; here its answers become headers and errors. Several routers
share each limit: what a router lacks is fetched from the others through Control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from serve_app.core.limits import Granted, Limiter, Refused, Scope, Short
from serve_app.core.types import RequestId
from serve_app.errors import ApiError, Unavailable
from serve_app.gateway.rate_headers import Headers, rate_headers, rate_limited
from serve_app.slices_link import SlicesLink

RETRY_AFTER_S = 1.0

Taken = tuple[Headers, ApiError | None]


class RouterLimits:
    """One per router. Without ``slices`` there is no other router: all is held here."""

    def __init__(
        self,
        clock: Callable[[], float],
        on_refused: Callable[[Refused], None],
        slices: SlicesLink | None = None,
        on_fetched: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``on_fetched`` is told how each request that had to wait for its limits fared."""
        self._slices = slices
        self._limiter = Limiter() if slices is None else slices.limiter
        self._clock = clock
        self._on_refused = on_refused
        self._on_fetched = on_fetched

    def headers(self, scopes: Sequence[Scope]) -> Headers:
        """Return the headers of an answer that took nothing; none where nothing is limited."""
        return rate_headers(self._limiter.figures(scopes, self._clock())) if scopes else []

    def room_tokens(self, scopes: Sequence[Scope]) -> int | None:
        """Return how many tokens may be used now; None where tokens are not limited."""
        return self._limiter.room_tokens(scopes, self._clock())

    def take(
        self, request_id: RequestId, scopes: Sequence[Scope], expected: int, upper: int
    ) -> Taken | Short:
        """Take a request from all its scopes or, with an error, from none; see ``settle``.

        ``upper`` tokens are taken, fewer where a whole limit is smaller than that but not
        smaller than ``expected``: an estimate alone keeps nobody out for ever. Nothing is
        awaited where the router's parts of the limits suffice or are the whole; otherwise
        the answer is Short: ``fetch`` then.
        """
        if not scopes:
            return [], None
        tokens = _tokens(scopes, expected, upper)
        answer = self._limiter.take(request_id, scopes, tokens, self._clock())
        return answer if isinstance(answer, Short) else self._taken(answer, scopes, tokens)

    async def fetch(
        self,
        request_id: RequestId,
        scopes: Sequence[Scope],
        expected: int,
        upper: int,
        *,
        short: Short,
    ) -> Taken:
        """Get what is ``short`` from the other routers, then take as ``take`` does.

        The error is Unavailable where that cannot be found out: a limit that may not be
        used up is never said to be.
        """
        assert self._slices is not None, "whoever holds all lacks nothing"
        tokens = _tokens(scopes, expected, upper)
        answer = await self._slices.fetch(
            request_id,
            short,
            lambda: self._limiter.take(request_id, scopes, tokens, self._clock()),
        )
        if answer is not None:
            self._on_fetched("granted" if isinstance(answer, Granted) else "refused")
            return self._taken(answer, scopes, tokens)
        self._on_fetched("unavailable")
        return self.headers(scopes), Unavailable(
            "The limits of this key cannot be checked at the moment; retry later.",
            code="limits_unavailable",
            retry_after_s=RETRY_AFTER_S,
        )

    def settle(self, request_id: RequestId, tokens: int) -> None:
        """Correct what a request took to the ``tokens`` it used; unknown ids have no effect."""
        self._limiter.settle(request_id, tokens, self._clock())

    def _taken(self, answer: Granted | Refused, scopes: Sequence[Scope], tokens: int) -> Taken:
        headers = rate_headers(answer.figures)
        if isinstance(answer, Refused):
            self._on_refused(answer)
            return headers, rate_limited(answer, scopes, tokens)
        return headers, None


def _tokens(scopes: Sequence[Scope], expected: int, upper: int) -> int:
    limits = [each.limits.tokens_per_min for each in scopes]
    smallest = min((limit for limit in limits if limit is not None), default=upper)
    return max(expected, min(upper, smallest))
