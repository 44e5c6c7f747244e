"""Circuit breaker per replica and retry budget per pool: failures must not multiply."""

from __future__ import annotations

from math import inf

from serve_app.core.policy import BreakerPolicy


class Breaker:
    """Leaves a failing replica alone, then lets one request try it.

    Closed until ``failures`` in a row; then open for ``open_s``; then half open: a single
    probe goes out. Its success closes the breaker, its failure opens it for twice as
    long, up to ``open_max_s``. ``closed_until_s`` tells a scan all it needs: nothing may
    be sent before that time (-inf when closed, inf while a probe is out).
    """

    __slots__ = ("_consecutive", "_open_s", "_policy", "closed_until_s", "is_open")

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._consecutive = 0
        self._open_s = policy.open_s
        self.is_open = False
        self.closed_until_s = -inf

    def configure(self, policy: BreakerPolicy) -> None:
        """Use another policy from now on; the state stays."""
        self._policy = policy
        self._open_s = min(self._open_s, policy.open_max_s)

    def sent(self) -> None:
        """A request was sent; if the breaker is half open, it is the probe."""
        if self.is_open:
            self.closed_until_s = inf

    def succeeded(self) -> bool:
        """A first token came. Return whether that closed the breaker."""
        self._consecutive = 0
        was_open, self.is_open = self.is_open, False
        self.closed_until_s = -inf
        self._open_s = self._policy.open_s
        return was_open

    def failed(self, now_s: float) -> bool:
        """The replica could not serve. Return whether that opened the breaker."""
        self._consecutive += 1
        if self.is_open:
            if self.closed_until_s == inf:
                self._open_s = min(2 * self._open_s, self._policy.open_max_s)
                self.closed_until_s = now_s + self._open_s
            return False
        if self._consecutive < self._policy.failures:
            return False
        self.is_open = True
        self.closed_until_s = now_s + self._open_s
        return True

    def abandoned(self, now_s: float) -> None:
        """A request ended without telling anything; if it was the probe, allow another."""
        if self.is_open and self.closed_until_s == inf:
            self.closed_until_s = now_s


class RetryBudget:
    """Retries a pool may cause: ``retry_ratio`` earned per dispatch, up to a reserve.

    Source: Finagle's RetryBudget; without one a dying pool multiplies its own load.
    """

    __slots__ = ("_balance", "_policy")

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._balance = policy.retry_reserve

    def configure(self, policy: BreakerPolicy) -> None:
        """Use another policy from now on; the balance stays within its reserve."""
        self._policy = policy
        self._balance = min(self._balance, policy.retry_reserve)

    @property
    def balance(self) -> float:
        """Retries that may be made now."""
        return self._balance

    def earn(self) -> None:
        """A request was dispatched for the first time."""
        self._balance = min(self._balance + self._policy.retry_ratio, self._policy.retry_reserve)

    def spend(self) -> bool:
        """Take one retry; return False and take nothing if there is none."""
        if self._balance < 1.0:
            return False
        self._balance -= 1.0
        return True
