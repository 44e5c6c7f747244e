"""What the API server keeps: one RayCluster, its pods, and what happened to them in order."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from tests.kubernetes import json_patch

Document = dict[str, Any]
SCHEMA = Path(__file__).with_name("raycluster_schema.yaml")


class Refused(Exception):
    """An answer that is not 2xx, as Kubernetes words it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a pod: ADDED, MODIFIED or DELETED."""

    version: int
    kind: str
    pod: Document


class Objects:
    """The state behind the API. Every method may be called from any thread."""

    def __init__(self, ray_cluster: Document) -> None:
        """Raises ``Refused`` if the RayCluster does not fit its schema."""
        self.changed = threading.Condition()
        self.namespace: str = ray_cluster["metadata"]["namespace"]
        self.name: str = ray_cluster["metadata"]["name"]
        self._version = 0
        self._pods: dict[str, Document] = {}
        self._events: list[Event] = []
        self._group_of: dict[str, str | None] = {}
        self._cluster = with_defaults(copy.deepcopy(ray_cluster))
        check_ray_cluster(self._cluster)
        with self._change() as version:
            self._cluster["metadata"] |= {"uid": "raycluster", "generation": 1}
            self._cluster["metadata"]["resourceVersion"] = version

    @property
    def version(self) -> str:
        """The resource version of the newest change."""
        return str(self._version)

    def ray_cluster(self) -> Document:
        """Return a copy of the RayCluster."""
        with self.changed:
            return copy.deepcopy(self._cluster)

    def patch_ray_cluster(self, operations: Any) -> Document:
        """Apply a JSON patch and return the result.

        Raises:
            Refused: 422 if it does not apply or breaks the schema, 409 if it was made for an
                older version (it sets another ``metadata.resourceVersion``).
        """
        with self._change() as version:
            try:
                patched = json_patch.apply(self._cluster, operations)
            except json_patch.PatchRefused as error:
                raise Refused(422, "Invalid", str(error)) from error
            if _version_of(patched) != _version_of(self._cluster):
                raise Refused(409, "Conflict", "the object has been modified")
            check_ray_cluster(patched)
            if patched["spec"] != self._cluster["spec"]:
                patched["metadata"]["generation"] += 1
            patched["metadata"]["resourceVersion"] = version
            self._cluster = patched
            return copy.deepcopy(patched)

    def select(self, labels: Mapping[str, str]) -> list[Document]:
        """Return copies of the pods that carry all these labels, oldest first."""
        with self.changed:
            return [copy.deepcopy(pod) for pod in self._pods.values() if carries(pod, labels)]

    def pod(self, name: str) -> Document:
        """Return a copy of a pod.

        Raises:
            Refused: 404, there is none.
        """
        with self.changed:
            return copy.deepcopy(self._pod(name))

    def group_of(self, name: str) -> str | None:
        """Return the worker group of a pod that is or was; None if there never was one."""
        with self.changed:
            return self._group_of.get(name)

    def ever(self, group: str) -> set[str]:
        """Return the names of all pods that a group has or had."""
        with self.changed:
            return {name for name, of in self._group_of.items() if of == group}

    def create_pod(self, pod: Document) -> None:
        """Add a pod; its name must be new."""
        name = pod["metadata"]["name"]
        with self._change() as version:
            if name in self._pods:
                raise Refused(409, "AlreadyExists", f'pods "{name}" already exists')
            self._pods[name] = copy.deepcopy(pod)
            self._group_of[name] = pod["metadata"].get("labels", {}).get("ray.io/group")
            self._record("ADDED", name, version)

    def change_pod(self, name: str, change: Callable[[Document], None]) -> None:
        """Change a pod in place.

        Raises:
            Refused: 404, there is none.
        """
        with self._change() as version:
            change(self._pod(name))
            self._record("MODIFIED", name, version)

    def delete_pod(self, name: str, grace_s: float | None = None) -> Document:
        """Mark a pod as leaving; who runs it stops it within its grace period, then removes it.

        A second deletion may only shorten the first one's grace, as in Kubernetes.
        """
        with self._change() as version:
            pod = self._pod(name)
            wanted_s = pod["spec"].get("terminationGracePeriodSeconds", 30.0)
            grace_s = wanted_s if grace_s is None else grace_s
            metadata = pod["metadata"]
            if "deletionTimestamp" in metadata:
                grace_s = min(grace_s, metadata["deletionGracePeriodSeconds"])
            metadata["deletionGracePeriodSeconds"] = grace_s
            metadata.setdefault("deletionTimestamp", timestamp())
            self._record("MODIFIED", name, version)
            return copy.deepcopy(pod)

    def remove_pod(self, name: str) -> None:
        """Take a pod away whose processes have ended."""
        with self._change() as version:
            self._record("DELETED", name, version)
            del self._pods[name]

    def events(self, after: int, labels: Mapping[str, str]) -> list[Event]:
        """Return what happened after a version to the pods that carry these labels."""
        with self.changed:
            return [
                each for each in self._events if each.version > after and carries(each.pod, labels)
            ]

    def _pod(self, name: str) -> Document:
        if name not in self._pods:
            raise Refused(404, "NotFound", f'pods "{name}" not found')
        return self._pods[name]

    @contextmanager
    def _change(self) -> Iterator[str]:
        with self.changed:
            yield str(self._version + 1)
            self._version += 1
            self.changed.notify_all()

    def _record(self, kind: str, name: str, version: str) -> None:
        pod = self._pods[name]
        pod["metadata"]["resourceVersion"] = version
        self._events.append(Event(int(version), kind, copy.deepcopy(pod)))


def check_ray_cluster(document: Document) -> None:
    """Raise ``Refused`` (422) if a RayCluster does not fit KubeRay's schema."""
    problems = [
        f"{error.json_path}: {error.message}" for error in _validator().iter_errors(document)
    ]
    if problems:
        raise Refused(422, "Invalid", "; ".join(problems))


def with_defaults(document: Document) -> Document:
    """Return the RayCluster with the defaults that the API server fills in."""
    schema = yaml.safe_load(SCHEMA.read_text())
    group = schema["properties"]["spec"]["properties"]["workerGroupSpecs"]["items"]
    for each in document.get("spec", {}).get("workerGroupSpecs", []):
        for name, field in group["properties"].items():
            if "default" in field:
                each.setdefault(name, field["default"])
    return document


def carries(pod: Document, labels: Mapping[str, str]) -> bool:
    """Tell whether a pod carries all these labels."""
    return labels.items() <= pod["metadata"].get("labels", {}).items()


def timestamp() -> str:
    """Return the present time as Kubernetes writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@cache
def _validator() -> Draft202012Validator:
    return Draft202012Validator(_closed(yaml.safe_load(SCHEMA.read_text())))


def _closed(schema: Any) -> Any:
    """Return a schema that refuses unknown fields, which an API server would drop in silence."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


def _version_of(document: Document) -> Any:
    return document["metadata"].get("resourceVersion")
