"""The search for the knee, and what levels say."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.knee import Level, Served, Slo, find_knee, goes_on_rising, next_load
from serve_app.core.quantile import quantile
from tests.properties import examples

SLO = Slo(ttft_s=0.5, tpot_s=0.05)


def answer(tpot_s: float = 0.01, ttft_s: float = 0.1) -> Served:
    return Served(ttft_s, ttft_s + 10 * tpot_s, 0.0, 100, 0, 11)


def level(concurrency: int, per_s: float, good_ratio: float = 1.0, refused: int = 0) -> Level:
    good = round(100 * good_ratio)
    served = (answer(),) * good + (answer(tpot_s=1.0),) * (100 - good)
    return Level(concurrency, 100 / per_s, served, refused)


def searched(knee: float, low: float, most: float, precision_ratio: float, whole: bool) -> list:
    tried: dict[float, bool] = {}
    while True:
        load = next_load(tried, low=low, most=most, precision_ratio=precision_ratio, whole=whole)
        if load is None:
            return list(tried.items())
        assert load not in tried, "nothing is tried twice"
        tried[load] = load <= knee


@examples(300)
@given(st.floats(0.5, 5000.0), st.sampled_from([0.01, 0.03, 0.2]), st.booleans())
def test_the_search_ends_soon_and_finds_what_holds(
    knee: float, precision_ratio: float, whole: bool
) -> None:
    tried = dict(searched(knee, 1.0, 1000.0, precision_ratio, whole))
    held = [load for load, holds in tried.items() if holds]
    assert len(tried) <= 20 + 10
    if knee < 1.0:
        assert tried == {1.0: False}
    elif knee >= 1000.0:
        assert max(held) == 1000.0
    else:
        failed = min(load for load, holds in tried.items() if not holds)
        assert failed - max(held) <= max(precision_ratio * failed, 1.0 if whole else 0.0)
        assert not whole or all(load == int(load) for load in tried)


def test_a_refused_request_was_asked_for_and_was_not_good() -> None:
    assert level(1, 10.0).holds(SLO)
    assert not level(1, 10.0, refused=10).holds(SLO)
    assert not Level(1, 1.0, (), refused=3).holds(SLO)
    assert not Level(1, 1.0, ()).holds(SLO)


def test_the_knee_is_where_goodput_peaks_among_levels_that_hold() -> None:
    levels = [level(1, 5.0), level(8, 30.0), level(9, 31.0), level(10, 40.0, good_ratio=0.5)]
    knee = find_knee(levels, SLO)
    assert knee is not None
    assert (knee.level.concurrency, knee.bounded_by) == (9, "targets")


def test_of_levels_that_serve_the_same_the_least_is_the_knee() -> None:
    levels = [level(8, 29.9), level(16, 30.0), level(32, 30.1)]
    knee = find_knee(levels, SLO)
    assert knee is not None
    assert (knee.level.concurrency, knee.bounded_by) == (8, "peak")
    assert not goes_on_rising(levels, SLO)
    assert goes_on_rising(levels[:1], SLO)
    assert goes_on_rising([level(8, 20.0), level(16, 30.0)], SLO)


def test_nothing_higher_tried_bounds_the_knee_and_nothing_held_is_none() -> None:
    knee = find_knee([level(1, 5.0), level(2, 10.0)], SLO)
    assert knee is not None
    assert (knee.level.concurrency, knee.bounded_by) == (2, "bound")
    assert find_knee([level(1, 5.0, good_ratio=0.0)], SLO) is None


def test_quantiles_are_values_that_were_seen() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([1.0], 0.99) == 1.0
    # 0.55 x 100 is a little more than 55 in floats.
    assert quantile([float(n) for n in range(1, 101)], 0.55) == 55.0
    assert quantile([float(n) for n in range(1, 101)], 0.95) == 95.0


@pytest.mark.parametrize("wrong", [{"ttft_s": 0.0}, {"tpot_s": -1.0}, {"good_ratio": 1.5}])
def test_targets_that_make_no_sense_are_a_bug(wrong: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        Slo(**{"ttft_s": 1.0, "tpot_s": 1.0} | wrong)


def test_a_single_token_has_no_time_between_tokens() -> None:
    assert Served(0.1, 0.1, 0.0, 5, 0, 1).tpot_s == 0.0
    assert Served(inf, inf, 0.0, 5, 0, 1).is_good(SLO) is False
