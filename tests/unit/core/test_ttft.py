"""The TTFT regression finds the engine's coefficients and exposes its error."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.ttft import TtftPredictor
from tests.properties import examples


def taught(truth: tuple[float, float, float], noise_s: float = 0.0) -> TtftPredictor:
    predictor, dice = TtftPredictor(), random.Random(7)
    a, b, c = truth
    for _ in range(2000):
        tokens, load = dice.uniform(10, 8000), dice.uniform(0, 120)
        ttft_s = a + b * tokens + c * load + dice.uniform(-noise_s, noise_s)
        predictor.observe(tokens, load, ttft_s)
    return predictor


def test_linear_engine_is_learned() -> None:
    predictor = taught((0.03, 30e-6, 2e-4))
    assert predictor.trusted
    assert predictor.predict_s(4000, 50) == pytest.approx(0.16, rel=0.03)
    assert predictor.error_s < 0.01


def test_much_slower_engine_is_learned() -> None:
    predictor = taught((0.2, 2e-3, 5e-3))
    assert predictor.predict_s(1000, 10) == pytest.approx(2.25, rel=0.05)


def test_error_shows_what_is_not_explained() -> None:
    assert taught((0.03, 30e-6, 0.0), noise_s=0.2).error_s == pytest.approx(0.1, rel=0.3)


def test_nothing_is_trusted_before_evidence() -> None:
    predictor = TtftPredictor()
    assert not predictor.trusted
    assert predictor.predict_s(1000, 0) > 0


def test_changed_engine_is_followed() -> None:
    predictor, dice = taught((0.03, 30e-6, 0.0)), random.Random(3)
    for _ in range(3000):
        tokens = dice.uniform(10, 8000)
        predictor.observe(tokens, 10, 0.03 + 120e-6 * tokens)
    assert predictor.predict_s(4000, 10) == pytest.approx(0.51, rel=0.1)


@examples(100)
@given(
    seen=st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(0, 4096), st.floats(0, 600)),
        min_size=40,
        max_size=120,
    ),
    tokens=st.floats(0, 1e6),
    more=st.floats(0, 1e6),
)
def test_more_work_never_predicts_an_earlier_token(
    seen: list[tuple[float, float, float]], tokens: float, more: float
) -> None:
    predictor = TtftPredictor()
    for observed in seen:
        predictor.observe(*observed)
    assert 0.0 <= predictor.predict_s(tokens, 10) <= predictor.predict_s(tokens + more, 10)
    assert predictor.predict_s(tokens, 10) <= predictor.predict_s(tokens, 20)
