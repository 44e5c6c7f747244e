"""Every `headrace` command that the documents show is one that `headrace` takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from serve_app.cli import build_parser
from tests.stack import ROOT

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(headrace [a-z][^`\n]*)`")
# At the start of a line, after a prompt, variables or another program that runs it.
SHOWN = re.compile(r"^(?:\$ )?(?:[A-Z_]+=\S+ )*(?:kubectl [^\n]* -- )?headrace ([a-z-].*)$")
ENDS = ("|", ">", "<", "&&", ";", "2>")


def shown(document: Path) -> list[list[str]]:
    """Return the words of every command in a document's blocks, without `headrace` itself."""
    found = []
    for block in BLOCK.findall(document.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            match = SHOWN.match(line.strip())
            if match:
                words = shlex.split(match[1], comments=True)
                stop = next((i for i, word in enumerate(words) if word in ENDS), len(words))
                found.append(words[:stop])
    return found


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """Return what the parser says against a command, if it does."""
    try:
        build_parser(words[0]).parse_args(words)
    except SystemExit as end:
        if end.code:
            return capsys.readouterr().err.strip().splitlines()[-1]
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_are_taken(
    document: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in shown(document):
        said = refusal(words, capsys)
        assert said is None, f"headrace {shlex.join(words)}: {said}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_named_in_passing_are_there(document: Path) -> None:
    """In a sentence a command may be cut short, but not have another name."""
    for text in INLINE.findall(document.read_text()):
        name = text.split()[1]
        [choices] = [a.choices for a in build_parser()._actions if a.choices]
        assert name in choices, text


def test_there_are_many_and_a_wrong_one_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(len(shown(document)) for document in DOCUMENTS) > 40
    assert refusal(["keys", "create", "--nam", "laptop"], capsys)
    assert refusal(["backup"], capsys)
