"""A pytest plugin that fails the run if Ray, torch or vLLM got imported in it.

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


class ImportWitness:
    """A finder that finds nothing and remembers who asked for a heavy package first."""

    def __init__(self) -> None:
        self.current = "before the first test"
        self.imports: dict[str, str] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in HEAVY:
            self.imports.setdefault(name, self.current)
        return None


class ImportGuard:
    def __init__(self, witness: ImportWitness) -> None:
        self._witness = witness

    def pytest_collectstart(self, collector: pytest.Collector) -> None:
        self._witness.current = f"collecting {collector.nodeid}"

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._witness.current = nodeid

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._witness.imports and session.exitstatus in (0, 5):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, where in sorted(self._witness.imports.items()):
            terminalreporter.write_line(
                f"FAILED: {name} was imported ({where}); mark the test or import it later",
                red=True,
            )


def pytest_configure(config: pytest.Config) -> None:
    witness = ImportWitness()
    sys.meta_path.insert(0, witness)
    config.add_cleanup(lambda: sys.meta_path.remove(witness))
    config.pluginmanager.register(ImportGuard(witness))
