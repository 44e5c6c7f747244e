"""The figures' arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.sim.compare import combine
from serve_app.sim.records import jain_index, max_min_shares, percentile
from serve_app.sim.scalers import OngoingRequestsScaler, oscillations
from serve_app.sim.setup import PoolLoad


def test_percentiles_are_nearest_rank() -> None:
    values = list(range(1, 101))
    assert percentile(values, 0.5) == 50
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1.0) == 100
    assert percentile([7], 0.01) == 7
    assert percentile([], 0.5) is None


def test_jain_is_one_when_even_and_one_over_n_when_one_takes_all() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([]) == 1.0


@given(
    st.dictionaries(st.text(max_size=3), st.floats(0, 1e6), min_size=1, max_size=20),
    st.floats(0, 1e7),
)
@pytest.mark.slow
def test_max_min_shares_use_the_capacity_and_exceed_no_demand(
    demands: dict[str, float], capacity: float
) -> None:
    shares = max_min_shares(demands, capacity)
    total = min(capacity, sum(demands.values()))
    assert sum(shares.values()) == pytest.approx(total, rel=1e-9, abs=1e-6)
    unmet = [shares[name] for name in demands if shares[name] < demands[name] * (1 - 1e-9)]
    for name, share in shares.items():
        assert share <= demands[name]
        for least in unmet:
            # Nobody has more than one who wants more.
            assert share <= least * (1 + 1e-9) + 1e-6


def test_means_go_leaf_by_leaf_and_skip_what_is_missing() -> None:
    figures = [{"a": 1, "b": {"c": None}}, {"a": 3, "b": {"c": 4.0}}, {"a": None, "b": None}]
    assert combine(figures, lambda values: sum(values) / len(values)) == {"a": 2, "b": {"c": 4.0}}


def load(in_flight: int, ready: int = 4) -> PoolLoad:
    return PoolLoad(ready, 0, 0, in_flight, 0.5, 0, 0, 5.0)


def test_the_ongoing_scaler_waits_its_delay_before_it_moves() -> None:
    scaler = OngoingRequestsScaler(
        target_ongoing=10, least=1, most=8, upscale_delay_s=30, downscale_delay_s=60
    )
    assert [scaler.replicas(load(75), at_s) for at_s in (0.0, 20.0, 30.0)] == [4, 4, 8]
    assert [scaler.replicas(load(5), at_s) for at_s in (40.0, 90.0, 100.0)] == [4, 4, 1]
    assert scaler.replicas(load(10_000, ready=8), 200.0) == 8


def test_oscillations_count_turns_and_not_steps() -> None:
    assert oscillations([(0, 2), (1, 3), (2, 4), (3, 4)]) == 0
    assert oscillations([(0, 2), (1, 3), (2, 2), (3, 2), (4, 3)]) == 2
