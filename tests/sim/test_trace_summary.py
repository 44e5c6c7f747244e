"""A trace in numbers, its gaps included."""

from __future__ import annotations

import pytest

from serve_app.core.types import PriorityClass, TenantId
from serve_app.sim.trace_summary import summarise_trace
from serve_app.sim.workload import Arrival


def arrivals(*times_s: float, prompt: int = 100) -> list[Arrival]:
    tenant, standard = TenantId("t"), PriorityClass.STANDARD
    return [Arrival(at_s, tenant, standard, prompt, 10, 100) for at_s in times_s]


def test_rates_and_lengths_are_the_traces() -> None:
    summary = summarise_trace(arrivals(*(second / 2 for second in range(241))))
    assert summary.mean_per_s == pytest.approx(2.0)
    assert summary.peak_per_s == pytest.approx(2.0)
    assert (summary.input_tokens, summary.output_tokens) == (100, 10)
    assert not summary.has_gap


def test_a_busy_minute_is_the_peak() -> None:
    calm = [float(second) for second in range(0, 120)]
    busy = [120 + second / 10 for second in range(600)]
    summary = summarise_trace(arrivals(*calm, *busy, 180.0))
    assert summary.peak_per_s == pytest.approx(10.0)
    assert summary.mean_per_s == pytest.approx(4.0)


def test_a_gap_is_told_and_makes_the_pool_no_smaller() -> None:
    before = [float(second) for second in range(60)]
    after = [14_400 + second / 4 for second in range(241)]
    summary = summarise_trace(arrivals(*before, *after))
    assert summary.has_gap
    assert (summary.gap_at_s, summary.gap_s) == (59.0, 14_341.0)
    assert summary.peak_per_s == pytest.approx(4.0)
    assert summary.mean_per_s < 0.1


def test_a_trace_shorter_than_a_minute_has_its_mean_rate() -> None:
    assert summarise_trace(arrivals(0.0, 1.0, 2.0)).peak_per_s == pytest.approx(1.0)


@pytest.mark.parametrize("times_s", [(), (1.0,), (3.0, 3.0, 3.0)])
def test_a_trace_without_two_times_has_no_rate(times_s: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="have no rate"):
        summarise_trace(arrivals(*times_s))
