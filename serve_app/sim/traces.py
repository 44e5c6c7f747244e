"""Traces by path: this project's CSV and three public formats, told apart by their header.

| format | columns |
|---|---|
| headrace | arrival_s,tenant,class,prompt_tokens,output_tokens[,prefix_hashes] |
| Azure LLM inference | TIMESTAMP,ContextTokens,GeneratedTokens |
| lengths | timestamp_ms,prompt_tokens,output_tokens |
| Mooncake | JSON lines: timestamp (ms), input_length, output_length, hash_ids (512 tokens) |

``prefix_hashes`` are integers separated by ``;`` or spaces. No trace is shipped.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from io import TextIOBase
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any

from serve_app.core.types import PriorityClass, TenantId
from serve_app.sim.workload import CHAT_OUTPUTS, CHAT_PROMPTS, Arrival

MOONCAKE_SEGMENT_TOKENS = 512
PROMPT_TOKENS_MOST = 10_000_000


class TraceError(ValueError):
    """A trace that cannot be read; the message names the file, the line and the fix."""


@dataclass(frozen=True, slots=True)
class TraceDefaults:
    """What a trace without a column gets.

    ``tenants`` are dealt in turn, ``classes`` drawn by share, lengths by chat's
    distribution unless given. ``time_scale`` multiplies arrival times: 0.5 doubles the rate.
    """

    tenants: tuple[str, ...] = ("tenant",)
    classes: Mapping[PriorityClass, float] | None = None
    time_scale: float = 1.0
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    max_tokens: int | None = None
    segment_tokens: int = 16
    seed: int = 0


def read_trace(path: Path, defaults: TraceDefaults) -> Iterator[Arrival]:
    """Yield a trace's arrivals in file order, the first at its own offset from time zero.

    Raises:
        TraceError: the file is missing, of no known format, out of order, or has a value
            that is no number or out of range.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            yield from _read(path, lines, defaults)
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}: not a text file in UTF-8") from error


def _read(path: Path, lines: TextIOBase, defaults: TraceDefaults) -> Iterator[Arrival]:
    header = lines.readline()
    rows: Iterator[Mapping[str, Any]]
    if header.lstrip().startswith("{"):
        rows = _json_rows(path, chain([header], lines))
        convert, segment_tokens = _mooncake, MOONCAKE_SEGMENT_TOKENS
    else:
        columns = next(csv.reader([header]), [])
        rows = csv.DictReader(lines, fieldnames=columns)
        convert, segment_tokens = _converter(path, columns), defaults.segment_tokens
    source = random.Random(f"{defaults.seed}:trace")
    first_s: float | None = None
    previous_s = 0.0
    for number, row in enumerate(rows):
        try:
            values = convert(row)
            if first_s is None:
                first_s = values["arrival_s"] if convert is _azure else 0.0
            values["arrival_s"] = (values["arrival_s"] - first_s) * defaults.time_scale
            arrival = _arrival(values, defaults, source, number, segment_tokens)
        except KeyError as error:
            raise TraceError(f"{path}, row {number + 1}: {error} is missing") from error
        except (ValueError, TypeError) as error:
            raise TraceError(f"{path}, row {number + 1}: {error}") from error
        if arrival.arrival_s < previous_s:
            raise TraceError(f"{path}, row {number + 1}: earlier than the row before; sort by time")
        previous_s = arrival.arrival_s
        yield arrival


def _json_rows(path: Path, lines: Iterator[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TraceError(f"{path}, row {number + 1}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TraceError(f"{path}, row {number + 1}: not a JSON object")
        yield row


def _converter(path: Path, columns: list[str]) -> Any:
    if "arrival_s" in columns:
        return _own
    if "TIMESTAMP" in columns and "ContextTokens" in columns:
        return _azure
    if "timestamp_ms" in columns:
        return _lengths
    raise TraceError(
        f"{path}: no known trace; its first line must have arrival_s (and any of tenant, class, "
        "prompt_tokens, output_tokens, prefix_hashes), or be one of the public formats"
    )


def _own(row: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"arrival_s": _number(row, "arrival_s")}
    for column in ("prompt_tokens", "output_tokens"):
        if row.get(column):
            values[column] = _whole(row, column)
    if row.get("tenant"):
        values["tenant"] = row["tenant"]
    if row.get("class"):
        values["class"] = _priority_class(row["class"])
    if row.get("prefix_hashes"):
        hashes = row["prefix_hashes"].replace(";", " ").split()
        values["prefix_hashes"] = tuple(int(each) for each in hashes)
    return values


def _azure(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "arrival_s": datetime.fromisoformat(row["TIMESTAMP"][:26] + "+00:00").timestamp(),
        "prompt_tokens": _whole(row, "ContextTokens"),
        "output_tokens": _answer(row, "GeneratedTokens"),
    }


def _lengths(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "arrival_s": _number(row, "timestamp_ms") / 1000.0,
        "prompt_tokens": _whole(row, "prompt_tokens"),
        "output_tokens": _answer(row, "output_tokens"),
    }


def _mooncake(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "arrival_s": _number(row, "timestamp") / 1000.0,
        "prompt_tokens": _whole(row, "input_length"),
        "output_tokens": _answer(row, "output_length"),
        "prefix_hashes": tuple(int(each) for each in row.get("hash_ids", ())),
    }


def _whole(row: Mapping[str, Any], column: str) -> int:
    try:
        return int(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{column} is {row[column]!r:.40}; it must be a whole number") from None


def _number(row: Mapping[str, Any], column: str) -> float:
    try:
        return float(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{column} is {row[column]!r:.40}; it must be a number") from None


def _answer(row: Mapping[str, Any], column: str) -> int:
    """Return an answer's length; published traces hold empty ones, which cost a token too."""
    return _whole(row, column) or 1


def _priority_class(name: str) -> PriorityClass:
    try:
        return PriorityClass[name.strip().upper()]
    except KeyError:
        known = ", ".join(each.name.lower() for each in PriorityClass)
        raise ValueError(f"class {name!r:.40} is none of: {known}") from None


def _arrival(
    values: Mapping[str, Any],
    defaults: TraceDefaults,
    source: random.Random,
    number: int,
    segment_tokens: int,
) -> Arrival:
    arrival_s = values["arrival_s"]
    if not isfinite(arrival_s) or arrival_s < 0:
        raise ValueError(f"arrival at {arrival_s} s; it must be a number of at least 0")
    prompt_tokens = values.get("prompt_tokens")
    if prompt_tokens is None:
        prompt_tokens = defaults.prompt_tokens or CHAT_PROMPTS.draw(source)
    output_tokens = values.get("output_tokens")
    if output_tokens is None:
        output_tokens = defaults.output_tokens or CHAT_OUTPUTS.draw(source)
    for name, tokens in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        if not 1 <= tokens <= PROMPT_TOKENS_MOST:
            raise ValueError(f"{name} is {tokens}; it must be from 1 to {PROMPT_TOKENS_MOST}")
    chosen = values.get("class")
    if chosen is None:
        shares = defaults.classes or {PriorityClass.STANDARD: 1.0}
        chosen = source.choices(list(shares), list(shares.values()))[0]
    tenant = values.get("tenant") or defaults.tenants[number % len(defaults.tenants)]
    hashes = values.get("prefix_hashes", ())[: prompt_tokens // segment_tokens]
    return Arrival(
        arrival_s,
        TenantId(tenant),
        chosen,
        prompt_tokens,
        output_tokens,
        defaults.max_tokens or max(output_tokens, CHAT_OUTPUTS.most_tokens),
        hashes,
        kind="trace",
    )
