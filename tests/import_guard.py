"""A pytest plugin under which importing Ray, torch or vLLM fails.

`make test-fast` loads it: a minute-long suite stays one only while nothing in it
drags in seconds of imports.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest

HEAVY = frozenset({"ray", "torch", "vllm"})


class ImportGuard:
    """A finder that is asked first, and refuses heavy packages."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in HEAVY:
            raise ImportError(f"no {name} in fast tests: mark the test, or import it in there")
        return None


def pytest_configure(config: pytest.Config) -> None:
    guard = ImportGuard()
    sys.meta_path.insert(0, guard)
    config.add_cleanup(lambda: sys.meta_path.remove(guard))
