"""What `make test-fast` loads so that it stays fast."""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.import_guard import ImportGuard


@pytest.mark.parametrize("name", ["ray", "torch", "vllm"])
def test_a_heavy_package_cannot_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [ImportGuard(), *sys.meta_path])
    with pytest.raises(ImportError, match=f"no {name} in fast tests"):
        importlib.import_module(name)


def test_others_can() -> None:
    assert ImportGuard().find_spec("json", None) is None
