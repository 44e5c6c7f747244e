"""Every field of the engine's own request models has been decided about."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import pytest

from serve_app.gateway import wire
from serve_app.gateway.fields import DROPPED, PASSED, REFUSED

PROTOCOLS = {
    "ChatCompletionRequest": "entrypoints/openai/chat_completion/protocol.py",
    "CompletionRequest": "entrypoints/openai/completion/protocol.py",
}


def test_the_three_treatments_exclude_each_other() -> None:
    checked = set(wire._Chat.model_fields) | set(wire._Completion.model_fields)
    assert not DROPPED.keys() & REFUSED.keys()
    assert not PASSED & (DROPPED.keys() | REFUSED.keys())
    assert not checked & REFUSED.keys()


@pytest.mark.parametrize(("model", "file"), PROTOCOLS.items())
def test_every_field_of_the_engine_is_checked_dropped_refused_or_passed(
    model: str, file: str
) -> None:
    # Read and not imported: importing vllm takes seconds and loads torch.
    path = Path(sysconfig.get_paths()["purelib"]) / "vllm" / file
    if not path.is_file():
        pytest.skip("vllm is not installed")
    source = path.read_text()
    definition = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == model
    )
    engine_fields = {
        statement.target.id
        for statement in definition.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if not statement.target.id.startswith("_")
    }
    assert len(engine_fields) > 30
    checked = set(wire._Chat.model_fields) | set(wire._Completion.model_fields)
    shape = {"prompt", "tool_choice"}
    decided = checked | shape | DROPPED.keys() | REFUSED.keys() | PASSED
    assert engine_fields - decided == set()
