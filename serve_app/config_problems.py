"""What is wrong with a configuration, in lines that name the field and the fix."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

_SHOWN_CHARACTERS = 60


def path(*location: str | int) -> str:
    """Return a location as ``applications[1].args.engine``."""
    text = ""
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text


def unknown(where: str, name: str, known: Iterable[str]) -> str:
    """Return the line for a name that is not one of ``known``."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(names) or 'none'}"
    return f"{where}: unknown field; {hint}"


def from_validation(
    error: ValidationError, model: type[BaseModel], data: object, prefix: str
) -> list[str]:
    """Return one line per problem in ``error``, raised when ``data`` became a ``model``.

    ``prefix`` is the path of ``data`` in the file. Unknown fields are matched with the
    names of the model they stand in.
    """
    return [_line(details, model, data, prefix) for details in error.errors(include_url=False)]


def _line(details: ErrorDetails, model: type[BaseModel], data: object, prefix: str) -> str:
    real = _real_location(details["loc"], data)
    where = path(prefix, *real) if prefix else path(*real)
    kind = details["type"]
    owner = _model_at(model, details["loc"][:-1])
    name = str(details["loc"][-1]) if details["loc"] else ""
    if kind == "extra_forbidden":
        return unknown(where, name, owner.model_fields if owner else ())
    if kind == "missing":
        return f"{where}: required{_description(owner, name)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return f"{where}.kind: {_tag_problem(details)}"
    problem = details["msg"].removeprefix("Value error, ")
    problem = problem.replace("Input should be", "must be").replace("Input should", "must")
    if kind == "value_error":
        return f"{where}: {problem}"
    problem = problem[:1].lower() + problem[1:]
    return f"{where}: {problem}; got {_shown(details['input'])}{_description(owner, name)}"


def _tag_problem(details: ErrorDetails) -> str:
    context = details.get("ctx", {})
    expected = context.get("expected_tags", "one of the known kinds")
    if "tag" not in context:
        return "required; must be vllm or sim"
    near = get_close_matches(str(context["tag"]), expected.replace("'", "").split(", "), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"must be one of {expected}; got {context['tag']!r:.40}{hint}"


def _description(owner: type[BaseModel] | None, name: str) -> str:
    field = owner.model_fields.get(name) if owner else None
    return f" ({field.description.rstrip('.')})" if field and field.description else ""


def _real_location(location: Sequence[str | int], data: object) -> list[str | int]:
    """Drop the steps that pydantic adds for union members: they are not in the file."""
    kept: list[str | int] = []
    for position, step in enumerate(location):
        is_last = position == len(location) - 1
        if isinstance(data, Mapping) and (step in data or is_last):
            kept.append(step)
            data = data.get(step)
        elif isinstance(data, list) and isinstance(step, int) and step < len(data):
            kept.append(step)
            data = data[step]
    return kept


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the model that a location ends in, following fields, mappings and union tags."""
    found: list[type[BaseModel]] = [model]
    for step in location:
        fields = [m.model_fields[str(step)] for m in found if str(step) in m.model_fields]
        if fields:
            found = [m for field in fields for m in _models_in(field.annotation)]
        else:
            tagged = [m for m in found if _tag_of(m) == step]
            found = tagged or found
    return found[0] if found else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    if origin is None or origin is Literal:
        return []
    if origin in (Union, types.UnionType, Annotated) or isinstance(origin, type):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []


def _tag_of(model: type[BaseModel]) -> object:
    field = model.model_fields.get("kind")
    return field.default if field else None


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else f"{value!r:.{_SHOWN_CHARACTERS}}"
