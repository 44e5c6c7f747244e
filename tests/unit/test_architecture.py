"""The import contracts hold, and each of them is seen to fail on a planted violation."""

from __future__ import annotations

import ast
import os
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

# (beginning of the contract's name, file, line planted at its end)
PLANTS = [
    (LAYERS, "telemetry/metrics.py", "import serve_app.gateway.http"),
    (LAYERS, "ledger/store.py", "import serve_app.gateway.http"),
    (LAYERS, "errors.py", "import serve_app.config"),
    (LAYERS, "stray_module_without_a_layer.py", ""),
    (WIRING, "commands/version.py", "import serve_app.router"),
    (WIRING, "commands/version.py", "from serve_app.engine import replica"),
    (CORE, "core/policy.py", "import time"),
    (CORE, "core/routing/loads.py", "from random import random"),
    (CORE, "core/types.py", "import pydantic"),
    (SIMULATOR, "sim/node.py", "import serve_app.config"),
    (SIMULATOR, "sim/workload.py", "import asyncio"),
    (VLLM, "engine/transport.py", "import vllm"),
    (VLLM, "gateway/http.py", "def late():\n    from torch import nn"),
    (RAY, "gate.py", "from ray import serve"),
]

PURE_LIBRARY = {
    *("__future__", "abc", "array", "bisect", "collections", "contextlib", "copy"),
    *("dataclasses", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "math"),
    *("operator", "statistics", "types", "typing", "zlib"),
}


def contract_names() -> list[str]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        return [c["name"] for c in tomllib.load(file)["tool"]["importlinter"]["contracts"]]


def broken_contracts(folder: Path) -> list[str]:
    """Return the names of the contracts that the package under ``folder`` breaks."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    broken = [
        name
        for name in contract_names()
        for line in done.stdout.splitlines()
        if line.startswith(name) and "BROKEN" in line
    ]
    assert bool(broken) == bool(done.returncode), done.stdout + done.stderr
    return broken


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the package and its contracts, to plant violations in."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "serve_app", tmp_path / "serve_app", ignore=ignored)
    return tmp_path


def test_every_contract_holds(copied: Path) -> None:
    assert broken_contracts(copied) == []


@pytest.mark.parametrize(("contract", "file", "line"), PLANTS)
def test_a_planted_violation_breaks_its_contract(
    copied: Path, contract: str, file: str, line: str
) -> None:
    with open(copied / "serve_app" / file, "a") as module:
        module.write(f"\n{line}\n")

    assert [name for name in broken_contracts(copied) if name.startswith(contract)]


def test_every_contract_has_a_planted_violation() -> None:
    planted = {contract for contract, _, _ in PLANTS}

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
