"""Words that must be found nowhere, and where to look for them."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.stack import Stack


def request_lines(stack: Stack) -> list[dict[str, Any]]:
    """Return the request lines in the routers' logs."""
    return [json.loads(line) for line in stack.worker_lines() if '"event":"request"' in line]


def files_with(folder: Path, *words: str) -> list[str]:
    """Return what files under ``folder`` contain any of these words.

    Everything a stack writes lies there: logs of its own and of Ray, journals, the database.
    """
    found = []
    # What a process clears away meanwhile, its journal for one, is passed over.
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if path.is_symlink() or not path.is_file():
                continue
            with suppress(FileNotFoundError):
                content = path.read_bytes()
                found += [str(path) for word in words if word.encode() in content]
    return found
