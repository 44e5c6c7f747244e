"""What the documents show of `headrace plan` is what it prints, line by line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from serve_app.cli import main
from tests.checkpoints import write_checkpoint
from tests.stack import ROOT

_BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SHOWN = re.compile(r"^\$ headrace (plan (?:[^\n]*\\\n)*[^\n]*)\n(.*?)(?=^\$ |\Z)", re.M | re.S)


def shown() -> list[tuple[str, list[str]]]:
    """Return every command that is shown, with the lines below it; those on a trace take long."""
    found = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in _BLOCK.findall(file.read_text()):
            for command, output in _SHOWN.findall(block):
                if "--trace" not in command:
                    found.append((command, [line for line in output.splitlines() if line]))
    return found


def test_there_are_some() -> None:
    assert len(shown()) >= 5
    assert {command.split()[1] for command, _ in shown()} == {"fit", "size"}


@pytest.mark.parametrize(("command", "lines"), shown())
def test_a_documented_plan_prints_what_is_shown(
    command: str,
    lines: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_checkpoint(tmp_path / "llama-70b")
    monkeypatch.chdir(tmp_path)
    main(shlex.split(command.replace("\\\n", " ")))
    captured = capsys.readouterr()
    printed = iter((captured.out + captured.err).splitlines())
    missing = [line for line in lines if line not in printed]
    assert missing == [], "in this order"
