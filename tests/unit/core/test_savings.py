"""Suggestions that the ledger bears out, and none that it does not."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS, NS_PER_S
from serve_app.core.savings import (
    ModelUse,
    Repetition,
    TokenCost,
    cheaper_models,
    fit_token_cost,
    repeated_prompts,
    smaller_pools,
)
from serve_app.core.unit_economics import PoolUse, unit_cost

DOLLAR = NS_PER_S
MONTH = 730


def pool(replicas: int, busy: float, peak: float, hourly: int = 2 * DOLLAR) -> PoolUse:
    """Return a pool of a month."""
    use = PoolUse("p", hours=MONTH, peak_busy=Fraction(peak))
    for _ in range(replicas):
        useful = round(busy * MONTH * HOUR_NS)
        use.add({Use.USEFUL: useful, Use.IDLE: MONTH * HOUR_NS - useful}, hourly * MONTH)
    return use


def test_a_pool_whose_busiest_hour_fits_fewer_replicas_should_have_fewer() -> None:
    (found,) = smaller_pools([pool(4, 0.2, 1.3)], MONTH)
    assert found.saving_nanousd == 2 * 2 * DOLLAR * MONTH
    assert "2 would do" in found.why


@pytest.mark.parametrize(
    "use", [pool(4, 0.2, 2.5), pool(1, 0.01, 0.1), pool(3, 0.1, 0.1, 0), PoolUse("none")]
)
def test_a_pool_that_needs_its_replicas_once_is_left_alone(use: PoolUse) -> None:
    assert smaller_pools([use], MONTH) == []


def model(
    name: str, cost: int, longest: int = 4000, engine_hours: int = 100, *, priced: bool = True
) -> ModelUse:
    tokens = 10**9
    return ModelUse(
        *(name, f"pool-{name}", engine_hours * HOUR_NS, cost * DOLLAR, tokens, longest),
        tokens if priced else 0,
    )


def idle(name: str, hours: int) -> PoolUse:
    use = PoolUse(f"pool-{name}")
    use.add({Use.IDLE: hours * HOUR_NS}, 0)
    return use


def test_traffic_that_fits_a_cheaper_model_is_said_with_what_it_would_save() -> None:
    models = [model("large", 1000), model("small", 100)]
    pools = [idle("large", 500), idle("small", 500)]
    (found,) = cheaper_models(models, pools, MONTH)
    assert (found.subject, found.saving_nanousd) == ("large", 900 * DOLLAR)
    assert found.why.startswith("small has served requests as long")


@pytest.mark.parametrize(
    ("cheaper", "hours"),
    [
        (model("small", 100, longest=3999), 500),
        (model("small", 100), 99),
        (model("small", 800), 500),
    ],
    ids=["never served one as long", "not idle enough", "hardly cheaper"],
)
def test_a_model_that_does_not_fit_is_not_suggested(cheaper: ModelUse, hours: int) -> None:
    assert cheaper_models([model("large", 1000), cheaper], [idle("small", hours)], MONTH) == []


@pytest.mark.parametrize("large", [1000, 0])
def test_a_model_whose_time_has_no_price_is_not_taken_for_free(large: int) -> None:
    unpriced = PoolUse("pool-small")
    unpriced.add({Use.IDLE: 500 * HOUR_NS}, None)
    models = [model("large", large), model("small", 0, priced=False)]
    assert cheaper_models(models, [idle("large", 500), unpriced], MONTH) == []


def test_models_that_cost_nothing_save_nothing() -> None:
    models = [model("large", 0), model("small", 0)]
    assert cheaper_models(models, [idle("large", 500), idle("small", 500)], MONTH) == []


def test_a_few_hours_that_have_not_been_billed_yet_hide_nothing() -> None:
    small = idle("small", 500)
    small.add({Use.IDLE: 20 * HOUR_NS}, None)
    models = [model("large", 1000), model("small", 100)]
    (found,) = cheaper_models(models, [idle("large", 500), small], MONTH)
    assert found.why.endswith("; without 3.8% of pool-small's time, which has no price")


def test_only_what_has_a_price_is_saved_and_what_has_none_is_said() -> None:
    # A fifth of both models' tokens came in hours that nobody has billed yet.
    large, small = model("large", 800), model("small", 80)
    models = [replace(each, priced_tokens=8 * 10**8) for each in (large, small)]
    pools = [idle("large", 500), idle("small", 500)]
    (found,) = cheaper_models(models, pools, MONTH)
    assert found.saving_nanousd == (800 - 80) * DOLLAR
    # Half of a pool's time without a price: what can be saved of the rest, and it is said.
    whole = pool(4, 0.2, 1.3)
    partly = pool(4, 0.2, 1.3)
    for _ in range(4):
        partly.add({Use.IDLE: MONTH * HOUR_NS}, None)
    (known,), (found,) = smaller_pools([whole], MONTH), smaller_pools([partly], MONTH)
    assert "no price" not in known.why
    assert "without 50.0% of p's time, which has no price" in found.why
    nothing = pool(4, 0.2, 1.3)
    nothing.cost_nanousd = dict.fromkeys(Use, 0)
    assert smaller_pools([nothing], MONTH) == []


def test_prompts_that_repeat_uncached_cost_what_their_tokens_take() -> None:
    repeats = [
        Repetition("acme", "m", 2000, 1001, 0),
        Repetition("bolt", "m", 2000, 1001, 2_000_000),
        Repetition("coil", "m", 100, 10**6, 0),
        Repetition("dune", "unknown", 2000, 1001, 0),
    ]
    costs, price = {"m": TokenCost(30_000.0, 1e6)}, {"m": Fraction(1, 60)}
    found = repeated_prompts(repeats, costs, price, MONTH)
    assert [each.subject for each in found] == ["acme on m"]
    assert found[0].saving_nanousd == 1000 * 2000 * 30_000 // 60


def test_token_costs_are_found_again_from_hours_of_different_mixes() -> None:
    rows = [(p, o, 30_000 * p + 7_000_000 * o) for p, o in ((10**6, 10**3), (10**4, 10**4), (5, 9))]
    fit = fit_token_cost(rows)
    assert fit is not None
    assert fit.prompt_ns == pytest.approx(30_000)
    assert fit.output_ns == pytest.approx(7_000_000)
    assert fit_token_cost([]) is None
    assert fit_token_cost([(10, 1, 5), (20, 2, 10)]) is None
    below = fit_token_cost([(10, 1, 50), (10, 30, 1500)])
    assert below is not None
    assert below.prompt_ns >= 0 <= below.output_ns


def test_unit_costs_are_of_the_whole_pool_and_say_nothing_of_nothing() -> None:
    use = pool(1, 0.6, 0.6, hourly=22 * DOLLAR)
    use.output_tokens = 3000 * 3600 * MONTH
    cost = unit_cost(use.product, use.total_nanousd)
    assert cost.output_usd == pytest.approx(2.04, abs=0.005)
    assert cost.input_usd is cost.requests_usd is None
    busy = unit_cost(use.product, use.busy_nanousd)
    assert busy.output_usd == pytest.approx(2.04 * 0.6, abs=0.005)
    assert use.busy_ratio == pytest.approx(0.6)


@pytest.mark.parametrize(("unpriced", "priced"), [(0, True), (1, True), (2, False)])
def test_time_has_a_price_though_a_hundredth_of_it_has_none(unpriced: int, priced: bool) -> None:
    use = PoolUse("p")
    use.add({Use.IDLE: (100 - unpriced) * HOUR_NS}, DOLLAR)
    use.add({Use.IDLE: unpriced * HOUR_NS}, None)
    assert use.priced is priced
