"""Breaker and retry budget: failures are left alone, and never multiplied."""

from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.breaker import Breaker, RetryBudget
from serve_app.core.policy import BreakerPolicy
from tests.properties import examples

POLICY = BreakerPolicy(failures=3, open_s=5.0, open_max_s=15.0)


def opened() -> Breaker:
    breaker = Breaker(POLICY)
    assert [breaker.failed(0.0) for _ in range(3)] == [False, False, True]
    return breaker


def test_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(POLICY)
    for _ in range(10):
        breaker.failed(0.0)
        breaker.failed(0.0)
        assert not breaker.succeeded()
    assert not breaker.is_open
    assert opened().closed_until_s == 5.0


def test_half_open_lets_a_single_probe_out() -> None:
    breaker = opened()
    assert breaker.closed_until_s <= 5.0
    breaker.sent()
    assert breaker.closed_until_s == inf
    assert breaker.succeeded()
    assert breaker.closed_until_s == -inf


def test_failed_probes_double_the_time_up_to_the_limit() -> None:
    breaker, now_s = opened(), 5.0
    for expected_s in (10.0, 15.0, 15.0):
        breaker.sent()
        assert not breaker.failed(now_s), "it was open already"
        assert breaker.closed_until_s - now_s == expected_s
        now_s = breaker.closed_until_s
    breaker.sent()
    breaker.succeeded()
    assert [breaker.failed(100.0) for _ in range(3)][-1]
    assert breaker.closed_until_s == 105.0


def test_a_probe_whose_client_left_allows_another() -> None:
    breaker = opened()
    breaker.sent()
    breaker.abandoned(7.0)
    assert breaker.closed_until_s == 7.0


def test_late_failures_do_not_prolong_an_open_breaker() -> None:
    breaker = opened()
    for now_s in (0.1, 0.2, 4.0):
        breaker.failed(now_s)
    assert breaker.closed_until_s == 5.0


@examples(100)
@given(retries=st.lists(st.booleans(), max_size=400))
def test_retries_never_exceed_the_reserve_and_their_share(retries: list[bool]) -> None:
    budget = RetryBudget(BreakerPolicy(retry_ratio=0.2, retry_reserve=10.0))
    dispatched = granted = 0
    for retry in retries:
        if retry:
            granted += budget.spend()
        else:
            budget.earn()
            dispatched += 1
        assert granted <= 10 + 0.2 * dispatched + 1e-9
        assert 0.0 <= budget.balance <= 10.0
