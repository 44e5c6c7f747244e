"""Fairness by engine seconds evens out the engines' time; by token weights it does not."""

from __future__ import annotations

import pytest

from benchmarks.fairness_costs import TENANTS, run, table

pytestmark = pytest.mark.slow


def test_measured_engine_time_as_the_cost_gives_each_tenant_its_part_of_the_engines() -> None:
    found = {name: run(name, 1.6, 40.0, 0) for name in ("token weights", "engine seconds")}
    by_tokens, by_time = found["token weights"], found["engine seconds"]
    assert by_time["jain_engine_s"] > 0.99
    assert by_tokens["jain_engine_s"] < 0.97
    assert sum(by_time["share"].values()) == pytest.approx(1.0)
    assert all(abs(by_time["share"][tenant] - 1 / 3) < 0.05 for tenant in TENANTS)
    assert table({name: [row] for name, row in found.items()}).count("\n| ") == 2
