"""Rendered manifests, and the questions that several tests ask of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "cluster" / "charts" / "headrace"


@dataclass(frozen=True)
class PodTemplate:
    """A pod that something of the release makes. ``owner`` is for messages."""

    owner: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]


@dataclass(frozen=True)
class Manifests:
    """What a profile renders."""

    profile: str
    documents: list[dict[str, Any]] = field(repr=False)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the manifests of a kind."""
        return [each for each in self.documents if each["kind"] == kind]

    @property
    def service(self) -> dict[str, Any]:
        """The RayService's spec."""
        [found] = self.of("RayService")
        spec: dict[str, Any] = found["spec"]
        return spec

    @property
    def cluster(self) -> dict[str, Any]:
        """The RayCluster's spec in it."""
        spec: dict[str, Any] = self.service["rayClusterConfig"]
        return spec

    @property
    def serve_config(self) -> dict[str, Any]:
        """The configuration that Ray Serve is given."""
        document: dict[str, Any] = yaml.safe_load(self.service["serveConfigV2"])
        return document

    def pods(self) -> Iterator[PodTemplate]:
        """Yield every pod template."""
        yield _template("head", self.cluster["headGroupSpec"]["template"])
        for group in self.cluster["workerGroupSpecs"]:
            yield _template(group["groupName"], group["template"])
        for kind in ("DaemonSet", "Deployment", "StatefulSet", "Job"):
            for each in self.of(kind):
                yield _template(f"{kind} {each['metadata']['name']}", each["spec"]["template"])

    def containers(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield every container with the name of its pod."""
        for pod in self.pods():
            for container in pod.spec.get("initContainers", []) + pod.spec["containers"]:
                yield f"{pod.owner}/{container['name']}", container
        # KubeRay makes a container of it.
        yield "head/autoscaler", self.cluster["autoscalerOptions"]


def _template(owner: str, template: Mapping[str, Any]) -> PodTemplate:
    return PodTemplate(owner, template["metadata"]["labels"], template["spec"])
