"""The fake Kubernetes is worth what it refuses: what a real API server would, and more."""

from __future__ import annotations

import json
import os
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.kubernetes import certificates
from tests.kubernetes.api import JSON_PATCH, Api, serving
from tests.kubernetes.certificates import Certificates
from tests.kubernetes.nodes import Node
from tests.kubernetes.objects import Document, Objects, Refused, check_ray_cluster
from tests.kubernetes.operator import Operator
from tests.stack import ROOT

pytestmark = pytest.mark.slow

RAY_CLUSTER = ROOT / "tests" / "kubernetes" / "raycluster.yaml"
CLUSTER = "/apis/ray.io/v1/namespaces/serving/rayclusters/headrace"
PODS = "/api/v1/namespaces/serving/pods"
REPLICAS = "/spec/workerGroupSpecs/0/replicas"
STRATEGY = "/spec/workerGroupSpecs/0/scaleStrategy"


def document() -> Document:
    loaded: Document = yaml.safe_load(RAY_CLUSTER.read_text())
    return loaded


def replace(path: str, value: Any) -> dict[str, Any]:
    return {"op": "replace", "path": path, "value": value}


@dataclass
class FakePod:
    """A pod without processes."""

    status: int | None = None
    notices: int = 0
    killed: bool = False

    def exit_status(self) -> int | None:
        return self.status

    def notify(self) -> None:
        self.notices += 1

    def kill(self) -> None:
        self.killed = True


@dataclass
class Made:
    """Every pod that was started, by name."""

    pods: dict[str, FakePod] = field(default_factory=dict)

    def start(self, pod: Document) -> FakePod:
        made = self.pods[pod["metadata"]["name"]] = FakePod()
        return made


@pytest.fixture
def objects() -> Objects:
    return Objects(document())


@pytest.fixture
def api(objects: Objects) -> Api:
    return Api(objects)


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    return certificates.write(tmp_path)


@pytest.fixture
def client(api: Api, files: Certificates) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=files.authority)
    context.load_cert_chain(files.client, files.client_key)
    with (
        serving(api, files) as port,
        httpx.Client(
            base_url=f"https://127.0.0.1:{port}", verify=context, timeout=120
        ) as connected,
    ):
        yield connected


@pytest.fixture
def made() -> Made:
    return Made()


@pytest.fixture
def operator(objects: Objects, made: Made) -> Operator:
    return Operator(objects, made.start)


def patch(client: httpx.Client, *operations: dict[str, Any], **headers: str) -> httpx.Response:
    sent = {"content-type": JSON_PATCH, **headers}
    return client.patch(CLUSTER, content=json.dumps(operations), headers=sent)


def phases(objects: Objects) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["status"]["phase"] for pod in objects.select({})}


def test_a_patch_is_applied_and_makes_a_new_version(client: httpx.Client, api: Api) -> None:
    before = client.get(CLUSTER).json()
    operations = [replace(REPLICAS, 2), replace(STRATEGY, {"workersToDelete": []})]
    assert patch(client, *operations).status_code == 200
    after = client.get(CLUSTER).json()
    assert after["spec"]["workerGroupSpecs"][0]["replicas"] == 2
    assert int(after["metadata"]["resourceVersion"]) > int(before["metadata"]["resourceVersion"])
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1
    assert api.patches() == [operations]
    assert api.violations == []


@pytest.mark.parametrize(
    "operation",
    [
        replace("/spec/workerGroupSpecs/0/replica", 1),
        replace("/spec/workerGroupSpecs/7/replicas", 1),
        replace(REPLICAS, "1"),
        replace(STRATEGY, {"workersToRemove": []}),
        replace(STRATEGY, {"workersToDelete": ["nobody"]}),
        {"op": "test", "path": REPLICAS, "value": 9},
        {"op": "merge", "path": REPLICAS, "value": 1},
        {"op": "replace", "path": REPLICAS},
    ],
)
def test_what_does_not_apply_or_fit_is_refused_whole(
    client: httpx.Client, api: Api, operation: dict[str, Any]
) -> None:
    before = client.get(CLUSTER).json()
    assert patch(client, replace(REPLICAS, 3), operation).status_code == 422
    assert client.get(CLUSTER).json() == before
    assert len(api.violations) == 1


