"""What requests cost: rate cards, in whole nano-dollars per token.

The finest price is one nano-dollar a token, 0.001 dollars per million tokens. The price of a
request is a sum of products of whole numbers, so nothing is ever rounded: prices add up over
requests, hours and tenants to the last nano-dollar, in whatever order they are added.

    price book (version) -> the most specific card in force -> rates -> exact cost

A card says for whom it is by the fields it sets. A card that names the tenant comes before
any that does not; among those, one that names the model; then the class; then batch. Cards
that set the same fields to the same values must not be in force at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Final

from serve_app.core.types import PriorityClass, TenantId, Usage

NANOUSD: Final = 10**9
CURRENCY: Final = "USD"
# A thousand dollars a token: more is a slip, and the product with any token count that
# fits a request stays far inside the 64 bits of a database's integers.
RATE_NANOUSD_MAX: Final = 1000 * NANOUSD
# A billion dollars: what budgets hold and what is spent of them fit 64 bits many times over.
AMOUNT_NANOUSD_MAX: Final = 10**9 * NANOUSD

# A number that takes long to read is none that anybody means.
_CHARACTERS_MAX: Final = 100
_EXPONENT_MAX: Final = 400
_TOKENS_PRICED: Final = 10**6


class AmountTooLarge(ValueError):
    """Amounts of money add up to more than one may be; the message says how much that is."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-dollars per input token, per cached input token, per output token, per request.

    All are whole and not negative.
    """

    input_nanousd: int = 0
    cached_input_nanousd: int = 0
    output_nanousd: int = 0
    request_nanousd: int = 0

    def __post_init__(self) -> None:
        for rate in (
            self.input_nanousd,
            self.cached_input_nanousd,
            self.output_nanousd,
            self.request_nanousd,
        ):
            assert isinstance(rate, int), "a rate is a whole number"
            assert 0 <= rate <= RATE_NANOUSD_MAX, "a rate is out of range"

    def cost_nanousd(self, usage: Usage, requests: int = 1) -> int:
        """Return the exact price of ``usage``; cached prompt tokens are part of the prompt's."""
        fresh = usage.prompt_tokens - usage.cached_prompt_tokens
        return (
            requests * self.request_nanousd
            + fresh * self.input_nanousd
            + usage.cached_prompt_tokens * self.cached_input_nanousd
            + usage.completion_tokens * self.output_nanousd
        )

    def most_nanousd(self, prompt_tokens: int, output_tokens: int) -> int:
        """Return the most that one request of at most so many tokens can cost."""
        dearer = max(self.input_nanousd, self.cached_input_nanousd)
        return self.request_nanousd + prompt_tokens * dearer + output_tokens * self.output_nanousd


FREE: Final = Rates()


@dataclass(frozen=True, slots=True)
class RateCard:
    """Rates and for whom they hold; a field that is None holds for all.

    ``model`` is the name that clients ask for, whichever pool serves it. In force from
    ``from_s`` on and before ``until_s``, wall seconds; None is without beginning or end.
    """

    name: str
    rates: Rates
    tenant: TenantId | None = None
    model: str | None = None
    priority_class: PriorityClass | None = None
    batch: bool | None = None
    from_s: int | None = None
    until_s: int | None = None

    def in_force(self, at_s: float) -> bool:
        """Return whether the card holds at ``at_s``, wall seconds."""
        begun = self.from_s is None or self.from_s <= at_s
        return begun and (self.until_s is None or at_s < self.until_s)


@dataclass(frozen=True, slots=True)
class Priced:
    """What a price depends on. ``at_s`` is when the request came, wall seconds."""

    tenant: TenantId
    model: str
    priority_class: PriorityClass
    at_s: float
    batch: bool = False


_Key = tuple[TenantId | None, str | None, PriorityClass | None, bool | None]


class PriceBook:
    """All cards of one version: immutable, cheap to share and to look up in.

    A book without a card for a request prices it at nothing; ``find`` then says None.
    """

    __slots__ = ("_by_key", "_shapes", "cards", "version")

    def __init__(self, version: int, cards: Iterable[RateCard] = ()) -> None:
        """``cards`` have none of the problems that ``problems`` finds."""
        self.version = version
        self.cards = tuple(cards)
        assert not problems(self.cards), "a price book is checked before it is made"
        by_key: dict[_Key, list[RateCard]] = {}
        for card in self.cards:
            by_key.setdefault(_key(card), []).append(card)
        self._by_key: Mapping[_Key, Sequence[RateCard]] = MappingProxyType(by_key)
        # Most specific first: sorted by which fields are set, the tenant before the model...
        self._shapes = tuple(sorted({_shape(key) for key in by_key}, reverse=True))

    def __reduce__(self) -> tuple[type[PriceBook], tuple[int, tuple[RateCard, ...]]]:
        return PriceBook, (self.version, self.cards)

    def find(self, priced: Priced) -> RateCard | None:
        """Return the most specific card in force for a request, None if there is none."""
        values = (priced.tenant, priced.model, priced.priority_class, priced.batch)
        for tenant, model, class_, batch in self._shapes:
            key: _Key = (
                values[0] if tenant else None,
                values[1] if model else None,
                values[2] if class_ else None,
                values[3] if batch else None,
            )
            for card in self._by_key.get(key, ()):
                if card.in_force(priced.at_s):
                    return card
        return None

    def rates(self, priced: Priced) -> Rates:
        """Return the rates for a request; free of charge where no card holds."""
        card = self.find(priced)
        return FREE if card is None else card.rates


