"""Price books as files: exact amounts, and every mistake named with its field and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.core.pricing import RateCard, Rates
from serve_app.core.types import PriorityClass, TenantId
from serve_app.errors import ConfigError
from serve_app.price_file import load_prices, to_yaml

GOOD = """
currency: USD
cards:
  everyone: {input: 0.1, cached_input: "0.010", output: 1}
  acme 2026:
    tenant: acme
    model: large
    class: sheddable
    batch: true
    from: 2026-01-01
    until: 2026-07-01T12:00:00+02:00
    input: 2.5
    output: 1e1
    request: 0.0001
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "prices.yaml"
    file.write_text(text)
    return file


def test_dollars_per_million_tokens_become_whole_nano_dollars_per_token(tmp_path: Path) -> None:
    first, second = load_prices(write(tmp_path, GOOD))
    assert first == RateCard("everyone", Rates(100, 10, 1000, 0))
    assert second == RateCard(
        "acme 2026",
        # A card without a price for cached tokens has none that is lower.
        Rates(2500, 2500, 10_000, 100_000),
        TenantId("acme"),
        "large",
        PriorityClass.SHEDDABLE,
        True,
        from_s=1_767_225_600,
        until_s=1_782_900_000,
    )


def test_a_book_that_is_written_is_read_back_the_same(tmp_path: Path) -> None:
    cards = load_prices(write(tmp_path, GOOD))
    assert load_prices(write(tmp_path, to_yaml(cards))) == cards
    assert load_prices(write(tmp_path, to_yaml([]))) == []


def card(fields: str) -> str:
    return "currency: USD\ncards:\n  one: {" + fields + "}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (card("input: -1, output: 1"), "cards.one.input: must not be negative; got -1"),
        (
            card("input: 0.0125, output: 1"),
            "cards.one.input: must be a multiple of 0.001, a whole number of nano-dollars; "
            "got 0.0125, write 0.012 or 0.013",
        ),
        (
            card("input: 1, output: 1, request: 0.00000000015"),
            "cards.one.request: must be a multiple of 0.000000001, a whole number of "
            "nano-dollars; got 1.5e-10, write 0 or 0.000000001",
        ),
        (
            card("input: cheap, output: 1"),
            "cards.one.input: must be a number of dollars; got 'cheap'",
        ),
        (card("input: true, output: 1"), "cards.one.input: must be a number of dollars"),
        (card("input: .inf, output: 1"), "cards.one.input: must be a number of dollars; got 'inf'"),
        (card("input: 1"), "cards.one.output: required"),
        (card("inptu: 1, output: 1"), "cards.one.inptu: unknown field; did you mean input?"),
        (card("input: 1, output: 1, class: vip"), "cards.one.class: must be 'critical',"),
        (card("input: 1, output: 1, from: soon"), "cards.one.from: must be a date or time"),
        (
            card("input: 1, output: 1, from: 2026-02-01, until: 2026-01-01"),
            "cards.one: until must be later than from",
        ),
        (
            "currency: USD\ncards:\n  a: {input: 1, output: 1}\n  b: {input: 2, output: 2}\n",
            "cards.b: overlaps a, which is for the same requests",
        ),
        ("currency: EUR\ncards: {}\n", "currency: must be USD, in which the ledger counts"),
        ("cards: {}\n", "currency: required"),
        ("currency: USD\ncards: {a: {input: 1, output: 1}, a: {}}\n", "stands twice"),
        ("- 1\n", "must be a mapping with `currency: and cards:`"),
    ],
)
def test_a_mistake_is_named_with_its_field_and_the_fix(
    tmp_path: Path, text: str, line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_prices(write(tmp_path, text))
    assert line in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/prices.yaml: ")


def test_every_mistake_is_told_at_once(tmp_path: Path) -> None:
    text = "currency: GBP\ncards:\n  one: {input: -1, output: x}\n"
    with pytest.raises(ConfigError) as caught:
        load_prices(write(tmp_path, text))
    assert len(str(caught.value).splitlines()) == 3