def test_a_replace_needs_what_it_replaces(objects: Objects) -> None:
    without = document()
    del without["spec"]["workerGroupSpecs"][0]["scaleStrategy"]
    with pytest.raises(Refused, match="scaleStrategy"):
        Objects(without).patch_ray_cluster([replace(STRATEGY, {"workersToDelete": []})])
    objects.patch_ray_cluster([replace(STRATEGY, {"workersToDelete": []})])


def test_a_stale_version_is_a_conflict_and_no_ones_fault(client: httpx.Client, api: Api) -> None:
    stale = client.get(CLUSTER).json()["metadata"]["resourceVersion"]
    assert patch(client, replace(REPLICAS, 1)).status_code == 200
    answer = patch(client, replace("/metadata/resourceVersion", stale), replace(REPLICAS, 2))
    assert (answer.status_code, answer.json()["reason"]) == (409, "Conflict")
    assert api.objects.ray_cluster()["spec"]["workerGroupSpecs"][0]["replicas"] == 1
    assert api.violations == []


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/version", 400),
        ("GET", CLUSTER + "s", 400),
        ("GET", CLUSTER.replace("/v1/", "/v1alpha1/"), 400),
        ("GET", CLUSTER + "?watch=1", 405),
        ("PUT", CLUSTER, 405),
        ("POST", PODS, 405),
        ("GET", PODS + "?fieldSelector=a%3Db", 400),
        ("GET", PODS + "?labelSelector=%3Da", 400),
        ("GET", PODS + "?resourceVersionMatch=Exact", 400),
        ("PATCH", PODS + "/headrace-head", 405),
    ],
)
def test_what_it_does_not_know_is_refused_and_remembered(
    client: httpx.Client, api: Api, method: str, path: str, status: int
) -> None:
    assert client.request(method, path).status_code == status
    [violation] = api.violations
    assert violation.startswith(f"{method} {path}: {status}")


def test_only_json_patches_are_taken(client: httpx.Client, api: Api) -> None:
    answer = patch(client, replace(REPLICAS, 1), **{"content-type": "application/json"})
    assert answer.status_code == 415
    assert len(api.violations) == 1


def test_without_the_authoritys_certificate_nobody_gets_in(
    client: httpx.Client, files: Certificates
) -> None:
    stranger = ssl.create_default_context(cafile=files.authority)
    with (
        httpx.Client(base_url=client.base_url, verify=stranger, timeout=120) as anonymous,
        pytest.raises(httpx.TransportError),
    ):
        anonymous.get(CLUSTER)


def test_errors_are_injected_so_many_times_and_are_no_violations(
    client: httpx.Client, api: Api
) -> None:
    api.fail_next("PATCH", "rayclusters", 409, times=2)
    api.fail_next("GET", "pods", 500)
    codes = [patch(client, replace(REPLICAS, 1)).status_code for _ in range(3)]
    assert codes == [409, 409, 200]
    assert [client.get(PODS).status_code for _ in range(2)] == [500, 200]
    assert api.injected_left() == 0
    assert api.violations == []


def test_pods_are_listed_by_label_and_watched_from_a_version(
    client: httpx.Client, objects: Objects, operator: Operator
) -> None:
    start = objects.version
    objects.patch_ray_cluster([replace(REPLICAS, 1)])
    operator.step()
    selector = "labelSelector=ray.io%2Fgroup%3Dgpu"
    [pod] = client.get(f"{PODS}?{selector}").json()["items"]
    assert pod["status"]["containerStatuses"][0]["state"].keys() == {"running"}
    assert client.get(f"{PODS}?labelSelector=ray.io%2Fgroup%3Dcpu").json()["items"] == []
    watch = f"{PODS}?watch=1&resourceVersion={start}&{selector}&timeoutSeconds=10"
    with client.stream("GET", watch) as answer:
        lines = answer.iter_lines()
        kinds = [json.loads(next(lines))["type"] for _ in range(2)]
        objects.create_pod({"metadata": {"name": "other", "labels": {}}, "spec": {}})
        objects.delete_pod(pod["metadata"]["name"])
        last = json.loads(next(lines))
    assert kinds == ["ADDED", "MODIFIED"]
    assert last["object"]["metadata"]["name"] == pod["metadata"]["name"]
    assert "deletionTimestamp" in last["object"]["metadata"]


