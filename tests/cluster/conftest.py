"""The chart, rendered once per profile by a real helm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.manifests import CHART, ROOT, Manifests

# Everything that is off by default is looked at as well.
EXTRAS = (
    "prePull.enabled=true",
    "route.enabled=true",
    "route.parentRefs[0].name=public",
    "bootstrapKey.existingSecret=headrace-admin",
    "quota.enabled=true",
    "limitRange.enabled=true",
    "kueue.enabled=true",
    "kueue.cohort=serving",
    "kueue.priorityClass=serving",
    "kueue.flavors[0].name=reserved",
    "kueue.flavors[0].quota.cpu=64",
    "kueue.flavors[0].quota.memory=512Gi",
    r"kueue.flavors[0].quota.nvidia\.com/gpu=8",
    "opencost.url=http://opencost.opencost:9003",
    "tracing.jaeger.enabled=true",
    "monitoring.dcgm.podMonitor=true",
)
HERE = Path(__file__).resolve().parent
PROFILES = ("kind", "gke", "eks")
Render = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Helm, Terraform and promtool take seconds, and are fetched the first time."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def helm() -> Path:
    """A helm; tests are skipped where there is none and none can be fetched."""
    return found("find_helm.py")


@pytest.fixture(scope="session")
def promtool() -> Path:
    """A promtool; tests are skipped where there is none and none can be fetched."""
    return found("find_promtool.py")


def found(script: str) -> Path:
    command = [sys.executable, str(ROOT / "scripts" / script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(done.stderr.strip())
    return Path(done.stdout.strip())


@pytest.fixture(scope="session")
def render(helm: Path) -> Render:
    """Run `helm template` on a profile with more arguments, once for all who ask the same."""

    @cache
    def run(profile: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(helm), "template", "headrace", str(CHART), "--namespace", "serving"]
        # Without a cluster helm takes one as old as itself.
        command += ["--kube-version", "1.37.0"]
        command += ["--values", str(CHART / f"values-{profile}.yaml"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)

    return run


@pytest.fixture(scope="session", params=PROFILES)
def manifests(request: pytest.FixtureRequest, render: Render) -> Manifests:
    """Everything that a profile can render."""
    settings = [word for extra in EXTRAS for word in ("--set", extra)]
    return parsed(request.param, render(request.param, *settings))


@pytest.fixture(scope="session", params=PROFILES)
def plain(request: pytest.FixtureRequest, render: Render) -> Manifests:
    """What a profile renders as it is."""
    return parsed(request.param, render(request.param))


def parsed(profile: str, done: subprocess.CompletedProcess[str]) -> Manifests:
    """Return what helm has printed."""
    assert done.returncode == 0, done.stderr
    documents: list[dict[str, Any]] = [
        each for each in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if each
    ]
    return Manifests(profile, documents)
