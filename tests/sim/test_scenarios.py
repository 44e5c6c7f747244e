"""Every scenario runs with every kind of contender, and knees are where they are said to be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from serve_app.core.exchange import EXCHANGE_PERIOD_S
from serve_app.core.types import Outcome
from serve_app.sim.compare import compare, recovery_s
from serve_app.sim.contenders import BASELINES, CONTENDERS, PRODUCT, THREE_ROUTERS, contend
from serve_app.sim.knee import find_knee
from serve_app.sim.records import Question, Run
from serve_app.sim.scenarios import KNEES, MIXES, SCENARIOS, build_scenario, default_setup
from serve_app.sim.setup import Fault, FaultKind
from serve_app.sim.workload import Arrival

pytestmark = pytest.mark.slow


def short_setup() -> object:
    return replace(default_setup(), warmup_s=2.0)


@pytest.mark.parametrize("name", sorted(SCENARIOS))
def test_every_scenario_runs_and_reports_the_figures(name: str) -> None:
    scenario = build_scenario(name, short_setup(), duration_s=6.0)
    product, baseline = compare(
        scenario, [PRODUCT, "least-loaded"], [0], knee_goodput_per_s=KNEES["chat"][1]
    )
    for result in (product, baseline):
        for key in ("goodput_ratio", "jain", "ttft_p99_s", "shed_ratio", "wasted_token_ratio"):
            assert result.mean[key] is not None
        assert result.mean["requests"] > 0
        assert result.mean["requests_per_wall_s"] > 0
        assert len(result.curves.offered) == 7
    assert (product.mean.get("victims_ttft_p99_ratio") is not None) == bool(scenario.victims)


def test_means_and_extremes_span_the_seeds() -> None:
    scenario = build_scenario("overload", short_setup(), duration_s=6.0)
    (result,) = compare(scenario, ["least-loaded"], [0, 1, 2])
    values = [figures["goodput_per_s"] for figures in result.per_seed]
    assert len(set(values)) > 1
    assert result.low["goodput_per_s"] == min(values)
    assert result.high["goodput_per_s"] == max(values)
    assert result.mean["goodput_per_s"] == pytest.approx(sum(values) / 3)


def test_progress_rises_to_the_end() -> None:
    shown: list[float] = []
    scenario = build_scenario("overload", short_setup(), duration_s=4.0)
    compare(scenario, ["least-loaded"], [0, 1], on_progress=shown.append)
    assert shown == sorted(shown)
    assert shown[-1] == pytest.approx(1.0)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'storm' is none of: tenant-burst"):
        build_scenario("storm", default_setup())
    with pytest.raises(ValueError, match="'best' is none of: headrace"):
        contend(default_setup(), "best")


def test_baselines_have_no_admission_and_keep_the_products_targets() -> None:
    setup = default_setup()
    for name in BASELINES:
        contending = contend(setup, name)
        policy = contending.pools[0].policy
        assert policy.ordering == "arrival"
        assert policy.max_concurrency_per_replica > 100_000
        assert contending.slo == setup.slo
        assert not contending.engine_priority
    assert contend(setup, PRODUCT) == replace(setup, target=setup.slo)
    assert contend(setup, "headrace+round_robin").pools[0].policy.routing == "round_robin"
    assert set(CONTENDERS) == {PRODUCT, THREE_ROUTERS, *BASELINES}
    assert contend(setup, THREE_ROUTERS).routers == 3


@pytest.mark.parametrize(
    "mix",
    ["chat", pytest.param("burst", marks=pytest.mark.proof)],
)
def test_the_stated_knee_holds_and_a_little_more_does_not(mix: str) -> None:
    setup = replace(default_setup(), warmup_s=20.0, duration_s=60.0)
    setup = contend(setup, "least-loaded")
    knee_per_s = KNEES[mix][0]
    knee = find_knee(setup, MIXES[mix], bracket_per_s=(0.94 * knee_per_s, 1.08 * knee_per_s))
    assert knee.rate_per_s == pytest.approx(knee_per_s, rel=0.07)
    assert knee.goodput_per_s == pytest.approx(KNEES[mix][1], rel=0.07)
    assert not knee.points[-1].holds


@pytest.mark.proof  # Half a minute of computing; the benchmark holds five seeds' means to 3 %.
def test_three_routers_decide_nearly_like_one() -> None:
    setup = replace(default_setup(), warmup_s=20.0)
    scenario = build_scenario("overload", setup, duration_s=100.0)
    one, three = (each.mean for each in compare(scenario, [PRODUCT, THREE_ROUTERS], [0]))
    assert three["jain"] == pytest.approx(one["jain"], rel=0.03)
    assert three["goodput_per_s"] == pytest.approx(one["goodput_per_s"], rel=0.05)


def test_three_routers_keep_their_bounds_and_without_exchange_would_not() -> None:
    setup = replace(default_setup(), warmup_s=5.0, cooldown_s=0.0)
    passed_s = []
    for period_s in (EXCHANGE_PERIOD_S, 1e9):
        changed = replace(setup, exchange_period_s=period_s)
        scenario = build_scenario("overload", changed, duration_s=25.0)
        (three,) = (each.mean for each in compare(scenario, [THREE_ROUTERS], [0]))
        passed_s.append(three["critical_passed_s"])
        assert three["over_bound_requests"] == 0
    told_s, silent_s = passed_s
    assert told_s <= EXCHANGE_PERIOD_S < silent_s
    assert three["ttft_p99_s"]["critical"] < 1.0


def test_a_bracket_that_fails_at_its_lower_end_is_refused() -> None:
    setup = replace(default_setup(), warmup_s=2.0, duration_s=4.0)
    setup = contend(setup, "least-loaded")
    with pytest.raises(ValueError, match=r"misses its targets at 400"):
        find_knee(setup, MIXES["chat"], bracket_per_s=(400.0, 500.0))


def test_recovery_is_counted_to_the_end_of_the_last_bad_window() -> None:
    setup = replace(default_setup(), duration_s=60.0, faults=(Fault(20.0, FaultKind.KILL),))
    run = Run()
    for tenth in range(600):
        arrival = Arrival(tenth / 10, "a", 1, 10, 10, 10)
        question = Question(arrival)
        if not 20.0 <= arrival.arrival_s < 27.0:
            question.outcome, question.ttft_s = Outcome.COMPLETED, 0.1
        run.questions.append(question)
    assert recovery_s(run, setup) == {"kill@20": 11.0}
