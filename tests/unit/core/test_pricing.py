"""Rate cards: exact, additive prices, the most specific card, and what is refused."""

from __future__ import annotations

import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.pricing import (
    AMOUNT_NANOUSD_MAX,
    FREE,
    NANOUSD,
    AmountTooLarge,
    PriceBook,
    Priced,
    RateCard,
    Rates,
    amount_in_all,
    amount_nanousd,
    dollars,
    nanousd,
    problems,
    rate_nanousd_per_token,
)
from serve_app.core.types import PriorityClass, TenantId, Usage

ACME, OTHER = TenantId("acme"), TenantId("other")
TENANTS, MODELS = (ACME, OTHER), ("small", "large")

rate = st.integers(0, 10**7)
rates = st.builds(Rates, rate, rate, rate, rate)
usages = st.builds(
    lambda prompt, cached, output: Usage(prompt, min(prompt, cached), output),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
)


@st.composite
def cards(draw: st.DrawFn) -> list[RateCard]:
    """Any cards; those that overlap are left out, the first stays."""
    kept: list[RateCard] = []
    for index in range(draw(st.integers(0, 12))):
        bounds = sorted(draw(st.lists(st.integers(0, 20), min_size=2, max_size=2, unique=True)))
        card = RateCard(
            name=f"card-{index}",
            rates=draw(rates),
            tenant=draw(st.sampled_from((None, *TENANTS))),
            model=draw(st.sampled_from((None, *MODELS))),
            priority_class=draw(st.sampled_from((None, *PriorityClass))),
            batch=draw(st.sampled_from((None, True, False))),
            from_s=draw(st.sampled_from((None, bounds[0]))),
            until_s=draw(st.sampled_from((None, bounds[1]))),
        )
        if not problems([*kept, card]):
            kept.append(card)
    return kept


priced = st.builds(
    Priced,
    tenant=st.sampled_from(TENANTS),
    model=st.sampled_from(MODELS),
    priority_class=st.sampled_from(PriorityClass),
    at_s=st.floats(-1, 22),
    batch=st.booleans(),
)


@given(rates, st.lists(usages, max_size=20))
def test_prices_add_up_exactly_in_any_grouping(rates: Rates, parts: list[Usage]) -> None:
    together = Usage(
        sum(u.prompt_tokens for u in parts),
        sum(u.cached_prompt_tokens for u in parts),
        sum(u.completion_tokens for u in parts),
    )
    assert sum(rates.cost_nanousd(u) for u in parts) == rates.cost_nanousd(together, len(parts))


@given(rates, usages, st.integers(0, 10**6), st.integers(0, 10**6))
def test_no_request_within_its_bounds_costs_more_than_the_most(
    rates: Rates, usage: Usage, more_prompt: int, more_output: int
) -> None:
    most = rates.most_nanousd(
        usage.prompt_tokens + more_prompt, usage.completion_tokens + more_output
    )
    assert 0 <= rates.cost_nanousd(usage) <= most


@given(cards(), priced)
def test_the_most_specific_card_in_force_wins(cards: list[RateCard], request: Priced) -> None:
    def holds(card: RateCard) -> bool:
        return (
            card.tenant in (None, request.tenant)
            and card.model in (None, request.model)
            and card.priority_class in (None, request.priority_class)
            and card.batch in (None, request.batch)
            and (card.from_s is None or card.from_s <= request.at_s)
            and (card.until_s is None or request.at_s < card.until_s)
        )

    def weight(card: RateCard) -> int:
        named = (card.tenant, card.model, card.priority_class, card.batch)
        return sum(2**place for place, value in enumerate(reversed(named)) if value is not None)

    holding = sorted(filter(holds, cards), key=weight)
    book = PriceBook(7, cards)
    assert book.find(request) == (holding[-1] if holding else None)
    assert book.rates(request) == (holding[-1].rates if holding else FREE)
    # No two of equal weight hold at once: the choice is never a matter of order.
    assert len({weight(card) for card in holding}) == len(holding)
    assert PriceBook(7, reversed(cards)).find(request) == book.find(request)


@given(cards())
def test_a_book_travels_between_processes(cards: list[RateCard]) -> None:
    book = PriceBook(3, cards)
    again = pickle.loads(pickle.dumps(book))
    assert (again.version, again.cards) == (book.version, book.cards)


