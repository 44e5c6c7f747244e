"""How a client is told what is wrong with its request: path, message and OpenAI's code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import orjson
from pydantic import ValidationError

from serve_app.errors import InvalidRequest

_CODES = {
    "missing": "missing_required_parameter",
    "literal_error": "invalid_value",
    "enum": "invalid_value",
    "greater_than": "number_below_min_value",
    "greater_than_equal": "number_below_min_value",
    "less_than": "number_above_max_value",
    "less_than_equal": "number_above_max_value",
    "too_long": "array_above_max_length",
    "too_short": "empty_array",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
}
_PROBLEMS = {
    "model_type": "it must be an object",
    "dict_type": "it must be an object",
    "list_type": "it must be an array",
    "too_short": "it must not be empty",
}
_CONSTANT = re.compile(r"-?(?:NaN|Infinity|inf|nan)\b")
_KEY_BEFORE = re.compile(r'"([^"\\]{1,64})"\s*:\s*\[?[-\s]*$')
_SHOWN_CHARACTERS = 40
_SHOWN_PATH_CHARACTERS = 200


def refuse(param: str | None, problem: str, code: str = "invalid_value") -> NoReturn:
    """Raise InvalidRequest with ``problem`` behind the parameter's name."""
    message = f"Invalid '{param}': {problem}." if param else f"{problem}."
    raise InvalidRequest(message, param=param, code=code)


def path(*location: str | int) -> str:
    """Return a location the way OpenAI writes it: ``messages[3].role``."""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object in ``body``.

    Raises:
        InvalidRequest: not UTF-8, not JSON (NaN and trailing text included), too deeply
            nested, or not an object.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        _refuse_json(body, error)
    if not isinstance(value, dict):
        refuse(None, f"The body must be a JSON object, not {_kind(value)}", "invalid_json")
    return value


def from_validation(error: ValidationError, data: object) -> InvalidRequest:
    """Return the first problem of ``error`` as the client sees it; ``data`` is the input."""
    first = error.errors(include_url=False, include_context=False)[0]
    param = path(*_real_location(first["loc"], data))[:_SHOWN_PATH_CHARACTERS] or None
    kind = first["type"]
    code = _CODES.get(kind, "invalid_type" if kind.endswith("_type") else "invalid_value")
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    else:
        problem = _PROBLEMS.get(kind, first["msg"][:1].lower() + first["msg"][1:])
        message = f"Invalid '{param}': {problem}{_shown(first['input'])}."
    return InvalidRequest(message, param=param, code=code)


def _refuse_json(body: bytes, error: orjson.JSONDecodeError) -> NoReturn:
    if not body:
        refuse(None, "The body is empty; send a JSON object", "invalid_json")
    try:
        text = body.decode()
    except UnicodeDecodeError as undecodable:
        problem = f"The body is not valid UTF-8 (byte {undecodable.start})"
        refuse(None, problem, "invalid_json")
    # The parser stops at the constant or behind its first character, a minus perhaps.
    constant = _CONSTANT.match(text, max(error.pos - 1, 0)) or _CONSTANT.match(text, error.pos)
    if constant:
        key = _KEY_BEFORE.search(text[max(0, constant.start() - 80) : constant.start()])
        param = key.group(1) if key else None
        refuse(param, f"{constant.group()} is not a JSON number", "invalid_json")
    refuse(None, f"The body is not valid JSON: {error}", "invalid_json")


def _real_location(location: Sequence[str | int], data: object) -> list[str | int]:
    """Keep the steps that exist in ``data``, and the last one of a missing field.

    pydantic adds the names of union members and validators to a location.
    """
    kept: list[str | int] = []
    for step in location:
        if isinstance(data, dict) and isinstance(step, str):
            kept.append(step)
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            kept.append(step)
            data = data[step]
    return kept


def _shown(value: object) -> str:
    """Scalars are shown, texts are not: an error may end up in somebody's log."""
    if value is None or isinstance(value, bool | int | float):
        return f" (got {orjson.dumps(value).decode():.{_SHOWN_CHARACTERS}})"
    return f" (got {_kind(value)})"


def _kind(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")
