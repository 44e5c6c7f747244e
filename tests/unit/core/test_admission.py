"""Reserves between classes, turns, measured service, and clients that ignore advice."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.admission import (
    ClientThrottle,
    ServiceRate,
    Shares,
    Turns,
    advice_s,
    hashed_fraction,
)
from serve_app.core.policy import PoolPolicy
from serve_app.core.types import KeyId, RequestId
from tests.properties import examples

CRITICAL, STANDARD, SHEDDABLE = 0, 1, 2
KEY = KeyId("key")


def shares(slots: int, *, headroom: float = 0.0) -> Shares:
    made = Shares()
    made.resize(slots, 100_000, 40_000, PoolPolicy(sparse_headroom_ratio=headroom))
    return made


def fill(made: Shares, rank: int) -> int:
    """Dispatch of one class until refused; return how many fitted."""
    count = 0
    while made.has_slot(rank, True):
        made.requests[rank] += 1
        count += 1
    return count


def test_critical_reserve_stays_free_of_everything_else() -> None:
    made = shares(100)
    assert fill(made, SHEDDABLE) == 20
    assert fill(made, STANDARD) == 50
    assert fill(made, CRITICAL) == 30


def test_critical_may_use_the_whole_knee_and_no_more() -> None:
    assert fill(shares(100), CRITICAL) == 100


def test_reserves_round_in_favour_of_work_on_small_pools() -> None:
    assert fill(shares(1), STANDARD) == 1
    assert fill(shares(1), SHEDDABLE) == 1
    assert fill(shares(3), STANDARD) == 3
    assert fill(shares(4), STANDARD) == 3


def test_token_shares_bind_like_slots_but_nothing_is_too_large_for_ever() -> None:
    made = shares(100)
    assert made.has_tokens(SHEDDABLE, True, 90_000, 0)
    made.tokens[SHEDDABLE] = 15_000
    assert made.has_tokens(SHEDDABLE, True, 5_000, 0)
    assert not made.has_tokens(SHEDDABLE, True, 5_001, 0)
    assert made.has_tokens(STANDARD, True, 55_000, 0)
    assert not made.has_tokens(STANDARD, True, 55_001, 0)
    assert made.has_tokens(CRITICAL, True, 10**9, 10**9)


def test_prompt_work_of_sheddable_is_bounded_too() -> None:
    made = shares(100)
    made.prefill[SHEDDABLE] = 8_000
    assert not made.has_tokens(SHEDDABLE, True, 10, 1)
    assert made.has_tokens(STANDARD, True, 10, 20_000)
    assert not made.has_tokens(STANDARD, True, 10, 20_001)


def test_headroom_is_left_for_sparse_tenants() -> None:
    made = shares(100, headroom=0.1)
    made.requests[STANDARD] = 63
    assert not made.has_slot(STANDARD, False)
    assert made.has_slot(STANDARD, True)
    made.requests[STANDARD] = 70
    assert not made.has_slot(STANDARD, True)


def dispatches(turns: Turns, total: int, *, aged: bool) -> list[int]:
    """Serve two classes that always wait, each request costing 10; return whose turns."""
    served = []
    for _ in range(total):
        rank = STANDARD if turns.goes_first(STANDARD, 10.0) else CRITICAL
        turns.dispatched(rank, 10.0, (10.0, aged) if rank == CRITICAL else None)
        served.append(rank)
    return served


def test_standard_gets_its_minimum_share_while_critical_floods() -> None:
    turns = Turns(PoolPolicy().classes)
    served = dispatches(turns, 1000, aged=False)
    assert served.count(STANDARD) == pytest.approx(100, abs=2)
    gaps = [i for i, rank in enumerate(served) if rank == STANDARD]
    assert max(b - a for a, b in pairwise(gaps)) <= 11


def test_aged_standard_gets_more() -> None:
    served = dispatches(Turns(PoolPolicy().classes), 1000, aged=True)
    assert served.count(STANDARD) == pytest.approx(200, abs=2)


def test_sheddable_is_owed_nothing_by_critical() -> None:
    turns = Turns(PoolPolicy().classes)
    for _ in range(1000):
        turns.dispatched(CRITICAL, 10.0, None)
    assert turns.owed(SHEDDABLE) == 0.0


def test_what_a_class_is_owed_is_bounded_and_lost_when_nobody_waits() -> None:
    turns = Turns(PoolPolicy().classes)
    for _ in range(1000):
        turns.dispatched(CRITICAL, 10.0, (25.0, False))
    assert 25.0 <= turns.owed(STANDARD) <= 25.0 + 10.0 / 9.0 + 1e-9
    turns.dispatched(CRITICAL, 10.0, None)
    assert turns.owed(STANDARD) == 0.0


def test_service_rate_ignores_time_without_anybody_waiting() -> None:
    rate = ServiceRate()
    assert rate.per_s(0.0) is None
    rate.begin(0.0)
    for second in range(1, 6):
        rate.served(100.0, float(second))
    rate.end(5.0)
    assert rate.per_s(5.0) == pytest.approx(100.0, rel=0.2)
    assert rate.per_s(500.0) == rate.per_s(5.0)
    rate.served(1e9, 500.0)
    assert rate.per_s(500.0) == rate.per_s(5.0)


def test_service_rate_follows_a_change() -> None:
    rate = ServiceRate()
    rate.begin(0.0)
    for tenth in range(1, 1200):
        rate.served(10.0 if tenth < 600 else 2.0, tenth / 10)
    assert rate.per_s(120.0) == pytest.approx(20.0, rel=0.1)


def test_client_that_obeys_is_never_throttled() -> None:
    throttle = ClientThrottle()
    for attempt in range(100):
        now_s = attempt * 10.0
        assert not throttle.refuses(KEY, STANDARD, RequestId(str(attempt)), now_s)
        throttle.refused(KEY, STANDARD, 9.9, now_s)


def test_client_that_ignores_the_advice_is_throttled_by_the_formula() -> None:
    throttle = ClientThrottle()
    throttle.refused(KEY, STANDARD, 60.0, 0.0)
    refused = sum(
        throttle.refuses(KEY, STANDARD, RequestId(f"r{number}"), 1.0) for number in range(1000)
    )
    expected = sum(number / (number + 1) for number in range(1, 1001))
    assert refused == pytest.approx(expected, rel=0.05)


def test_half_accepted_is_not_throttled() -> None:
    throttle = ClientThrottle()
    throttle.refused(KEY, STANDARD, 60.0, 0.0)
    for number in range(200):
        throttle.accepted(KEY, STANDARD, 1.0)
        assert not throttle.refuses(KEY, STANDARD, RequestId(f"a{number}"), 1.0)
        assert not throttle.refuses(KEY, STANDARD, RequestId(f"b{number}"), 1.0)


def test_classes_of_a_key_are_throttled_apart_and_tables_are_bounded() -> None:
    throttle = ClientThrottle(keys_max=10)
    for number in range(100):
        throttle.refused(KeyId(f"k{number}"), SHEDDABLE, 60.0, 0.0)
    assert len(throttle) == 10
    assert throttle.remaining_s(KeyId("k99"), SHEDDABLE, 20.0) == 40.0
    assert not throttle.refuses(KeyId("k99"), CRITICAL, RequestId("x"), 1.0)


@examples(100)
@given(wait_s=st.floats(0.0, 1e6), name=st.text(min_size=1, max_size=20))
def test_advice_is_bounded_spread_and_repeatable(wait_s: float, name: str) -> None:
    policy = PoolPolicy(retry_after_min_s=1.0, retry_after_max_s=60.0)
    advised_s = advice_s(wait_s, RequestId(name), policy)
    bounded_s = min(max(wait_s, 1.0), 60.0)
    assert bounded_s <= advised_s <= 1.25 * bounded_s
    assert advised_s == advice_s(wait_s, RequestId(name), policy)


def test_clients_refused_together_are_told_different_times() -> None:
    advised_s = {advice_s(4.0, RequestId(f"r{number}"), PoolPolicy()) for number in range(100)}
    assert len(advised_s) > 90
    assert max(advised_s) - min(advised_s) > 0.8


def test_hashed_fractions_are_spread_evenly() -> None:
    fractions = [hashed_fraction(RequestId(f"request-{number}")) for number in range(4000)]
    for quarter in range(4):
        share = sum(quarter / 4 <= each < (quarter + 1) / 4 for each in fractions) / 4000
        assert share == pytest.approx(0.25, abs=0.03)
