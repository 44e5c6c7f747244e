"""Token estimates learn, stay within bounds, and know their error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.tokens import OutputPredictor, PromptTokenEstimator, TokenEstimate
from serve_app.core.types import TenantId
from tests.properties import examples

ANN, BOB = TenantId("ann"), TenantId("bob")


def test_unknown_model_is_estimated_with_a_wide_bound() -> None:
    estimate = PromptTokenEstimator(overhead_tokens=0).estimate("m", 4000)
    assert estimate.expected_tokens == 1000
    assert estimate.upper_tokens == 4000


def test_ratio_is_learned_and_the_bound_tightens() -> None:
    estimator = PromptTokenEstimator(overhead_tokens=0)
    for number in range(300):
        estimator.observe("m", 3000, 1000 + (number % 3 - 1) * 20)
    estimate = estimator.estimate("m", 30_000)
    assert estimate.expected_tokens == pytest.approx(10_000, rel=0.02)
    assert 10_000 < estimate.upper_tokens < 11_500
    assert estimator.error_ratio("m") < 0.03
    assert estimator.error_ratio("other") == 0.0


def test_bytes_bound_tokens_whatever_was_learned() -> None:
    estimator = PromptTokenEstimator(overhead_tokens=0)
    for _ in range(50):
        estimator.observe("m", 100, 400)
    assert estimator.estimate("m", 1000).upper_tokens <= 1000


def test_exact_count_is_needed_only_near_a_limit() -> None:
    estimate = TokenEstimate(expected_tokens=1000, upper_tokens=1400)
    assert not estimate.decides(1400)
    assert estimate.decides(1399)
    assert estimate.decides(900)
    assert not estimate.decides(100)


def test_tenant_prediction_moves_from_the_pools_mean_to_its_own() -> None:
    predictor = OutputPredictor(256, tenants_max=10)
    assert predictor.predict(ANN, 10_000) == 256
    for _ in range(400):
        predictor.observe(BOB, 100, predictor.predict(BOB, 10_000))
    for _ in range(40):
        predictor.observe(ANN, 1000, predictor.predict(ANN, 10_000))
    assert predictor.predict(ANN, 10_000) > 750
    assert predictor.predict(BOB, 10_000) < 200
    assert predictor.predict(ANN, 50) == 50


def test_first_short_answers_do_not_replace_the_prior() -> None:
    predictor = OutputPredictor(256, tenants_max=10)
    predictor.observe(ANN, 3, 256)
    assert predictor.predict(BOB, 10_000) > 200


def test_error_is_tracked_per_tenant() -> None:
    predictor = OutputPredictor(256, tenants_max=10)
    for number in range(200):
        predictor.observe(ANN, 100, 100)
        predictor.observe(BOB, 100 if number % 2 else 300, 200)
    assert predictor.error_ratio(ANN) == 0.0
    assert predictor.error_ratio(BOB) == pytest.approx(0.5, abs=0.05)
    assert 0.0 < predictor.error_ratio() < 0.5


def test_tenant_table_is_bounded() -> None:
    predictor = OutputPredictor(256, tenants_max=100)
    for number in range(10_000):
        predictor.observe(TenantId(f"t{number}"), 10, 256)
    assert len(predictor) == 100


@examples(100)
@given(
    answers=st.lists(st.integers(0, 10**6), max_size=60),
    max_tokens=st.integers(0, 10**6),
)
def test_prediction_is_positive_and_within_max_tokens(answers: list[int], max_tokens: int) -> None:
    predictor = OutputPredictor(256, tenants_max=2)
    for answer in answers:
        predictor.observe(ANN, answer, 100)
    assert 1 <= predictor.predict(ANN, max_tokens) <= max(1, max_tokens)
