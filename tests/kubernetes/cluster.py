"""A whole Headrace on a fake Kubernetes: real head, real autoscaler, real nodes.

The head pod's processes are a stack (tests/stack.py); every worker pod is a `ray start` of its
own. Everything ends with the ``with`` block.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from serve_app import haproxy
from tests.kubernetes import certificates
from tests.kubernetes.api import Api, serving
from tests.kubernetes.head import REDIS_PASSWORD
from tests.kubernetes.nodes import Node, ray_start
from tests.kubernetes.objects import Document, Objects
from tests.kubernetes.operator import HEAD_GROUP, RESOURCES, Operator, running
from tests.kubernetes.ray_service import RayService, environment
from tests.redis import Redis
from tests.stack import PATIENT, Stack, free_port, running_stack

DRAIN_S = 20
POLL_S = 0.1
GCS_TIMEOUT_S = 180


@dataclass(frozen=True)
class Cluster:
    """A running cluster. ``stack`` is the service on it, ``api`` what the autoscaler asked.

    ``dashboard`` is where Ray's answers.
    """

    stack: Stack
    dashboard: str
    objects: Objects
    api: Api
    operator: Operator

    def pods(self, group: str, phase: str = "Running") -> list[str]:
        """Return the names of a group's pods in a phase that are not being deleted."""
        return [
            str(pod["metadata"]["name"])
            for pod in self.objects.select({"ray.io/group": group})
            if pod["status"]["phase"] == phase and "deletionTimestamp" not in pod["metadata"]
        ]

    def replicas(self, deployment: str = "") -> set[int]:
        """Return the process ids of Serve's replicas on worker pods, or of one deployment's."""
        return {
            process.pid
            for node in self.operator.running().values()
            if isinstance(node, Node)
            for process in node.processes()
            # At times a process bears its actor's name, SERVE_REPLICA::app#deployment#id.
            if (title := _title(process)).startswith(("ray::ServeReplica:", "ray::SERVE_REPLICA:"))
            if deployment in title
        }

    def engines(self, pool: str, group: str) -> dict[str, int]:
        """Return how many engine replicas of a pool each living pod of a group has."""
        return {
            name: sum(
                f"ServeReplica:pool-{pool}:Engine" in _title(each) for each in node.processes()
            )
            for name, node in self.operator.running().items()
            if isinstance(node, Node) and self.objects.group_of(name) == group
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

    @contextmanager
    def without_head(self) -> Iterator[None]:
        """Kill the head pod's processes; another one is started when the block ends."""
        [kubelet] = [
            process
            for process in self.stack.processes("tests.kubernetes.head")
            if process.name() not in ("bash", "unshare", "setpriv")
        ]
        kubelet.send_signal(signal.SIGSTOP)
        try:
            for process in [*self.heads(), *self.autoscalers()]:
                process.kill()
            yield
        finally:
            kubelet.send_signal(signal.SIGCONT)

    def autoscaler_log(self) -> str:
        """Return what the autoscaler has printed so far."""
        return (self.stack.folder / "autoscaler.log").read_text(errors="replace")

    def problems(self) -> list[str]:
        """Return what no autoscaler should have asked for, and where the operator failed."""
        return [*self.api.violations, *self.operator.errors]


@contextmanager
def running_cluster(
    service: RayService, *, redis: Redis | None = None, ready_timeout_s: float = 480
) -> Iterator[Cluster]:
    """Apply a RayService as KubeRay would, yield its cluster once it is ready.

    ``redis`` is where the GCS keeps its state, the head's memory otherwise.
    Its head has no HAProxy of its own in Kubernetes; here all pods share one address and one port
    for clients, so the head's is the only one.

    Raises:
        StackFailed: it ended, or was not ready in time.
    """
    objects = Objects(service.ray_cluster())
    port, dashboard_port, http_port = free_port(), free_port(), free_port()
    served = {
        **service.serve_config,
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
                "RAY_HEAD_POD_NAME": str(head_pod["metadata"]["name"]),
                "HEADRACE_PORT": str(http_port),
                **_containers_environment(objects.ray_cluster()),
                **_fault_tolerance(objects, redis),
            }
            command = _head_command(objects, port, dashboard_port)
            operators: list[Operator] = []

            @contextmanager
            def operating(stack: Stack) -> Iterator[None]:
                operators.append(Operator(objects, _starter(stack, port)))
                operators[0].start()
                try:
                    yield
                finally:
                    operators[0].stop()

            with running_stack(
                served,
                environment=settings,
                command=command,
                fast_path=False,  # what is set is what the pods' containers say
                beside=operating,
                ready_timeout_s=ready_timeout_s,
            ) as stack:
                dashboard = f"http://127.0.0.1:{dashboard_port}"
                yield Cluster(stack, dashboard, objects, api, operators[0])


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
        [container] = pod["spec"]["containers"]
        settings = {**stack.environment, **environment(container), **_identity(pod)}
        if settings.pop("RAY_REDIS_ADDRESS", None) is not None:
            # As KubeRay has it where the GCS may come back.
            settings["RAY_gcs_rpc_server_reconnect_timeout_s"] = "600"
        _wait_for_gcs(port)
        return Node(command, settings, stack.folder, name)

    return start


def _wait_for_gcs(port: int) -> None:
    """Do what KubeRay's init container of a worker pod does."""
    deadline_s = time.monotonic() + GCS_TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(POLL_S)


def _containers_environment(ray_cluster: Document) -> dict[str, str]:
    """Return what the head pod's containers and KubeRay tell Ray."""
    spec = ray_cluster["spec"]
    [container] = spec["headGroupSpec"]["template"]["spec"]["containers"]
    program = haproxy.program()
    assert program is not None, "`make setup` installs it"
    return {
        **environment(container),
        **environment(spec["autoscalerOptions"]),
        "RAY_AUTH_MODE": spec["authOptions"]["mode"],
        haproxy.BINARY_PATH: str(program),
    }


def _fault_tolerance(objects: Objects, redis: Redis | None) -> dict[str, str]:
    """Return what KubeRay makes of gcsFaultToleranceOptions, for the head alone."""
    if redis is None:
        return {}
    metadata = objects.ray_cluster()["metadata"]
    return {
        "RAY_REDIS_ADDRESS": redis.address,
        REDIS_PASSWORD: redis.password,
        "RAY_external_storage_namespace": str(metadata["uid"]),
    }


def _kubernetes(port: int, files: certificates.Certificates) -> dict[str, str]:
    """Return the environment by which the autoscaler finds the API, and does not dawdle."""
    return {
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT_HTTPS": str(port),
        "KUBERAY_CRD_VER": "v1",
        "RAY_KUBERAY_CLIENT_CERT_PATH": str(files.client),
        "RAY_KUBERAY_CLIENT_KEY_PATH": str(files.client_key),
        "RAY_KUBERAY_CA_CERT_PATH": str(files.authority),
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        **PATIENT,
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
