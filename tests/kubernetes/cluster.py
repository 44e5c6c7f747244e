"""A whole Headrace on a fake Kubernetes: real head, real autoscaler, real nodes.

The head pod's processes are a stack (tests/stack.py); every worker pod is a `ray start` of its
own. Everything ends with the ``with`` block.
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.kubernetes import certificates
from tests.kubernetes.api import Api, serving
from tests.kubernetes.nodes import Node, ray_start
from tests.kubernetes.objects import Document, Objects
from tests.kubernetes.operator import HEAD_GROUP, RESOURCES, Operator, running
from tests.stack import Stack, free_port, running_stack

RAY_CLUSTER = Path(__file__).with_name("raycluster.yaml")
DRAIN_S = 20


@dataclass(frozen=True)
class Cluster:
    """A running cluster. ``stack`` is the service on it, ``api`` what the autoscaler asked."""

    stack: Stack
    objects: Objects
    api: Api
    operator: Operator

    def pods(self, group: str = "gpu", phase: str = "Running") -> list[str]:
        """Return the names of a group's pods in a phase that are not being deleted."""
        return [
            str(pod["metadata"]["name"])
            for pod in self.objects.select({"ray.io/group": group})
            if pod["status"]["phase"] == phase and "deletionTimestamp" not in pod["metadata"]
        ]

    def engines(self, pool: str) -> dict[str, int]:
        """Return how many engine replicas of a pool each living pod has."""
        return {
            name: sum(
                f"ServeReplica:pool-{pool}:Engine" in _title(each) for each in node.processes()
            )
            for name, node in self.operator.running().items()
            if isinstance(node, Node)
        }

    def deleted(self) -> list[str]:
        """Return the pods that the autoscaler has asked to delete, in order."""
        return [
            name
            for patch in self.api.patches()
            for operation in patch
            if operation["path"].endswith("/scaleStrategy")
            for name in operation["value"]["workersToDelete"]
        ]

    def autoscalers(self) -> list[psutil.Process]:
        """Return the processes of Ray's autoscaler; more than one while one takes over."""
        return self.stack.processes("kuberay-autoscaler")

    def heads(self) -> list[psutil.Process]:
        """Return the first process of the head's namespace, with which all of it ends."""
        return self.stack.processes("ray.scripts.scripts", "--head")[:1]

    def autoscaler_log(self) -> str:
        """Return what the autoscaler has printed so far."""
        return (self.stack.folder / "autoscaler.log").read_text(errors="replace")

    def problems(self) -> list[str]:
        """Return what no autoscaler should have asked for, and where the operator failed."""
        return [*self.api.violations, *self.operator.errors]


@contextmanager
def running_cluster(
    document: Mapping[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
    ready_timeout_s: float = 240,
) -> Iterator[Cluster]:
    """Start a configuration on a cluster without workers, yield it once it is ready.

    Raises:
        StackFailed: it ended, or was not ready in time.
    """
    objects = Objects(yaml.safe_load(RAY_CLUSTER.read_text()))
    port, dashboard_port, http_port = free_port(), free_port(), free_port()
    served = {
        **document,
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": http_port},
    }
    head_pod = _head_pod(objects)
    objects.create_pod(head_pod)
    api = Api(objects)
    with tempfile.TemporaryDirectory() as folder:
        files = certificates.write(Path(folder))
        with serving(api, files) as api_port:
            settings = {
                **_kubernetes(api_port, files),
                **_identity(head_pod),
                "HEADRACE_PORT": str(http_port),
                **(environment or {}),
            }
            command = _head_command(objects, port, dashboard_port)
            with running_stack(
                served, environment=settings, command=command, ready_timeout_s=ready_timeout_s
            ) as stack:
                operator = Operator(objects, _starter(stack, port))
                operator.start()
                try:
                    yield Cluster(stack, objects, api, operator)
                finally:
                    operator.stop()


def _head_command(objects: Objects, port: int, dashboard_port: int) -> tuple[str, ...]:
    resources = objects.ray_cluster()["spec"]["headGroupSpec"]["resources"]
    return (
        sys.executable,
        "-m",
        "tests.kubernetes.head",
        f"--port={port}",
        f"--dashboard-port={dashboard_port}",
        f"--resources={json.dumps(resources)}",
        f"--cluster={objects.name}",
        f"--namespace={objects.namespace}",
    )


def _starter(stack: Stack, port: int) -> Any:
    """Return what starts a pod: its group's `ray start`, with what KubeRay puts beside it."""

    def start(pod: Document) -> Node:
        resources = pod["metadata"]["annotations"][RESOURCES]
        command = [*ray_start(resources), f"--address=127.0.0.1:{port}"]
        name = str(pod["metadata"]["name"])
        return Node(command, {**stack.environment, **_identity(pod)}, stack.folder, name)

    return start


def _kubernetes(port: int, files: certificates.Certificates) -> dict[str, str]:
    """Return the environment by which the autoscaler finds the API, and does not dawdle."""
    return {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(port),
        "KUBERAY_CRD_VER": "v1",
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(files.client),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(files.client_key),
        "RAY_KUBERAY_CA_CERT_PATH": str(files.authority),
        "RAY_HEAD_POD_NAME": "headrace-head",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": str(free_port()),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(DRAIN_S),
    }


def _identity(pod: Document) -> dict[str, str]:
    """Return what KubeRay tells a pod of itself, by which the autoscaler knows it again."""
    return {
        "RAY_CLOUD_INSTANCE_ID": str(pod["metadata"]["name"]),
        "RAY_NODE_TYPE_NAME": str(pod["metadata"]["labels"]["ray.io/group"]),
    }


def _head_pod(objects: Objects) -> Document:
    pod: Document = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"{objects.name}-head",
            "namespace": objects.namespace,
            "labels": {
                "ray.io/cluster": objects.name,
                "ray.io/group": HEAD_GROUP,
                "ray.io/node-type": "head",
                "ray.io/is-ray-node": "yes",
            },
        },
        "spec": objects.ray_cluster()["spec"]["headGroupSpec"]["template"]["spec"],
    }
    return pod | {"status": running(pod)}


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or str(process.name())
    except psutil.Error:
        return ""
