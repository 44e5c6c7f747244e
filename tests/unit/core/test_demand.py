"""What a pool is asked for, over routers that come, go and begin anew."""

from __future__ import annotations

from serve_app.core.demand import DemandCounter, DemandSum, PoolDemand
from serve_app.core.types import PoolName

CHAT = PoolName("chat")


def test_a_router_counts_up_and_says_what_it_has() -> None:
    counter = DemandCounter()
    for _ in range(3):
        counter.offered(CHAT)
    counter.ended(CHAT, 2.0)
    counter.ended(CHAT, 4.0)
    assert counter.read(CHAT, queued=1, in_flight=2) == PoolDemand(3, 2, 6.0, 1, 2)
    assert counter.read(PoolName("other"), queued=0, in_flight=0) == PoolDemand()


def test_the_sum_is_what_came_since_it_was_asked_last() -> None:
    pool = DemandSum()
    pool.hear("a", PoolDemand(10, 4, 8.0, 2, 4))
    pool.hear("b", PoolDemand(5, 0, 0.0, 0, 5))
    first = pool.take(1.0, 2, 1, 0.25)
    assert (first.offered, first.queued, first.in_flight, first.stay_s) == (15, 2, 9, 2.0)
    assert (first.now_s, first.ready, first.starting, first.kv_usage_ratio) == (1.0, 2, 1, 0.25)
    pool.hear("a", PoolDemand(12, 5, 11.0, 0, 1))
    second = pool.take(2.0, 2, 1, 0.25)
    assert (second.offered, second.queued, second.in_flight, second.stay_s) == (2, 0, 6, 3.0)
    third = pool.take(3.0, 2, 1, 0.25)
    assert (third.offered, third.stay_s) == (0, None)


def test_a_router_that_begins_anew_counts_from_nothing() -> None:
    pool = DemandSum()
    pool.hear("a", PoolDemand(100, 90, 90.0, 0, 10))
    pool.take(1.0, 1, 0, 0.0)
    pool.hear("a", PoolDemand(3, 1, 2.0, 0, 2))
    again = pool.take(2.0, 1, 0, 0.0)
    assert (again.offered, again.in_flight, again.stay_s) == (3, 2, 2.0)


def test_a_router_that_is_gone_holds_nothing_any_more() -> None:
    pool = DemandSum()
    pool.hear("a", PoolDemand(1, 0, 0.0, 7, 1))
    pool.keep({"b": None})
    gone = pool.take(1.0, 1, 0, 0.0)
    assert (gone.offered, gone.queued, gone.in_flight) == (1, 0, 0)
