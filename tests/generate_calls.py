"""Calls of the engine seam for tests that care about few of their fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from serve_app.core.types import PriorityClass, RequestId
from serve_app.engine.api import Endpoint, GenerateCall


def generate_call(
    name: str = "r", body: Mapping[str, Any] | bytes = b"{}", **fields: Any
) -> GenerateCall:
    """Return a streamed Standard call; a mapping is encoded, ``fields`` replace what is set."""
    set_here: dict[str, Any] = {
        "request_id": RequestId(name),
        "endpoint": Endpoint.COMPLETIONS,
        "body": body if isinstance(body, bytes) else json.dumps(body).encode(),
        "stream": True,
        "tenant": "acme",
        "cache_salt": "salt",
        "priority_class": PriorityClass.STANDARD,
    }
    return GenerateCall(**(set_here | fields))