def rate_nanousd_per_token(dollars_per_million: str) -> int:
    """Return a price per million tokens as nano-dollars per token.

    Raises:
        ValueError: it is no number, negative, too large, or finer than 0.001 dollars per
            million tokens; the message says what to write.
    """
    return _whole(dollars_per_million, Fraction(NANOUSD, _TOKENS_PRICED), "0.001")


def nanousd(dollars: str) -> int:
    """Return a price in dollars, such as of a request, as nano-dollars.

    Raises:
        ValueError: it is no number, negative, too large, or finer than a nano-dollar.
    """
    return _whole(dollars, Fraction(NANOUSD), "0.000000001")


def amount_nanousd(dollars: str) -> int:
    """Return an amount of money in dollars, such as a budget's, as nano-dollars.

    Raises:
        ValueError: it is no number, negative, too large, or finer than a nano-dollar.
    """
    return _whole(dollars, Fraction(NANOUSD), "0.000000001", AMOUNT_NANOUSD_MAX)


def amount_in_all(*amounts_nanousd: int) -> int:
    """Return the sum of amounts of money.

    Raises:
        AmountTooLarge: it is more than an amount may be.
    """
    total = sum(amounts_nanousd)
    if total > AMOUNT_NANOUSD_MAX:
        raise AmountTooLarge(
            f"{dollars(total)} dollars in all are too much; at most {dollars(AMOUNT_NANOUSD_MAX)}"
        )
    return total


def dollars(amount_nanousd: int) -> str:
    """Return an amount as dollars, exactly and without an exponent: -1.05, 0.000000001."""
    sign = "-" if amount_nanousd < 0 else ""
    whole, rest = divmod(abs(amount_nanousd), NANOUSD)
    return f"{sign}{whole}" + (f".{rest:09d}".rstrip("0") if rest else "")


def problems(cards: Sequence[RateCard]) -> list[str]:
    """Return what is wrong with cards together: a line each, with the card and the fix."""
    found: list[str] = []
    names: set[str] = set()
    for card in cards:
        if card.name in names:
            found.append(f"{card.name}: two cards have this name; names must differ")
        names.add(card.name)
        if None not in (card.from_s, card.until_s) and card.until_s <= card.from_s:  # type: ignore[operator]  # neither is None
            found.append(f"{card.name}: until must be later than from")
    return found + _overlaps(cards)


def _overlaps(cards: Sequence[RateCard]) -> list[str]:
    by_key: dict[_Key, list[RateCard]] = {}
    for card in cards:
        by_key.setdefault(_key(card), []).append(card)
    found = []
    for same in by_key.values():
        first, *others = sorted(same, key=lambda card: (card.from_s is not None, card.from_s or 0))
        longest = first
        for card in others:
            if longest.until_s is None or card.from_s is None or card.from_s < longest.until_s:
                found.append(
                    f"{card.name}: overlaps {longest.name}, which is for the same requests; "
                    f"let until of {longest.name} be at most from of {card.name}, or set "
                    "tenant, model, class or batch so that one is more specific"
                )
            longest = max(longest, card, key=_end_s)
    return found


def _key(card: RateCard) -> _Key:
    return (card.tenant, card.model, card.priority_class, card.batch)


def _end_s(card: RateCard) -> float:
    return float("inf") if card.until_s is None else card.until_s


def _shape(key: _Key) -> tuple[bool, bool, bool, bool]:
    tenant, model, class_, batch = key
    return (tenant is not None, model is not None, class_ is not None, batch is not None)


def _number(text: str) -> Fraction:
    exponent = text.lower().partition("e")[2]
    try:
        short = len(text) <= _CHARACTERS_MAX and abs(int(exponent or 0)) <= _EXPONENT_MAX
        value = Fraction(text) if short else None
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"must be a number of dollars; got {text!r:.40}") from None
    if value is None:
        raise ValueError(
            f"must have at most {_CHARACTERS_MAX} characters and an exponent of at most "
            f"{_EXPONENT_MAX}; got {text:.40}"
        )
    return value


def _whole(text: str, scale: Fraction, finest: str, most: int = RATE_NANOUSD_MAX) -> int:
    value = _number(text)
    if value < 0:
        raise ValueError(f"must not be negative; got {text:.40}")
    exact = value * scale
    if exact > most:
        raise ValueError(f"is too large; at most {dollars(int(most / scale * NANOUSD))}")
    if exact.denominator != 1:
        lower = exact.numerator // exact.denominator
        below, above = (dollars(int(n / scale * NANOUSD)) for n in (lower, lower + 1))
        raise ValueError(
            f"must be a multiple of {finest}, a whole number of nano-dollars; got {text:.40}, "
            f"write {below} or {above}"
        )
    return int(exact)
