"""Who changed what: keys, budgets, prices, limits, corrections; and how it is asked for and told.

A row of the trail is written in the transaction of the change that it tells of
(``ledger/trail.py``): neither is there without the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from serve_app.usage_report import BadQuery, iso_time

ROWS_MAX: Final = 1000
ROWS_SHOWN: Final = 100
REASON_CHARACTERS: Final = 1000
PARAMETERS: Final = ("limit", "before", "subject", "actor")

Fields = Mapping[str, Any]


class Via(StrEnum):
    """The way by which a change came."""

    HTTP = "http"
    COMMAND = "command"
    CONFIGURATION = "configuration"
    PROGRAM = "program"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who changed something: ``key k7f3m2qa`` over HTTP, ``user@host`` by the command line."""

    name: str
    via: Via


PROGRAM: Final = Actor("headrace", Via.PROGRAM)


@dataclass(frozen=True, slots=True)
class Change:
    """One change. ``before`` is None of what was made, ``after`` of what was removed.

    ``number`` counts all changes without a gap; ``at_s`` is wall seconds.
    """

    number: int
    at_s: float
    actor: Actor
    action: str
    subject: str
    before: Fields | None
    after: Fields | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Reversal:
    """What was taken back of a request's bill; not ``new`` if nothing was left to take back."""

    request_id: str
    amount_nanousd: int
    new: bool


@dataclass(frozen=True, slots=True)
class ChangeQuery:
    """The latest ``limit`` changes, of those with a number below ``before``.

    Only those whose subject is ``subject`` or goes on from it with a space, such as ``key`` or
    ``key k7f3m2qa``; only those of ``actor``.
    """

    limit: int = ROWS_SHOWN
    before: int | None = None
    subject: str | None = None
    actor: str | None = None


def reason_of(text: str) -> str:
    """Return the reason for a correction, as it is kept.

    Raises:
        BadQuery: there is none, or it is too long.
    """
    reason = text.strip()
    if not 0 < len(reason) <= REASON_CHARACTERS or "\0" in reason:
        raise BadQuery("reason", f"must say why, in at most {REASON_CHARACTERS} characters")
    return reason


def change_query(given: Mapping[str, str]) -> ChangeQuery:
    """Return the query that a user wrote.

    Raises:
        BadQuery: a name or a value is none of those that there are.
    """
    for name in given:
        if name not in PARAMETERS:
            raise BadQuery(name[:40], f"unknown; known are {', '.join(PARAMETERS)}")
    before = given.get("before")
    return ChangeQuery(
        _number("limit", given.get("limit", str(ROWS_SHOWN)), ROWS_MAX),
        None if before is None else _number("before", before, 1 << 62),
        given.get("subject") or None,
        given.get("actor") or None,
    )


def change_json(change: Change) -> dict[str, Any]:
    """Return a change as the API shows it."""
    return {
        "object": "admin_change",
        "number": change.number,
        "at": iso_time(change.at_s),
        "actor": change.actor.name,
        "via": change.actor.via.value,
        "action": change.action,
        "subject": change.subject,
        "before": None if change.before is None else dict(change.before),
        "after": None if change.after is None else dict(change.after),
        "note": change.note,
    }


def difference(shown: Mapping[str, Any]) -> str:
    """Return what a change as the API shows it did, in words: ``amount_usd 5 -> 10``."""
    before, after = shown["before"], shown["after"]
    if before is None or after is None:
        return " ".join(f"{name}={_word(value)}" for name, value in (after or before or {}).items())
    return ", ".join(_differences(before, after))


def _differences(before: Fields, after: Fields) -> Iterator[str]:
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if old != new:
            yield f"{name} {_word(old)} -> {_word(new)}"


def _word(value: Any) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, list):
        return ",".join(str(each) for each in value)
    return str(value)


def _number(name: str, text: str, most: int) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:20]) <= most:
        raise BadQuery(name, f"must be a whole number from 1 to {most}; got {text!r:.40}")
    return int(text)
