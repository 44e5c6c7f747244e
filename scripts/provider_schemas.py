"""Write tests/cluster/provider_schemas.json: what Terraform's providers take, of what we use.

Providers come from a registry that tests cannot reach. Their schemas are also in the packages of
CDK for Terraform on the package index; this takes out the resources that cluster/terraform has.

    python scripts/provider_schemas.py

Run it after adding a resource or raising a provider's version. It fetches 110 MB, once.
"""

from __future__ import annotations

import io
import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from fetch_package import NotFetched, kept, wheel

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "tests" / "cluster" / "provider_schemas.json"
# Package, its hash; the provider's version stands in the package.
PACKAGES = {
    "google": (
        "cdktf-cdktf-provider-google==16.12.1",
        "88d021c89e1cf2abf2c935716d6548d26fe3da4bed30713d4fa36df1ef137436",
    ),
    "aws": (
        "cdktf-cdktf-provider-aws==21.22.1",
        "603c647c4de622ed0a2b5e0f1518d81a89b31eed84b67d23410840041e7df924",
    ),
}
DECLARED = re.compile(r'^(resource|data) "(\w+)"', re.MULTILINE)
# `.../docs/resources/eks_cluster#role_arn EksCluster#role_arn}`
DOCUMENTED = re.compile(r"/docs/(resources|data-sources)/(\w+)#(\w+)")
# Of CDK for Terraform's own classes.
OF_CDK = ("tfResourceType", "internalValue", "fqn")
CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


def main() -> int:
    declared = sorted({found for path in _sources() for found in DECLARED.findall(path)})
    schemas: dict[str, Any] = {"versions": {}, "resource": {}, "data": {}}
    for provider in PACKAGES:
        wanted = {(kind, name) for kind, name in declared if name.startswith(f"{provider}_")}
        try:
            version, types = _assembly(provider)
        except NotFetched as error:
            print(error, file=sys.stderr)
            return 1
        schemas["versions"][provider] = version
        found = _schemas(types, wanted, provider)
        for kind, name in sorted(wanted):
            schemas[kind][name] = found[kind, name]
    OUTPUT.write_text(json.dumps(schemas, indent=1, sort_keys=True) + "\n")
    print(f"{OUTPUT.relative_to(ROOT)}: {len(schemas['resource'])} resources")
    return 0


def _sources() -> list[str]:
    return [path.read_text() for path in (ROOT / "cluster" / "terraform").rglob("*.tf")]


def _assembly(provider: str) -> tuple[str, dict[str, Any]]:
    """Return the provider's version and every type of its package."""
    folder = kept(f"cdktf-{provider}", wheel(*PACKAGES[provider]), _take_assembly)
    manifest = json.loads((folder / "package.json").read_text())
    types: dict[str, Any] = json.loads((folder / ".jsii").read_text())["types"]
    return manifest["cdktf"]["provider"]["version"], types


def _take_assembly(archive: Path, target: Path) -> None:
    target.mkdir()
    with zipfile.ZipFile(archive) as files:
        module = files.read(next(n for n in files.namelist() if n.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(module)) as packed:
        for name in ("package.json", ".jsii"):
            member = packed.extractfile(f"package/{name}")
            assert member is not None
            (target / name).write_bytes(member.read())


def _schemas(
    types: dict[str, Any], wanted: set[tuple[str, str]], provider: str
) -> dict[tuple[str, str], Any]:
    found = {}
    for name, each in types.items():
        if each.get("interfaces") != ["cdktf.TerraformMetaArguments"]:
            continue
        documented = DOCUMENTED.search(json.dumps(each.get("properties", [])))
        if documented is None:
            owner = types.get(name.removesuffix("Config"), {})
            documented = re.search(
                r"/docs/(resources|data-sources)/(\w+)()", json.dumps(owner.get("docs", {}))
            )
        if documented is None:
            continue
        kind = "resource" if documented[1] == "resources" else "data"
        key = kind, f"{provider}_{documented[2]}"
        if key in wanted:
            found[key] = _block(types, each, types[name.removesuffix("Config")])
    return found


def _block(
    types: dict[str, Any], written: dict[str, Any], read: dict[str, Any] | None
) -> dict[str, Any]:
    """Return what may be written in a block, and what can be read of it.

    An attribute is its type and a letter: (r)equired, (o)ptional, (c)omputed only.
    """
    block: dict[str, Any] = {"attributes": {}, "blocks": {}}
    for each in written.get("properties", []):
        text = json.dumps(each["docs"])
        named = DOCUMENTED.search(text)
        name = named[3] if named else _snake(each["name"])
        inner = re.search(r'"fqn": "(@cdktf/[^"]+)"', json.dumps(each["type"]))
        if inner and re.search(rf"{name} block\.", text):
            reference = types.get(f"{inner[1]}OutputReference")
            block["blocks"][name] = _block(types, types[inner[1]], reference)
            block["blocks"][name]["many"] = "array" in json.dumps(each["type"])
            block["blocks"][name]["required"] = not each.get("optional")
        else:
            letter = "o" if each.get("optional") else "r"
            block["attributes"][name] = f"{letter}:{_type(each['type'])}"
    for each in (read or {}).get("properties", []):
        name = _snake(each["name"])
        ours = name.endswith("_input") or each["name"] in OF_CDK or each.get("static")
        if not ours and name not in block["attributes"] and name not in block["blocks"]:
            block["attributes"][name] = f"c:{_type(each['type'])}"
    return block


def _type(given: dict[str, Any]) -> str:
    """Return Terraform's name of a simple type, or a list or map of one; else "dynamic"."""
    simple = {"string": "string", "number": "number", "boolean": "bool"}
    for each in given["union"]["types"] if "union" in given else [given]:
        if "primitive" in each:
            return simple.get(each["primitive"], "dynamic")
        element = each.get("collection", {}).get("elementtype", {}).get("primitive")
        if element in simple:
            kind = "list" if each["collection"]["kind"] == "array" else "map"
            return f"{kind}({simple[element]})"
        if each.get("fqn") == "cdktf.StringMap":
            return "map(string)"
    return "dynamic"


def _snake(name: str) -> str:
    return CAMEL.sub("_", name).lower()


if __name__ == "__main__":
    sys.exit(main())
