"""Fitting the time of a step: what it finds, what it never says, what it admits."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.attribution import StepCoefficients
from serve_app.core.step_fit import STEPS_MIN, StepFit
from tests.properties import examples

TRUE = StepCoefficients(5_000_000_000, 20_000_000, 8_000_000, 50_000)


def feed(fit: StepFit, true: StepCoefficients, count: int, seed: int = 1) -> None:
    source = random.Random(seed)
    for _ in range(count):
        prefill = source.choice([0, 0, source.randrange(4000)])
        decodes = source.randrange(1, 100)
        kv = sum(source.randrange(4000) for _ in range(decodes))
        ps = true.step_ps + true.own_ps(prefill, decodes, kv)
        fit.observe(ps // 1000, prefill_tokens=prefill, decode_sequences=decodes, kv_tokens_read=kv)


def numbers(coefficients: StepCoefficients) -> list[int]:
    return [
        coefficients.step_ps,
        coefficients.prefill_token_ps,
        coefficients.decode_sequence_ps,
        coefficients.kv_token_ps,
    ]


def test_an_affine_engine_is_found_and_the_error_says_so() -> None:
    fit = StepFit()
    feed(fit, TRUE, 3000)
    assert numbers(fit.coefficients) == pytest.approx(numbers(TRUE), rel=0.01)
    assert fit.error_ratio < 0.01
    assert not fit.coefficients.provisional


def test_defaults_hold_and_are_marked_before_enough_steps() -> None:
    fit = StepFit()
    feed(fit, TRUE, STEPS_MIN - 1)
    assert fit.coefficients == StepCoefficients()
    assert fit.coefficients.provisional


def test_an_engine_that_changed_is_followed() -> None:
    fit = StepFit()
    feed(fit, TRUE, 2000)
    faster = StepCoefficients(*(each // 2 for each in numbers(TRUE)))
    feed(fit, faster, 10_000)
    assert numbers(fit.coefficients) == pytest.approx(numbers(faster), rel=0.02)


def test_steps_that_all_look_alike_move_no_coefficient_to_nonsense() -> None:
    fit = StepFit()
    for _ in range(1000):
        fit.observe(7_000_000, prefill_tokens=0, decode_sequences=8, kv_tokens_read=8000)
    found = fit.coefficients
    predicted_ps = found.step_ps + found.own_ps(0, 8, 8000)
    assert predicted_ps == pytest.approx(7_000_000_000, rel=0.01)
    assert found.prefill_token_ps == pytest.approx(StepCoefficients().prefill_token_ps, rel=0.01)
    assert fit.error_ratio < 0.02


def test_an_engine_that_is_not_affine_shows_in_the_error() -> None:
    fit = StepFit()
    source = random.Random(3)
    for _ in range(2000):
        fit.observe(
            source.choice([1_000_000, 30_000_000]),
            prefill_tokens=0,
            decode_sequences=8,
            kv_tokens_read=800,
        )
    assert fit.error_ratio > 0.3


@examples(25)
@given(st.integers(0, 10**6), st.integers(64, 400))
def test_no_coefficient_is_ever_negative(seed: int, count: int) -> None:
    fit = StepFit()
    source = random.Random(seed)
    for _ in range(count):
        fit.observe(
            source.randrange(10**8),
            prefill_tokens=source.randrange(5000),
            decode_sequences=source.randrange(300),
            kv_tokens_read=source.randrange(10**6),
        )
        assert min(numbers(fit.coefficients)) >= 0


def test_a_run_of_steps_teaches_what_its_steps_do() -> None:
    single, together = StepFit(), StepFit()
    for start in range(0, 5000, 5):
        ps = 0
        kv = 0
        for step in range(5):
            context = 100 + (start * 7) % 900 + step
            step_ps = TRUE.step_ps + TRUE.own_ps(0, 1, context)
            single.observe(
                step_ps // 1000, prefill_tokens=0, decode_sequences=1, kv_tokens_read=context
            )
            ps, kv = ps + step_ps, kv + context
        together.observe(
            ps // 1000, prefill_tokens=0, decode_sequences=5, kv_tokens_read=kv, steps=5
        )
    for fit in (single, together):
        found = fit.coefficients
        assert found.step_ps + found.own_ps(0, 1, 500) == pytest.approx(
            TRUE.step_ps + TRUE.own_ps(0, 1, 500), rel=0.01
        )
