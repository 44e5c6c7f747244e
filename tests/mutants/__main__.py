"""Plant each bug of ``plants`` in a copy of the tree and see a test fail.

``python -m tests.mutants [WORD ...]`` plants those whose name contains a word, or all. The
working tree is never touched: the bugs go into a temporary copy of serve_app and tests.
Hypothesis draws the same examples each time. Exits with 1 if a bug survives, if the line it
changes is not there any more, or if the tests fail without any bug.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.mutants.plants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("serve_app", "tests", "pyproject.toml")
TESTS_MOST_S = 120.0


def main(words: Sequence[str]) -> int:
    """Plant the chosen bugs one after the other; return the exit status."""
    chosen = [each for each in MUTANTS if not words or any(word in each.name for word in words)]
    if not chosen:
        print(f"no bug is called anything like: {', '.join(words)}")
        return 1
    with tempfile.TemporaryDirectory(prefix="headrace-mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        healthy = run_tests(tree, sorted({path for each in chosen for path in each.test_paths}))
        if healthy is not None:
            print(f"without any bug the tests fail already: {healthy}")
            return 1
        results = []
        for place, mutant in enumerate(chosen, 1):
            started_s = time.monotonic()
            found = plant(tree, mutant)
            results.append((mutant, found))
            print(
                f"{place:3}/{len(chosen)}  {time.monotonic() - started_s:4.1f} s  "
                f"{'caught' if found.caught else 'NOT CAUGHT'}: {mutant.name}",
                flush=True,
            )
    print_table(results)
    missed = [mutant for mutant, found in results if not found.caught]
    print(f"{len(results) - len(missed)} of {len(results)} bugs caught")
    return 1 if missed else 0


class Found:
    """What became of a bug: which test saw it, or why it was not seen."""

    def __init__(self, caught: bool, by: str) -> None:
        self.caught = caught
        self.by = by


def plant(tree: Path, mutant: Mutant) -> Found:
    """Change the copy, run the bug's tests, and put the copy back."""
    file = tree / mutant.path
    healthy = file.read_text(encoding="utf-8")
    times = healthy.count(mutant.before)
    if times != 1:
        return Found(False, f"the line to change stands {times} times in {mutant.path}")
    sick = healthy.replace(mutant.before, mutant.after)
    try:
        compile(sick, mutant.path, "exec")
    except SyntaxError as error:
        return Found(False, f"the change is no Python: {error}")
    file.write_text(sick, encoding="utf-8")
    try:
        failure = run_tests(tree, mutant.test_paths)
    finally:
        file.write_text(healthy, encoding="utf-8")
    if failure is None:
        return Found(False, "every test passed")
    return Found(True, failure)


def run_tests(tree: Path, paths: Sequence[str]) -> str | None:
    """Return the name of the first test that fails in the copy, or None if none does.

    Raises:
        RuntimeError: pytest could not run the tests, which says nothing about the bug.
    """
    command = [
        sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
        "--hypothesis-profile=ci", "--tb=no", *paths,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TESTS_MOST_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {TESTS_MOST_S:.0f} s"
    if done.returncode == 0:
        return None
    if done.returncode != 1:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = re.search(r"^FAILED \S*?(\w+\.py)::(\S+)", done.stdout, re.MULTILINE)
    return f"{failed[1]}: {failed[2]}" if failed else "a test failed"


def copy_tree(tree: Path) -> None:
    """Copy what the tests need; check that they would import the copy."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "e2e", "cluster")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=ignored)
        else:
            shutil.copy2(source, tree / name)
    imported = subprocess.run(
        [sys.executable, "-B", "-c", "import serve_app.core as core; print(core.__file__)"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if not Path(imported).resolve().is_relative_to(tree.resolve()):
        raise RuntimeError(f"the tests would import {imported}, not the copy")


def print_table(results: Sequence[tuple[Mutant, Found]]) -> None:
    """Print every bug with the test that saw it."""
    width = max(len(mutant.name) for mutant, _ in results)
    print()
    for mutant, found in results:
        mark = " " if found.caught else "!"
        print(f"{mark} {mutant.name:<{width}}  {mutant.file:<15}  {found.by}")
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
