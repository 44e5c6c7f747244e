"""The chart's RayService, and what KubeRay makes of it: a RayCluster, and Serve's configuration.

What one machine has no room for is left out, and stands in ``OF_THE_MACHINE`` and below: pods
share one network, so that ports, HAProxy's place and the folders of a pod are the test's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes.objects import Document
from tests.stack import ROOT

CHART = ROOT / "cluster" / "charts" / "headrace"
# What a pod's environment says of its own files, addresses and time.
OF_THE_MACHINE = frozenset(
    {
        "RAY_SERVE_HAPROXY_BINARY_PATH",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT",
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S",
    }
)


@dataclass(frozen=True)
class RayService:
    """A RayService as it was applied."""

    manifest: Document

    @property
    def serve_config(self) -> Document:
        """What the operator hands to Serve."""
        document: Document = yaml.safe_load(self.manifest["spec"]["serveConfigV2"])
        return document

    def ray_cluster(self) -> Document:
        """Return the RayCluster that the operator makes of it."""
        metadata = self.manifest["metadata"]
        return {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {
                "name": f"{metadata['name']}-x7k2p",
                "namespace": metadata["namespace"],
                "labels": {
                    "ray.io/originated-from-crd": "RayService",
                    "ray.io/originated-from-cr-name": metadata["name"],
                },
            },
            "spec": self.manifest["spec"]["rayClusterConfig"],
        }


def rendered(values: Mapping[str, Any], profile: str = "kind") -> RayService:
    """Return the RayService of a profile of the chart with more values; skips without a helm."""
    find = [sys.executable, str(ROOT / "scripts" / "find_helm.py")]
    helm = subprocess.run(find, capture_output=True, text=True, timeout=240, check=False)
    if helm.returncode:
        pytest.skip(helm.stderr.strip())
    with tempfile.TemporaryDirectory() as folder:
        more = Path(folder) / "values.yaml"
        more.write_text(yaml.safe_dump(dict(values)))
        command = [helm.stdout.strip(), "template", "headrace", str(CHART), "--namespace=serving"]
        command += [f"--values={CHART}/values-{profile}.yaml", f"--values={more}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    documents = yaml.load_all(done.stdout, Loader=yaml.CSafeLoader)
    [service] = [each for each in documents if each and each["kind"] == "RayService"]
    return RayService(service)


def environment(container: Mapping[str, Any]) -> dict[str, str]:
    """Return what a container's environment tells Ray, less what is this machine's."""
    return {
        each["name"]: each["value"]
        for each in container.get("env", [])
        if each["name"].startswith("RAY_") and each["name"] not in OF_THE_MACHINE
        if "value" in each
    }
