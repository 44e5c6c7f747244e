"""JSON patches (RFC 6902) as a Kubernetes API server applies them: all of one or nothing."""

from __future__ import annotations

import copy
from typing import Any

OPERATIONS = ("add", "remove", "replace", "test")


class PatchRefused(Exception):
    """A patch that does not apply; the message names the operation."""


def apply(document: Any, operations: Any) -> Any:
    """Return the patched copy of a document.

    Raises:
        PatchRefused: the patch is no list of operations, names what is not there, or a test fails.
    """
    if not isinstance(operations, list):
        raise PatchRefused("a JSON patch is a list of operations")
    patched = copy.deepcopy(document)
    for operation in operations:
        _check(operation)
        parent, key = _find(patched, operation)
        _apply(parent, key, operation)
    return patched


def _check(operation: Any) -> None:
    if not isinstance(operation, dict):
        raise PatchRefused(f"{operation!r} is no operation")
    if operation.get("op") not in OPERATIONS:
        raise PatchRefused(f"{operation!r}: op must be one of {', '.join(OPERATIONS)}")
    wanted = {"op", "path"} | (set() if operation["op"] == "remove" else {"value"})
    if set(operation) != wanted:
        raise PatchRefused(f"{operation!r}: its fields must be {', '.join(sorted(wanted))}")
    path = operation["path"]
    if not isinstance(path, str) or not path.startswith("/"):
        raise PatchRefused(f"{operation!r}: path must start with /")


def _find(document: Any, operation: dict[str, Any]) -> tuple[Any, str | int]:
    """Return the container that an operation changes, and the key or index in it."""
    steps = [step.replace("~1", "/").replace("~0", "~") for step in operation["path"].split("/")]
    here = document
    for step in steps[1:-1]:
        here = _at(here, _key(here, step, operation), operation)
    return here, _key(here, steps[-1], operation)


def _key(container: Any, step: str, operation: dict[str, Any]) -> str | int:
    if isinstance(container, dict):
        return step
    if isinstance(container, list):
        if step == "-" and operation["op"] == "add":
            return len(container)
        if step.isdigit():
            return int(step)
    raise PatchRefused(f"{operation!r}: there is no {step!r}")


def _at(container: Any, key: str | int, operation: dict[str, Any]) -> Any:
    try:
        return container[key]
    except (KeyError, IndexError):
        raise PatchRefused(f"{operation!r}: the document has no {key!r} there") from None


def _apply(container: Any, key: str | int, operation: dict[str, Any]) -> None:
    if operation["op"] == "add":
        if isinstance(container, list):
            if int(key) > len(container):
                raise PatchRefused(f"{operation!r}: the list is shorter")
            container.insert(int(key), operation["value"])
        else:
            container[key] = operation["value"]
        return
    present = _at(container, key, operation)
    if operation["op"] == "remove":
        del container[key]
    elif operation["op"] == "replace":
        container[key] = operation["value"]
    elif present != operation["value"]:
        raise PatchRefused(f"{operation!r}: it is {present!r}")
