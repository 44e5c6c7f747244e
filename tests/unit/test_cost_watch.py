"""The last day's costs as metrics, and what is odd said once."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from serve_app.config_costs import CostSettings
from serve_app.cost_watch import CostWatch
from serve_app.ledger.database import Database
from serve_app.telemetry.spending_metrics import SpendingMetrics
from tests.cost_records import Person, Town
from tests.usage_records import HOUR_S, START_S

DAYS = 10
END_S = START_S + DAYS * 24 * HOUR_S
SETTINGS = CostSettings.model_validate({"instances": {"small": {"usd_per_hour": 2.5}}})


def run_away(person: Person, hour: int) -> Person:
    mad = person.user == "bob" and hour >= DAYS * 24 - 14
    return replace(person, hourly=person.hourly * 15) if mad else person


TOWN = Town(
    (Person("acme", "ann", "small", 400), Person("acme", "bob", "small", 100)),
    {"small": 2},
    hours=DAYS * 24,
    change=run_away,
)


class Clock:
    """Wall seconds, which pass when told."""

    def __init__(self) -> None:
        self.now_s = END_S + 180.0

    def __call__(self) -> float:
        return self.now_s


async def test_the_last_day_is_in_metrics_and_what_is_odd_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(f"sqlite:///{tmp_path}/watch.db")
    TOWN.write_sums(database)
    registry, clock = CollectorRegistry(), Clock()
    watch = CostWatch(database, SETTINGS, SpendingMetrics(registry), clock)
    with caplog.at_level(logging.WARNING, "headrace.costs"):
        await watch.look()
        clock.now_s += HOUR_S
        await watch.look()
    (line,) = caplog.records
    assert (line.subject, line.kind) == ("acme/bob", "spending_per_hour")  # type: ignore[attr-defined]
    value = registry.get_sample_value
    assert value("headrace_cost_anomalies", {"kind": "spending_per_hour"}) == 1
    useful = value("headrace_cost_usd", {"pool": "small", "use": "useful"})
    idle = value("headrace_cost_usd", {"pool": "small", "use": "idle"})
    assert useful is not None
    assert idle is not None
    # Of the second look: an hour later, and the hour in between had nothing in it.
    assert useful + idle == pytest.approx(23 * 2 * 2.5)
    assert value("headrace_cost_per_million_tokens_usd", {"pool": "small", "kind": "total"})
    assert value("headrace_cost_per_thousand_requests_usd", {"pool": "small"})
    database.close()


async def test_a_pool_without_a_price_has_no_cost_in_metrics_and_not_zero(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/watch.db")
    TOWN.write_sums(database)
    registry = CollectorRegistry()
    await CostWatch(database, CostSettings(), SpendingMetrics(registry), Clock()).look()
    samples = {sample.name for family in registry.collect() for sample in family.samples}
    assert "headrace_cost_busy_ratio" in samples
    assert not {name for name in samples if "per_" in name or "usd" in name}
    database.close()


async def test_the_ledger_is_looked_at_once_an_hour(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/watch.db")
    registry, clock = CollectorRegistry(), Clock()
    watch = CostWatch(database, SETTINGS, SpendingMetrics(registry), clock)
    await watch.look()
    TOWN.write_sums(database)
    await watch.look()
    assert registry.get_sample_value("headrace_cost_busy_ratio", {"pool": "small"}) is None
    clock.now_s += HOUR_S
    await watch.look()
    assert registry.get_sample_value("headrace_cost_busy_ratio", {"pool": "small"}) is not None
    watch.start()
    await watch.stop()
    await watch.stop()
    database.close()
