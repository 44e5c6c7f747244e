"""Control's deciding: bounds from engines, demand from routers, one decision a period."""

from __future__ import annotations

import logging

import pytest

from serve_app.core.demand import EngineNews, PoolDemand
from serve_app.core.scaling import Decision, ScalingPolicy
from serve_app.core.types import PoolName
from serve_app.scaler import Scaler

CHAT = PoolName("chat")
POLICY = ScalingPolicy(knee_concurrency=10.0, safety_ratio=1.0, cold_start_s=0.0, idle_s=60.0)


class Desk:
    """A scaler under a clock that a test moves, with one router and some engines."""

    def __init__(self, engines: int = 1, bounds: tuple[int, int] | None = (0, 8)) -> None:
        self.now_s = 0.0
        self.offered = self.ended = 0
        self.decisions: list[Decision] = []
        self.engines = engines
        self.bounds = bounds
        self.scaler = Scaler(
            lambda: self.now_s,
            lambda: 5e8 + self.now_s,
            lambda _, made, cold_start_s: self.decided(made, cold_start_s),
        )

    def run(self, for_s: int, rate_per_s: int, *, queued: int = 0) -> None:
        for _ in range(for_s):
            self.now_s += 1.0
            self.offered += rate_per_s
            self.ended += rate_per_s
            told = PoolDemand(self.offered, self.ended, float(self.ended), queued, rate_per_s)
            self.scaler.hear("router", {CHAT: (told, POLICY)})
            news = {f"e{n}": EngineNews(CHAT, 0.1, self.bounds) for n in range(self.engines)}
            self.scaler.decide({"router": None}, news)

    def decided(self, made: Decision, cold_start_s: float) -> None:
        self.decisions.append(made)
        self.cold_start_s = cold_start_s

    @property
    def wanted(self) -> int | None:
        decided = self.scaler.wanted(CHAT)
        return None if decided is None else decided.replicas


def test_the_demand_of_routers_sizes_the_pool_within_the_engines_bounds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    desk = Desk()
    with caplog.at_level(logging.INFO, "headrace.scaling"):
        desk.run(60, 35)
    assert desk.wanted == 4
    desk.run(60, 500)
    assert desk.wanted == 8
    reasons = [getattr(record, "reason", "") for record in caplog.records]
    assert reasons[1].startswith("up 1 -> 4: 35.00/s x 1.00 s at 10 each = 3.50")
    assert len(reasons) == 2, "a line at first and when the size changes, not every second"


def test_a_pool_that_is_not_scaled_is_left_alone() -> None:
    desk = Desk(bounds=None)
    desk.run(30, 100)
    assert desk.wanted is None
    assert desk.decisions == []


def test_a_pool_without_engines_keeps_its_bounds_and_is_wanted_again() -> None:
    desk = Desk()
    desk.run(30, 1)
    desk.engines = 1
    desk.run(70, 0)
    assert desk.wanted == 0
    desk.engines = 0
    desk.run(30, 0)
    assert desk.wanted == 0
    desk.run(1, 0, queued=25)
    assert desk.wanted == 1, "one replica works off 25 requests of a second each in time"


def test_replicas_that_leave_are_not_counted_and_do_not_come_back() -> None:
    desk = Desk(engines=6)
    desk.run(400, 10)
    smaller = desk.wanted
    assert smaller is not None
    assert smaller < 6
    # All six are still heard of, and nothing is wanted back for it.
    desk.run(5, 10)
    assert desk.wanted is not None
    assert desk.wanted <= smaller


def test_it_decides_once_a_period_however_many_heartbeats_come() -> None:
    desk = Desk()
    for _ in range(50):
        desk.now_s += 0.1
        desk.scaler.hear("router", {CHAT: (PoolDemand(), POLICY)})
        if desk.scaler.due:
            desk.scaler.decide({"router": None}, {"e": EngineNews(CHAT, 0.1, (0, 8))})
    assert len(desk.decisions) in (4, 5)


def test_a_start_that_was_seen_counts_for_the_next_ones() -> None:
    desk = Desk()
    desk.run(60, 35)
    assert (desk.wanted, desk.cold_start_s) == (4, POLICY.cold_start_s)
    desk.engines = 4
    desk.run(5, 35)
    assert 50 < desk.cold_start_s < 60, "as long as they were waited for"
