"""The import contracts hold, and each of them is seen to fail on a planted violation."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LAYERS = "layers"
WIRING = "deployments are wired"
CORE = "core is pure"
SIMULATOR = "the simulator stands on core"
VLLM = "only the vLLM engine imports vLLM"
RAY = "Ray is imported where"

# (beginning of the contract's name, file, line planted at its end, what the report says)
PLANTS = [
    (
        LAYERS,
        "telemetry/metrics.py",
        "import serve_app.gateway.http",
        "metrics -> serve_app.gateway",
    ),
    (
        LAYERS,
        "ledger/store.py",
        "import serve_app.gateway.http",
        "ledger.store -> serve_app.gateway",
    ),
    (LAYERS, "errors.py", "import serve_app.config", "errors -> serve_app.config"),
    (LAYERS, "stray.py", "", "stray"),
    (WIRING, "commands/version.py", "import serve_app.router", "version -> serve_app.router"),
    (WIRING, "terminal.py", "from serve_app.engine import replica", "terminal -> serve_app.engine"),
    (CORE, "core/policy.py", "import time", "core.policy -> time"),
    (CORE, "core/routing/loads.py", "from random import random", "core.routing.loads -> random"),
    (CORE, "core/types.py", "import pydantic", "core.types -> pydantic"),
    (SIMULATOR, "sim/node.py", "import serve_app.config", "sim.node -> serve_app.config"),
    (SIMULATOR, "sim/workload.py", "import asyncio", "sim.workload -> asyncio"),
    (VLLM, "engine/transport.py", "import vllm", "engine.transport -> vllm"),
    (VLLM, "gateway/http.py", "def late():\n    from torch import nn", "gateway.http -> torch"),
    (RAY, "gate.py", "from ray import serve", "gate -> ray"),
]

PURE_LIBRARY = {
    *("__future__", "abc", "array", "bisect", "collections", "contextlib", "copy"),
    *("dataclasses", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "math"),
    *("operator", "statistics", "types", "typing", "zlib"),
}


def contract_names() -> list[str]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return [c["name"] for c in tomllib.load(file)["tool"]["importlinter"]["contracts"]]


def report(folder: Path) -> str:
    """Return what the linter says of the package under ``folder``."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert bool(broken_contracts(done.stdout)) == bool(done.returncode), done.stdout + done.stderr
    return done.stdout


def broken_contracts(text: str) -> list[str]:
    """Return the names of the contracts that a report calls broken."""
    return [
        name
        for name in contract_names()
        for line in text.splitlines()
        if line.startswith(name) and "BROKEN" in line
    ]


def copy_package(folder: Path) -> None:
    """Put a copy of the package and its contracts into ``folder``."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "serve_app", folder / "serve_app", ignore=ignored)


@pytest.fixture(scope="module")
def planted_report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report on a copy in which every violation is planted; one run takes seconds."""
    folder = tmp_path_factory.mktemp("planted")
    copy_package(folder)
    for _, file, line, _ in PLANTS:
        with open(folder / "serve_app" / file, "a") as module:
            module.write(f"\n{line}\n")
    return report(folder)


def test_every_contract_holds(tmp_path: Path) -> None:
    copy_package(tmp_path)

    assert broken_contracts(report(tmp_path)) == []


@pytest.mark.parametrize(("contract", "file", "line", "said"), PLANTS)
def test_a_planted_violation_breaks_its_contract(
    planted_report: str, contract: str, file: str, line: str, said: str
) -> None:
    [broken] = [n for n in broken_contracts(planted_report) if n.startswith(contract)]
    # The detail of a contract stands under its underlined name, up to the next one.
    _, _, after = planted_report.partition(f"\n{broken}\n-")
    detail = re.split(r"\n\S[^\n]*\n-{5,}\n", after, maxsplit=1)[0]

    assert said in detail, f"{line!r} in {file} went unseen"


def test_every_contract_has_a_planted_violation() -> None:
    planted = {contract for contract, *_ in PLANTS}

    assert [name for name in contract_names() if not name.startswith(tuple(planted))] == []


def imports_of(source: str) -> set[str]:
    """Return the top-level names of the absolute imports anywhere in a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(
    "path", sorted((ROOT / "serve_app" / "core").rglob("*.py")), ids=lambda path: path.name
)
def test_core_imports_itself_and_a_short_list_of_the_standard_library(path: Path) -> None:
    """The contract forbids what is known to be impure; this allows what is known to be pure."""
    foreign = {
        name
        for name in imports_of(path.read_text())
        if not name.startswith("serve_app.core") and name.split(".")[0] not in PURE_LIBRARY
    }

    assert foreign == set()