@given(st.integers(0, 10**12))
def test_dollars_are_written_exactly(amount: int) -> None:
    assert Fraction(dollars(amount)) * NANOUSD == amount
    assert dollars(-amount) == ("-" if amount else "") + dollars(amount)
    assert "e" not in dollars(amount)


@given(st.integers(0, 10**9))
def test_what_is_written_is_read_back(amount: int) -> None:
    assert nanousd(dollars(amount)) == amount
    assert rate_nanousd_per_token(dollars(amount * 10**6)) == amount


def test_prices_are_dollars_per_million_tokens() -> None:
    assert rate_nanousd_per_token("2.50") == 2500
    assert rate_nanousd_per_token("0.001") == 1
    assert rate_nanousd_per_token("1e-1") == 100
    million = Usage(prompt_tokens=10**6, completion_tokens=10**6)
    two_dollars = Rates(input_nanousd=500, output_nanousd=rate_nanousd_per_token("1.5"))
    assert two_dollars.cost_nanousd(million) == 2 * NANOUSD


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-0.1", "must not be negative"),
        ("0.0125", "write 0.012 or 0.013"),
        ("1/3", "whole number of nano-dollars"),
        ("cheap", "must be a number"),
        ("", "must be a number"),
        ("1/0", "must be a number"),
        ("nan", "must be a number"),
        ("1e30", "too large"),
        ("1e999999999", "an exponent of at most 400"),
        ("1e-999999999", "an exponent of at most 400"),
        ("9" * 101, "at most 100 characters"),
    ],
)
def test_a_price_that_cannot_be_says_what_to_write(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rate_nanousd_per_token(text)


def test_an_amount_of_money_may_be_larger_than_a_price() -> None:
    assert amount_nanousd("5000") == 5000 * NANOUSD
    assert amount_nanousd("1e9") == AMOUNT_NANOUSD_MAX < 2**63
    with pytest.raises(ValueError, match=r"too large; at most 1000000000$"):
        amount_nanousd("1000000000.000000001")
    with pytest.raises(ValueError, match=r"too large; at most 1000$"):
        nanousd("5000")


def test_amounts_together_are_no_more_than_one_may_be() -> None:
    assert amount_in_all(1, AMOUNT_NANOUSD_MAX - 1) == AMOUNT_NANOUSD_MAX
    with pytest.raises(AmountTooLarge, match=r"at most 1000000000$"):
        amount_in_all(1, AMOUNT_NANOUSD_MAX)


def card(name: str, **fields: object) -> RateCard:
    return RateCard(name, Rates(1), **fields)  # type: ignore[arg-type]  # any field of a card


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {}),
        ({"model": "m"}, {"model": "m", "from_s": 5}),
        ({"until_s": 10}, {"from_s": 9}),
        ({"from_s": 1, "until_s": 100}, {"from_s": 50, "until_s": 60}),
        ({"until_s": 100}, {"until_s": 5}),
    ],
)
def test_cards_for_the_same_requests_at_the_same_time_are_refused(
    first: dict[str, object], second: dict[str, object]
) -> None:
    [line] = problems([card("a", **first), card("b", **second)])
    assert "overlaps" in line
    assert "let until of" in line
    with pytest.raises(AssertionError):
        PriceBook(1, [card("a", **first), card("b", **second)])


def test_a_card_holds_from_its_first_second_and_not_at_its_end() -> None:
    book = PriceBook(1, [card("a", from_s=10, until_s=20)])
    held = [Priced(ACME, "m", PriorityClass.STANDARD, at_s) for at_s in (9.9, 10, 19.9, 20)]
    assert [book.find(each) is not None for each in held] == [False, True, True, False]


def test_a_card_may_begin_when_another_ends_or_be_more_specific() -> None:
    assert not problems([card("a", until_s=10), card("b", from_s=10), card("c", model="m")])


def test_an_overlap_is_found_behind_a_card_in_between() -> None:
    long, short = card("long", from_s=0, until_s=100), card("s", from_s=1, until_s=2)
    late = card("late", from_s=50, until_s=60)
    assert [line.split(":")[0] for line in problems([long, short, late])] == ["s", "late"]


def test_a_name_twice_and_an_end_before_the_beginning_are_refused() -> None:
    lines = problems([card("a", from_s=5, until_s=5), card("a", model="m")])
    assert lines == [
        "a: until must be later than from",
        "a: two cards have this name; names must differ",
    ]
