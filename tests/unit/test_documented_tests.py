"""A page that says which test proves something must not outlive that test."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Pages whose claims each name a test.
FULL = {"security.md": 40, "overload.md": 15}


@cache
def names_of_tests(path: Path) -> frozenset[str]:
    """Return the names of the tests in a file."""
    body = ast.parse(path.read_text()).body
    found = (each.name for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(name for name in found if name.startswith("test_"))


def named_in(text: str) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in NAMED.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    found = named_in(page.read_text())
    missing = [
        f"{file}::{name}"
        for file, name in found
        if not (ROOT / file).is_file() or (name and name not in names_of_tests(ROOT / file))
    ]
    assert missing == []
    assert len(set(found)) >= FULL.get(page.name, 0)


def test_a_test_that_is_not_there_would_be_seen() -> None:
    text = "proven by `tests/unit/test_documented_tests.py::test_of_nothing`, `tests/none.py`"
    assert named_in(text) == [
        ("tests/unit/test_documented_tests.py", "test_of_nothing"),
        ("tests/none.py", None),
    ]
    assert "test_of_nothing" not in names_of_tests(Path(__file__))
    assert "test_a_test_that_is_not_there_would_be_seen" in names_of_tests(Path(__file__))


@pytest.mark.parametrize("page", FULL)
def test_each_row_of_a_table_of_mitigations_names_a_test(page: str) -> None:
    lines = (ROOT / "docs" / page).read_text().splitlines()
    in_table = False
    for before, line in pairwise(lines):
        if set(line) <= set("|- ") and "|" in line:
            in_table = before.endswith("| test |")
        elif not line.startswith("|"):
            in_table = False
        elif in_table:
            assert NAMED.search(line), line
