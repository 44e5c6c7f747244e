"""scripts/kind, with docker, kind, kubectl and helm in name only: what it would run, and when."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.conftest import Render
from tests.cluster.manifests import ROOT, Manifests

PROGRAMS = ("docker", "kind", "kubectl", "helm", "openssl")
# Says what it was called with. Nothing is there yet: what is asked for is not found.
STANDS_IN = """#!/bin/sh
echo "${0##*/} $*" >> "$CALLS"
case "$*" in
  *"get secret "*|*"get namespace "*) exit "${FOUND:-1}" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in PROGRAMS:
        program = tmp_path / name
        program.write_text(STANDS_IN)
        program.chmod(0o755)
    return tmp_path


def run(folder: Path, action: str, **environment: str) -> tuple[int, str, list[str]]:
    """Run it; return its status, what it said and what it called."""
    calls = folder / "calls"
    calls.touch()
    path = f"{folder}:/usr/bin:/bin"
    done = subprocess.run(
        [ROOT / "scripts" / "kind", action],
        env={**os.environ, "PATH": path, "CALLS": str(calls), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


def place(calls: list[str], words: str) -> int:
    return next(i for i, call in enumerate(calls) if words in call)


def test_up_makes_everything_in_order(folder: Path) -> None:
    status, said, calls = run(folder, "up")
    assert status == 0, said
    steps = [
        "kind create cluster",
        "docker build",
        "kind load docker-image headrace-cpu:dev",
        "upgrade --install kuberay-operator",
        "create namespace serving",
        "upgrade --install headrace",
        "wait rayservice/headrace",
    ]
    places = [place(calls, words) for words in steps]
    assert places == sorted(places)
    assert "It serves" in said
    reach = [c for c in calls if c.startswith(("kubectl", "helm"))]
    assert all("kind-headrace" in call for call in reach), "never another cluster of the user's"


def test_it_makes_the_secrets_that_the_chart_asks_for(folder: Path, render: Render) -> None:
    _, _, calls = run(folder, "up")
    made = {found[1] for c in calls if (found := re.search(r"create secret generic (\S+)", c))}
    done = render("kind", "--set", "bootstrapKey.existingSecret=headrace-bootstrap")
    documents = [d for d in yaml.safe_load_all(done.stdout) if d]
    asked = set(
        re.findall(r"secretKeyRef:\s+(?:key: \S+\s+)?name: (\S+)", yaml.safe_dump(documents))
    )
    asked.add(Manifests("kind", documents).cluster["authOptions"]["secretName"])
    assert made == asked
    image = next(c["image"] for _, c in Manifests("kind", documents).containers())
    assert f"kind load docker-image {image} " in "\n".join(calls) + "\n"


def test_up_again_changes_no_password(folder: Path) -> None:
    _, _, calls = run(folder, "up", FOUND="0")
    assert not any("create secret" in call for call in calls)
    assert any("upgrade --install headrace" in call for call in calls)


def test_what_is_missing_is_named_before_anything_is_done(folder: Path) -> None:
    (folder / "kind").unlink()
    status, said, calls = run(folder, "up")
    assert status == 1
    assert "kind not found" in said
    assert calls == []


def test_down_takes_only_its_own_cluster_away(folder: Path) -> None:
    status, _, calls = run(folder, "down", KIND_CLUSTER="mine")
    assert status == 0
    assert calls[-1] == "kind delete cluster --name mine"
