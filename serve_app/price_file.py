"""Price books as YAML: dollars per million tokens in, whole nano-dollars per token out.

currency: USD
cards:
  everyone: {input: 0.10, cached_input: 0.01, output: 0.40}
  acme on large in 2026:
    tenant: acme
    model: large
    from: 2026-01-01
    until: 2027-01-01
    input: 0.50
    output: 2.00
    request: 0.0001          # dollars per request
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from serve_app.config_base import Strict
from serve_app.config_file import read_document
from serve_app.config_problems import from_validation
from serve_app.core.pricing import (
    CURRENCY,
    RateCard,
    Rates,
    dollars,
    nanousd,
    problems,
    rate_nanousd_per_token,
)
from serve_app.core.types import PriorityClass, TenantId
from serve_app.errors import ConfigError

_MILLION = 10**6


@dataclass(frozen=True, slots=True)
class BookLine:
    """A price book in a list. ``created_at_s`` is wall seconds."""

    version: int
    created_at_s: float
    cards: int
    note: str


def _text(value: object) -> str:
    """Return a YAML number as it was written, as far as that is known."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number of dollars")
    return value if isinstance(value, str) else repr(value)


def _seconds(value: object) -> int:
    """Return a date, or a time, as wall seconds; without a zone it is UTC."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(
                f"must be a date or time such as 2026-01-31 or 2026-01-31T05:00Z; got {value!r:.30}"
            ) from None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        raise ValueError("must be a date or time such as 2026-01-31")
    whole = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    if whole.microsecond:
        raise ValueError("must be a whole second")
    return int(whole.timestamp())


TokenPrice = Annotated[int, BeforeValidator(lambda v: rate_nanousd_per_token(_text(v)))]
RequestPrice = Annotated[int, BeforeValidator(lambda v: nanousd(_text(v)))]
Moment = Annotated[int, BeforeValidator(_seconds)]
CardName = Annotated[str, Field(min_length=1, max_length=128)]


class CardSettings(Strict):
    """One rate card. ``input``, ``cached_input`` and ``output``: dollars per million tokens."""

    input: TokenPrice
    output: TokenPrice
    cached_input: TokenPrice | None = Field(None, description="As input if unset.")
    request: RequestPrice = Field(0, description="Dollars per request.")
    tenant: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    class_: Literal["critical", "standard", "sheddable"] | None = Field(None, alias="class")
    batch: bool | None = None
    from_: Moment | None = Field(None, alias="from")
    until: Moment | None = None

    def to_core(self, name: str) -> RateCard:
        """Return the card as core reads it."""
        cached = self.input if self.cached_input is None else self.cached_input
        return RateCard(
            name=name,
            rates=Rates(self.input, cached, self.output, self.request),
            tenant=None if self.tenant is None else TenantId(self.tenant),
            model=self.model,
            priority_class=None if self.class_ is None else PriorityClass[self.class_.upper()],
            batch=self.batch,
            from_s=self.from_,
            until_s=self.until,
        )


def _known_currency(value: object) -> object:
    if value != CURRENCY:
        raise ValueError(
            f"must be {CURRENCY}, in which the ledger counts; convert the prices; got {value!r:.40}"
        )
    return value


class PriceSettings(Strict):
    """A whole price book."""

    currency: Annotated[str, BeforeValidator(_known_currency)]
    cards: dict[CardName, CardSettings] = Field(max_length=100_000)


def load_prices(file: Path | str) -> list[RateCard]:
    """Read and check a price book.

    Raises:
        ConfigError: every problem found, one per line, each with its field and the fix.
    """
    location = Path(file)
    document = read_document(location, "currency: and cards:")
    try:
        return checked_cards(document)
    except ConfigError as error:
        lines = str(error).splitlines()
        raise ConfigError("\n".join(f"{location}: {line}" for line in lines)) from None


def checked_cards(document: Mapping[str, Any]) -> list[RateCard]:
    """Return the cards of a price book that was read.

    Raises:
        ConfigError: every problem found, one per line, each with its field and the fix.
    """
    try:
        settings = PriceSettings.model_validate(document)
    except ValidationError as error:
        raise ConfigError("\n".join(from_validation(error, PriceSettings, document, ""))) from None
    cards = [card.to_core(name) for name, card in settings.cards.items()]
    found = [f"cards.{line}" for line in problems(cards)]
    if found:
        raise ConfigError("\n".join(found))
    return cards


def to_yaml(cards: Iterable[RateCard]) -> str:
    """Return cards as a file that ``load_prices`` reads back to the same."""
    return yaml.safe_dump(to_document(cards), sort_keys=False, allow_unicode=True)


def to_document(cards: Iterable[RateCard]) -> dict[str, Any]:
    """Return cards as ``checked_cards`` reads them back to the same."""
    return {"currency": CURRENCY, "cards": {card.name: _fields(card) for card in cards}}


def _fields(card: RateCard) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "tenant": card.tenant,
        "model": card.model,
        "class": None if card.priority_class is None else card.priority_class.name.lower(),
        "batch": card.batch,
        "from": None if card.from_s is None else datetime.fromtimestamp(card.from_s, UTC),
        "until": None if card.until_s is None else datetime.fromtimestamp(card.until_s, UTC),
    }
    rates = card.rates
    return {
        **{name: value for name, value in fields.items() if value is not None},
        "input": dollars(rates.input_nanousd * _MILLION),
        "cached_input": dollars(rates.cached_input_nanousd * _MILLION),
        "output": dollars(rates.output_nanousd * _MILLION),
        "request": dollars(rates.request_nanousd),
    }
