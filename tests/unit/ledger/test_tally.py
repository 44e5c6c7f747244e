"""What a request comes to: once, in whatever order its witnesses speak."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.pricing import Rates
from serve_app.core.types import Outcome, Usage
from serve_app.ledger.schema import SUMS
from serve_app.ledger.tally import NOTHING, Account, Tally, tally

RATES = Rates(input_nanousd=10, cached_input_nanousd=1, output_nanousd=100, request_nanousd=7)


def router(usage: Usage, *, attempt: int = 1, billable: bool = True) -> Account:
    outcome = Outcome.COMPLETED if billable else Outcome.FAILED
    return Account("router", attempt, outcome, billable, usage)


def engine(usage: Usage, attempt: int = 1, outcome: Outcome = Outcome.COMPLETED) -> Account:
    return Account("engine", attempt, outcome, True, usage)


def test_both_witnesses_of_a_completed_request_make_one_bill() -> None:
    usage = Usage(20, 8, 5)
    price = 7 + 12 * 10 + 8 * 1 + 5 * 100
    for seen in ([router(usage)], [engine(usage)], [router(usage), engine(usage)]):
        found = tally(seen, RATES)
        assert (found.requests, found.billed_requests, found.amount_nanousd) == (1, 1, price)
        assert found.wasted_tokens == 0


def test_who_left_after_five_tokens_pays_for_what_was_generated_and_the_waste_is_priced() -> None:
    found = tally(
        [router(Usage(0, 0, 5)), engine(Usage(20, 0, 9), outcome=Outcome.CANCELLED)], RATES
    )
    assert (found.billed_prompt_tokens, found.billed_output_tokens) == (20, 9)
    assert (found.delivered_tokens, found.generated_tokens, found.wasted_tokens) == (5, 9, 4)
    assert found.amount_nanousd == 7 + 20 * 10 + 9 * 100
    assert found.wasted_nanousd == 4 * 100


def test_a_response_that_failed_by_our_fault_is_waste_and_costs_nothing() -> None:
    seen = [
        router(Usage(0, 0, 3), attempt=2, billable=False),
        engine(Usage(20, 0, 4), attempt=1, outcome=Outcome.FAILED),
        engine(Usage(20, 0, 3), attempt=2, outcome=Outcome.FAILED),
    ]
    found = tally(seen, RATES)
    assert (found.billed_requests, found.amount_nanousd) == (0, 0)
    assert (found.wasted_tokens, found.wasted_nanousd) == (4, 400)


def test_only_the_attempt_that_was_delivered_is_billed() -> None:
    lost, served = engine(Usage(20, 0, 2), 1, Outcome.FAILED), engine(Usage(20, 0, 6), 2)
    found = tally([router(Usage(20, 0, 6), attempt=2), lost, served], RATES)
    assert found.amount_nanousd == 7 + 200 + 600
    assert found.wasted_tokens == 2


def test_what_the_delivering_attempts_meter_counted_is_the_bill_of_who_left() -> None:
    first = engine(Usage(20, 0, 2), 1, Outcome.FAILED)
    second = engine(Usage(20, 4, 9), 2, Outcome.CANCELLED)
    found = tally([router(Usage(31, 0, 6), attempt=2), first, second], RATES)
    assert (found.billed_prompt_tokens, found.billed_cached_tokens) == (20, 4)
    assert (found.billed_output_tokens, found.wasted_tokens) == (9, 5)


@pytest.mark.parametrize("first_is_known", [True, False], ids=["both meters", "one died with it"])
def test_a_continued_response_is_billed_as_one_that_was_never_cut(first_is_known: bool) -> None:
    """The second prefill is our cost; only what the lost replica had not delivered is waste."""
    lost, last = engine(Usage(20, 0, 7), 1, Outcome.FAILED), engine(Usage(20, 8, 4), 2)
    delivered = router(Usage(20, 8, 9), attempt=2)
    found = tally([delivered, last, *([lost] if first_is_known else [])], RATES)
    assert (found.billed_prompt_tokens, found.billed_cached_tokens) == (20, 8)
    assert (found.billed_output_tokens, found.delivered_tokens) == (9, 9)
    assert found.amount_nanousd == 7 + 12 * 10 + 8 * 1 + 9 * 100
    assert found.wasted_tokens == (2 if first_is_known else 0)


@pytest.mark.parametrize("first_is_known", [True, False], ids=["both meters", "one died with it"])
def test_who_leaves_a_continued_stream_before_its_next_token_pays_for_the_prompt(
    first_is_known: bool,
) -> None:
    """The engine that took over had not come to the prompt's end: it counts none."""
    lost, last = engine(Usage(20, 4, 9), 1, Outcome.FAILED), engine(Usage(), 2, Outcome.CANCELLED)
    left = router(Usage(22, 0, 9), attempt=2)
    found = tally([left, last, *([lost] if first_is_known else [])], RATES)
    assert (found.billed_prompt_tokens, found.billed_output_tokens) == (
        20 if first_is_known else 22,
        9,
    )


def test_without_the_router_the_engines_last_ended_attempt_is_billed() -> None:
    seen = [engine(Usage(20, 0, 2), 1, Outcome.FAILED), engine(Usage(20, 0, 6), 2)]
    assert tally(seen, RATES).amount_nanousd == 7 + 200 + 600
    assert tally(seen[:1], RATES).amount_nanousd == 0


def test_a_request_that_ended_before_any_work_pays_no_fee() -> None:
    found = tally([router(Usage()), engine(Usage(), outcome=Outcome.CANCELLED)], RATES)
    assert (found.requests, found.billed_requests, found.amount_nanousd) == (1, 0, 0)


def test_a_tally_is_named_as_the_columns_are() -> None:
    assert tuple(NOTHING.columns()) == SUMS


usages = st.builds(
    lambda prompt, cached, output: Usage(prompt, min(prompt, cached), output),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(0, 50),
)
engines = st.builds(engine, usages, st.integers(1, 3), st.sampled_from(Outcome))
routers = st.builds(
    lambda usage, attempt, billable: router(usage, attempt=attempt, billable=billable),
    usages,
    st.integers(1, 3),
    st.booleans(),
)
sets = st.builds(
    lambda first, others: [*([first] if first else []), *others],
    st.none() | routers,
    st.lists(engines, max_size=3, unique_by=lambda seen: seen.attempt),
)


@given(sets, st.randoms())
def test_the_differences_add_up_to_the_tally_in_any_order(
    seen: list[Account], random: object
) -> None:
    random.shuffle(seen)  # type: ignore[attr-defined]  # a random.Random
    total = NOTHING
    for count in range(1, len(seen) + 1):
        total += tally(seen[:count], RATES) - tally(seen[: count - 1], RATES)
        assert total == tally(seen[:count], RATES)
        assert total.amount_nanousd >= 0
        assert total.wasted_tokens >= 0
    assert tally(reversed(seen), RATES) == total


@given(sets)
def test_a_bill_is_its_tokens_times_the_rates(seen: list[Account]) -> None:
    found = tally(seen, RATES)
    billed = Usage(
        found.billed_prompt_tokens, found.billed_cached_tokens, found.billed_output_tokens
    )
    assert found.amount_nanousd == RATES.cost_nanousd(billed, found.billed_requests)


@pytest.mark.parametrize("field", SUMS)
def test_sums_are_added_and_subtracted_field_by_field(field: str) -> None:
    one, two = Tally(**{field: 5}), Tally(**{field: 3})
    assert (one + two).columns()[field] == 8
    assert (one - two).columns()[field] == 2
