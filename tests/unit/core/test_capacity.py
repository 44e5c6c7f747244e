"""Little's law, with the playbook's example."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.capacity import in_flight, queue_threshold, replicas_needed, service_s


def test_six_a_second_of_twelve_seconds_on_replicas_of_24_take_four_with_threshold_six() -> None:
    stay_s = service_s(ttft_s=0.5, output_tokens=230, tpot_s=0.05)
    assert stay_s == pytest.approx(12.0)
    assert in_flight(6.0, stay_s) == pytest.approx(72.0)
    assert replicas_needed(6.0, 12.0, knee_concurrency=24, safety_ratio=0.75) == 4
    assert queue_threshold(24, 0.75) == 6


def test_no_load_needs_no_replica_and_a_little_needs_one() -> None:
    assert replicas_needed(0.0, 12.0, knee_concurrency=24) == 0
    assert replicas_needed(0.01, 12.0, knee_concurrency=24) == 1


@given(st.floats(0.0, 1e4), st.floats(0.0, 1e3), st.integers(1, 4096), st.floats(0.1, 1.0))
def test_what_is_needed_carries_the_load_and_one_less_does_not(
    arrivals_per_s: float, stay_s: float, knee: int, safety: float
) -> None:
    replicas = replicas_needed(arrivals_per_s, stay_s, knee_concurrency=knee, safety_ratio=safety)
    load = in_flight(arrivals_per_s, stay_s) / (knee * safety)
    assert replicas >= load - 1e-6
    assert replicas == 0 or replicas - 1 < load
