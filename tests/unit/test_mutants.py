"""`make mutants` takes minutes and runs rarely: its bugs must still fit the code by then."""

from __future__ import annotations

import pytest

from tests.mutants.plants import MUTANTS, Mutant
from tests.stack import ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_bug_can_be_planted_where_it_says(mutant: Mutant) -> None:
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1
    compile(text.replace(mutant.before, mutant.after), mutant.path, "exec")
    assert all((ROOT / path).is_file() for path in mutant.test_paths)