def test_the_groups_replicas_become_pods_and_exactly_the_named_ones_go(
    objects: Objects, operator: Operator, made: Made
) -> None:
    objects.patch_ray_cluster([replace(REPLICAS, 3)])
    operator.step()
    names = list(phases(objects))
    assert set(phases(objects).values()) == {"Running"}
    objects.patch_ray_cluster(
        [replace(REPLICAS, 2), replace(STRATEGY, {"workersToDelete": [names[1]]})]
    )
    operator.step()
    operator.step()
    assert made.pods[names[1]].notices == 1
    made.pods[names[1]].status = 0
    operator.step()
    assert list(phases(objects)) == [names[0], names[2]]
    assert [pod.notices for pod in made.pods.values()] == [0, 1, 0]


def test_a_lower_count_alone_picks_no_victim(
    objects: Objects, operator: Operator, made: Made
) -> None:
    objects.patch_ray_cluster([replace(REPLICAS, 2)])
    operator.step()
    objects.patch_ray_cluster([replace(REPLICAS, 0)])
    operator.step()
    assert [pod.notices for pod in made.pods.values()] == [0, 0]


def test_counts_are_kept_within_the_groups_bounds(objects: Objects, operator: Operator) -> None:
    objects.patch_ray_cluster([replace(REPLICAS, 9)])
    operator.step()
    assert len(phases(objects)) == 3


def test_held_pods_are_pending_until_released(objects: Objects, operator: Operator) -> None:
    operator.hold("gpu")
    objects.patch_ray_cluster([replace(REPLICAS, 1)])
    operator.step()
    [pod] = objects.select({})
    assert pod["status"]["phase"] == "Pending"
    assert pod["status"]["conditions"][0]["reason"] == "Unschedulable"
    assert "containerStatuses" not in pod["status"]
    operator.release("gpu")
    operator.step()
    assert list(phases(objects).values()) == ["Running"]


def test_an_evicted_pod_gets_its_notice_then_is_killed_and_replaced(
    objects: Objects, operator: Operator, made: Made
) -> None:
    objects.patch_ray_cluster([replace(REPLICAS, 1)])
    operator.step()
    [name] = made.pods
    operator.evict(name, notice_s=3600)
    operator.step()
    assert (made.pods[name].notices, made.pods[name].killed) == (1, False)
    assert len(phases(objects)) == 2
    operator.evict(name, notice_s=0)
    operator.step()
    assert made.pods[name].killed
    assert name not in phases(objects)


def test_a_pod_that_ends_by_itself_is_replaced(
    objects: Objects, operator: Operator, made: Made
) -> None:
    objects.patch_ray_cluster([replace(REPLICAS, 1)])
    operator.step()
    [name] = made.pods
    made.pods[name].status = 1
    for _ in range(3):
        operator.step()
    [other] = phases(objects)
    assert other != name


def test_the_tests_cluster_fits_kuberays_schema_and_a_misspelt_one_does_not() -> None:
    check_ray_cluster(document())
    wrong = document()
    wrong["spec"]["autoscalerOptions"]["idleTimeoutSecond"] = 4
    with pytest.raises(Refused, match="idleTimeoutSecond"):
        check_ray_cluster(wrong)


def test_a_node_is_told_to_go_and_everything_of_it_ends(tmp_path: Path) -> None:
    program = (
        "import signal, subprocess, sys, time\n"
        "child = subprocess.Popen(['setsid', 'sleep', '300'])\n"
        "def told(*_): print('told', flush=True)\n"
        "signal.signal(signal.SIGTERM, told)\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    node = Node([sys.executable, "-c", program], os.environ, tmp_path, "node")

    def says(word: str) -> None:
        while word not in node.log.read_text().split():
            assert node.exit_status() is None, node.log.read_text()

    says("up")
    below = node.processes()
    node.notify()
    says("told")
    assert node.exit_status() is None
    node.kill()
    assert node.exit_status() is not None
    assert not any(psutil.pid_exists(process.pid) for process in below)
