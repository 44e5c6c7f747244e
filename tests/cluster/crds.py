"""The CRDs' own schemas, closed: the API server drops a field silently that they do not know."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from tests.cluster.manifests import ROOT

CRDS = ROOT.parent / "shared" / "crds"
FILES = {
    "RayService": "ray.io_rayservices",
    "Probe": "monitoring.coreos.com_probes",
    "PodMonitor": "monitoring.coreos.com_podmonitors",
    "PrometheusRule": "monitoring.coreos.com_prometheusrules",
    "HTTPRoute": "gateway.networking.k8s.io_httproutes",
    "ClusterQueue": "kueue.x-k8s.io_clusterqueues",
    "LocalQueue": "kueue.x-k8s.io_localqueues",
    "ResourceFlavor": "kueue.x-k8s.io_resourceflavors",
    "NodePool": "karpenter.sh_nodepools",
    "EC2NodeClass": "karpenter.k8s.aws_ec2nodeclasses",
    "Application": "argoproj.io_application",
    "AppProject": "argoproj.io_appproject",
}


def refusals(document: Mapping[str, Any]) -> list[str]:
    """Return what its CRD says against a manifest; skips where the CRDs are not there."""
    version = document["apiVersion"].rpartition("/")[2]
    validator = Draft7Validator(schema(document["kind"], version))
    return [
        f"{document['kind']} {'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]


@cache
def schema(kind: str, version: str) -> dict[str, Any]:
    """Return the closed schema of a kind."""
    path = CRDS / f"{FILES[kind]}.yaml"
    if not path.is_file():
        pytest.skip(f"{path} is not there: the CRDs lie beside the repository, not in it")
    definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)
    [found] = [v for v in definition["spec"]["versions"] if v["name"] == version]
    closed: dict[str, Any] = _closed(found["schema"]["openAPIV3Schema"])
    closed["properties"]["metadata"] = {"type": "object"}
    return closed


def _closed(node: Any) -> Any:
    if isinstance(node, list):
        return [_closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    closed = {key: _closed(value) for key, value in node.items()}
    known = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if known and not node.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed
