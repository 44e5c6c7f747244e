"""What KubeRay 1.7 does for one RayCluster under the in-tree autoscaler, and what a kubelet does.

A worker group's pods are brought to its ``replicas``: missing ones are made, those named in
``workersToDelete`` deleted, and no others. With the autoscaler on, KubeRay never picks a victim
itself, so a group with too many pods stays as it is. A pod whose command ended is deleted and,
if its group still wants it, replaced (autoscaler v2 forces ``restartPolicy: Never``).
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from tests.kubernetes.objects import Document, Objects, timestamp

logger = logging.getLogger(__name__)

STEP_S: Final = 0.1
HEAD_GROUP: Final = "headgroup"
RESOURCES: Final = "headrace/resources"


class RunningPod(Protocol):
    """A started pod's processes."""

    def exit_status(self) -> int | None:
        """Return the status it ended with, None while it runs."""

    def notify(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it and wait for that."""


Start = Callable[[Document], RunningPod]


class Operator:
    """Reconciles on a thread of its own, between ``start`` and ``stop``."""

    def __init__(self, objects: Objects, start: Start) -> None:
        """``start`` runs a pod."""
        self._objects = objects
        self._start = start
        self._lock = threading.RLock()
        self._running: dict[str, RunningPod] = {}
        self._kill_at_s: dict[str, float] = {}
        self._held: set[str] = set()
        self._numbers = itertools.count(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kubernetes-operator", daemon=True)
        self.errors: list[str] = []

    def start(self) -> None:
        """Begin to reconcile."""
        self._thread.start()

    def stop(self) -> None:
        """End, and kill every pod."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            for pod in self._running.values():
                pod.kill()
            self._running.clear()

    def hold(self, group: str) -> None:
        """Let new pods of a group stay Pending, as where no node has room for them."""
        with self._lock:
            self._held.add(group)

    def release(self, group: str) -> None:
        """Let the group's pods start, those that are Pending as well."""
        with self._lock:
            self._held.discard(group)

    def evict(self, name: str, notice_s: float) -> None:
        """Take a pod away as when its spot node is: SIGTERM now, SIGKILL after the notice.

        Raises:
            Refused: 404, there is none.
        """
        self._objects.delete_pod(name, notice_s)

    def running(self) -> dict[str, RunningPod]:
        """Return the pods whose processes run."""
        with self._lock:
            return dict(self._running)

    def step(self) -> None:
        """Do once what is to be done now."""
        with self._lock:
            self._end_pods()
            self._note_exits()
            for group in self._objects.ray_cluster()["spec"]["workerGroupSpecs"]:
                self._reconcile(group)
            self._start_pods()

    def _run(self) -> None:
        while not self._stop.wait(STEP_S):
            try:
                self.step()
            except Exception as error:  # a test fails by what is noted here
                logger.exception("the operator failed")
                self.errors.append(repr(error))

    def _reconcile(self, group: Document) -> None:
        name = group["groupName"]
        pods = self._objects.select({"ray.io/group": name})
        for victim in group.get("scaleStrategy", {}).get("workersToDelete") or []:
            if any(_name(pod) == victim and not _leaves(pod) for pod in pods):
                self._objects.delete_pod(victim)
        for pod in pods:
            if pod["status"]["phase"] in ("Failed", "Succeeded") and not _leaves(pod):
                self._objects.delete_pod(_name(pod), 0)
        staying = [pod for pod in self._objects.select({"ray.io/group": name}) if not _leaves(pod)]
        wanted = min(max(group["replicas"], group["minReplicas"]), group["maxReplicas"])
        for _ in range(wanted - len(staying)):
            self._objects.create_pod(self._new_pod(group))

    def _new_pod(self, group: Document) -> Document:
        template = group["template"]
        cluster = self._objects.name
        name = f"{cluster}-{group['groupName']}-worker-{next(self._numbers)}"
        labels = {
            **template.get("metadata", {}).get("labels", {}),
            "ray.io/cluster": cluster,
            "ray.io/group": group["groupName"],
            "ray.io/node-type": "worker",
            "ray.io/is-ray-node": "yes",
        }
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": self._objects.namespace,
                "labels": labels,
                # KubeRay writes a group's resources into the command of its pods.
                "annotations": {RESOURCES: json.dumps(group.get("resources", {}))},
                "creationTimestamp": timestamp(),
            },
            "spec": template["spec"],
            "status": pending("Unschedulable", "0/1 nodes are available"),
        }

    def _start_pods(self) -> None:
        for pod in self._objects.select({"ray.io/node-type": "worker"}):
            name = _name(pod)
            waits = pod["status"]["phase"] == "Pending" and not _leaves(pod)
            if not waits or pod["metadata"]["labels"]["ray.io/group"] in self._held:
                continue
            self._running[name] = self._start(pod)
            self._objects.change_pod(name, _set_status(running(pod)))

    def _note_exits(self) -> None:
        for name, pod in list(self._running.items()):
            status = pod.exit_status()
            if status is None:
                continue
            del self._running[name]
            pod.kill()
            if not _leaves(self._objects.pod(name)):
                self._objects.change_pod(name, _set_status(ended(status)))

    def _end_pods(self) -> None:
        for pod in self._objects.select({"ray.io/node-type": "worker"}):
            if _leaves(pod):
                self._end_pod(_name(pod), float(pod["metadata"]["deletionGracePeriodSeconds"]))

    def _end_pod(self, name: str, grace_s: float) -> None:
        now_s = time.monotonic()
        running = self._running.get(name)
        if running is not None and name not in self._kill_at_s:
            running.notify()
        kill_at_s = min(now_s + grace_s, self._kill_at_s.get(name, now_s + grace_s))
        self._kill_at_s[name] = kill_at_s
        if running is not None and running.exit_status() is None and now_s < kill_at_s:
            return
        if running is not None:
            del self._running[name]
            running.kill()
        del self._kill_at_s[name]
        self._objects.remove_pod(name)


def pending(reason: str, message: str) -> Document:
    """Return the status of a pod that has no node."""
    unscheduled = {
        "type": "PodScheduled",
        "status": "False",
        "reason": reason,
        "message": message,
    }
    return {"phase": "Pending", "conditions": [unscheduled]}


def running(pod: Document) -> Document:
    """Return the status of a pod whose container runs."""
    container = pod["spec"]["containers"][0]["name"]
    return {
        "phase": "Running",
        "podIP": "127.0.0.1",
        "startTime": timestamp(),
        "conditions": [{"type": "PodScheduled", "status": "True"}],
        "containerStatuses": [
            {"name": container, "ready": True, "state": {"running": {"startedAt": timestamp()}}}
        ],
    }


def ended(status: int) -> Document:
    """Return the status of a pod whose container ended by itself."""
    terminated = {"exitCode": status, "finishedAt": timestamp()}
    return {
        "phase": "Failed" if status else "Succeeded",
        "containerStatuses": [
            {"name": "ray-worker", "ready": False, "state": {"terminated": terminated}}
        ],
    }


def _set_status(status: Document) -> Callable[[Document], None]:
    def change(pod: Any) -> None:
        pod["status"] = status

    return change


def _name(pod: Document) -> str:
    return str(pod["metadata"]["name"])


def _leaves(pod: Document) -> bool:
    return "deletionTimestamp" in pod["metadata"]
