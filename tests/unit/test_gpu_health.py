"""The GPU watcher against text, NVML and a strict Kubernetes; what it may not, it says."""

from __future__ import annotations

import asyncio
import errno
import gzip
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client import CollectorRegistry

from serve_app import gpu_sources
from serve_app.commands.gpu_health import _until
from serve_app.core.gpu_faults import xid_fault
from serve_app.core.gpu_readings import Findings
from serve_app.gpu_engines import EngineNotFound, ProcessEngines
from serve_app.gpu_health import TRIES_MAX, GpuWatch, WatchMetrics, WatchSettings
from serve_app.gpu_sources import (
    NvmlSource,
    SourceFailed,
    dcgm_source,
    file_source,
    load_nvml,
    samples,
)
from serve_app.gpu_turn import Turn
from serve_app.kubernetes import (
    CLAIM,
    FAULT_LABEL,
    RESETS_ANNOTATION,
    WHY_ANNOTATION,
    Kubernetes,
    KubernetesFailed,
    in_cluster,
    rbac,
)
from serve_app.ray_nodes import RayFailed
from serve_app.terminal import CommandFailed
from tests.kubernetes import certificates
from tests.kubernetes.api import Api, serving
from tests.kubernetes.certificates import Certificates
from tests.kubernetes.machines import Machines
from tests.kubernetes.objects import Objects
from tests.kubernetes.rbac import Rbac
from tests.stack import ROOT

pytestmark = pytest.mark.slow

NODE = "gpu-1"
TOKEN = "service-account-token"
DCGM = """\
# HELP DCGM_FI_DEV_XID_ERRORS Value of the last XID error encountered.
# TYPE DCGM_FI_DEV_XID_ERRORS gauge
DCGM_FI_DEV_XID_ERRORS{gpu="0",UUID="GPU-1",device="nvidia0",Hostname="gpu-1"} %s
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may leave the API server or a file nothing for long."""
    monkeypatch.setattr(gpu_sources, "TIMEOUT_S", 300.0)
    monkeypatch.setattr("serve_app.kubernetes.TIMEOUT_S", 300.0)


@dataclass
class FakeEngines:
    restarted: list[str] = field(default_factory=list)

    def restart(self, gpu: str) -> list[int]:
        self.restarted.append(gpu)
        return [4711]


@dataclass
class FakeRay:
    drained: list[tuple[set[str], float, str]] = field(default_factory=list)

    async def drain(self, names: Collection[str], notice_s: float, why: str) -> list[str]:
        self.drained.append((set(names), notice_s, why))
        return ["n1"]


@dataclass
class Bench:
    """A watcher whose clock and source are the test's."""

    file: Path
    watch: GpuWatch
    engines: FakeEngines
    ray: FakeRay
    registry: CollectorRegistry
    now: list[float]

    async def see(self, value: object, after_s: float = 1.0) -> None:
        self.now[0] += after_s
        self.file.write_text(DCGM % value)
        await self.watch.tick()

    async def wait(self, seconds: float) -> None:
        self.now[0] += seconds
        await self.watch.tick()

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"headrace_gpu_{name}", labels)


def bench(
    folder: Path, kubernetes: Kubernetes | None = None, node: str = NODE, **settings: Any
) -> Bench:
    file, engines, ray, now = folder / "dcgm.prom", FakeEngines(), FakeRay(), [0.0]
    registry = CollectorRegistry()
    watch = GpuWatch(
        WatchSettings(node, host_names=("host-1",), **settings),
        file_source(file),
        engines,
        WatchMetrics(registry),
        clock=lambda: now[0],
        kubernetes=kubernetes,
        ray=ray,
    )
    return Bench(file, watch, engines, ray, registry, now)


def told(caplog: pytest.LogCaptureFixture, message: str) -> list[Any]:
    return [each for each in caplog.records if each.message == message]


# Without Kubernetes


async def test_an_xid_restarts_the_engine_of_its_gpu_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tested = bench(tmp_path)
    for value in (0, 31, 31, 31):
        await tested.see(value)
    assert tested.engines.restarted == ["GPU-1"]
    [line] = told(caplog, "gpu decision")
    assert (line.fault, line.action, line.gpu) == ("XID 31", "restart_engine", "GPU-1")
    assert tested.metric("decisions_total", remedy="restart_engine", action="restart_engine") == 1


async def test_an_unknown_xid_is_an_error_in_the_log_and_nothing_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tested = bench(tmp_path)
    await tested.see(0)
    await tested.see(777)
    [line] = told(caplog, "gpu decision")
    assert (line.levelname, line.remedy, line.action) == ("ERROR", "unknown", "nothing")
    assert (tested.engines.restarted, tested.ray.drained) == ([], [])


async def test_without_kubernetes_the_node_is_drained_by_its_host_names(tmp_path: Path) -> None:
    tested = bench(tmp_path)
    await tested.see(0)
    await tested.see(48)
    assert tested.ray.drained == [({"host-1"}, 600.0, "XID 48")]
    assert tested.metric("node_out") == 1


async def test_a_dry_run_decides_and_does_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tested = bench(tmp_path, dry_run=True)
    for value in (0, 31, 79, 48):
        await tested.see(value)
    assert [each.action for each in told(caplog, "gpu decision")] == [
        "restart_engine",
        "replace",
        "drain",
    ]
    assert all(each.dry_run for each in told(caplog, "gpu decision"))
    assert (tested.engines.restarted, tested.ray.drained) == ([], [])
    assert not tested.watch.busy


async def test_a_source_that_dies_and_comes_back_is_said_once_each_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tested = bench(tmp_path)
    await tested.see(0)
    tested.file.unlink()
    for _ in range(3):
        await tested.wait(5)
    assert tested.metric("source_up") == 0
    await tested.see(31)
    assert tested.metric("source_up") == 1
    assert len(told(caplog, "gpu source failed")) == len(told(caplog, "gpu source back")) == 1
    assert tested.engines.restarted == ["GPU-1"], "what happened meanwhile is not missed"


async def test_a_source_that_fails_as_nobody_foresaw_is_down_and_holds_up_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tested = bench(tmp_path)
    drain = tested.ray.drain

    async def no(*_: Any) -> list[str]:
        raise RayFailed("no GCS")

    tested.ray.drain = no  # type: ignore[assignment,method-assign]
    await tested.see(0)
    await tested.see(48)
    tested.ray.drain = drain  # type: ignore[method-assign]

    async def look() -> Findings:
        raise RecursionError("a parser's")

    tested.watch._source.look = look  # type: ignore[method-assign]
    for _ in range(3):
        await tested.wait(5)
    assert [why for _, _, why in tested.ray.drained] == ["XID 48"]
    assert tested.metric("source_up") == 0
    [line] = told(caplog, "gpu source failed")
    assert line.reason == "a parser's"


@pytest.mark.parametrize("value", ["NaN", "-5", "1e30", "+Inf"])
async def test_a_source_that_lies_is_said_once_and_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, value: str
) -> None:
    tested = bench(tmp_path)
    for each in ("0", value, value, "31"):
        await tested.see(each)
    assert len(told(caplog, "gpu source lies")) == 1
    assert tested.metric("lies_total") == 2
    assert tested.engines.restarted == ["GPU-1"]


# Kubernetes


def pod(name: str, node: str, **metadata: Any) -> dict[str, Any]:
    labels = {"ray.io/cluster": "headrace", "ray.io/group": "gpu", "ray.io/node-type": "worker"}
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "serving", "labels": labels, **metadata},
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "podIP": f"10.0.0.{len(name)}"},
    }


@dataclass
class Cluster:
    api: Api
    objects: Objects
    machines: Machines
    connect: Callable[[], Kubernetes]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.write(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def cluster(
    tmp_path: Path, files: Certificates, request: pytest.FixtureRequest
) -> AsyncIterator[Cluster]:
    """The fake API; its service account may what ``rbac`` says, less what the test takes away."""
    without = getattr(request, "param", None)
    manifests = rbac("headrace-gpu-health", "serving")
    for each in manifests:
        for rule in each.get("rules", []):
            if without is not None and rule["resources"] == [without[0]]:
                rule["verbs"].remove(without[1])
    objects = Objects(yaml.safe_load((ROOT / "tests/kubernetes/raycluster.yaml").read_text()))
    for each in (pod("worker-a", NODE), pod("worker-bb", NODE), pod("elsewhere", "gpu-2")):
        objects.create_pod(each)
    machines = Machines(NODE, "gpu-2", "gpu-3", "gpu-4")
    api = Api(objects, machines, Rbac(TOKEN, manifests))
    account = tmp_path / "account"
    account.mkdir()
    (account / "ca.crt").write_bytes(files.authority.read_bytes())
    (account / "namespace").write_text("serving\n")
    (account / "token").write_text(f"{TOKEN}\n")
    with serving(api, files) as port:
        environment = {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(port),
        }
        yield Cluster(api, objects, machines, lambda: in_cluster(environment, account))


def leaving(cluster: Cluster) -> set[str]:
    return {
        each["metadata"]["name"]
        for each in cluster.objects.select({})
        if "deletionTimestamp" in each["metadata"]
    }


async def test_a_gpu_to_reset_cordons_drains_and_evicts_when_the_notice_is_over(
    tmp_path: Path, cluster: Cluster
) -> None:
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(48)
    node = cluster.machines.get(NODE)
    assert node["spec"]["unschedulable"] is True
    assert node["metadata"]["labels"] == {FAULT_LABEL: "drain"}
    annotations = node["metadata"]["annotations"]
    assert annotations == {WHY_ANNOTATION: "XID 48 on GPU-1: reset_gpu", RESETS_ANNOTATION: "1"}
    [(names, notice_s, _)] = tested.ray.drained
    assert names == {"worker-a", "worker-bb", "10.0.0.8", "10.0.0.9"}
    assert leaving(cluster) == set()
    await tested.wait(notice_s - 1)
    assert leaving(cluster) == set(), "what runs may end first"
    await tested.wait(1)
    assert leaving(cluster) == {"worker-a", "worker-bb"}
    assert not tested.watch.busy
    assert cluster.api.violations == []


async def test_a_gpu_that_fell_off_the_bus_leaves_less_time(
    tmp_path: Path, cluster: Cluster
) -> None:
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(48)
    await tested.see(79)
    assert [notice_s for _, notice_s, _ in tested.ray.drained] == [600.0, 30.0]
    assert cluster.machines.get(NODE)["metadata"]["labels"] == {FAULT_LABEL: "inspect"}
    await tested.wait(30)
    assert leaving(cluster) == {"worker-a", "worker-bb"}


async def test_a_cordon_alone_drains_nothing(tmp_path: Path, cluster: Cluster) -> None:
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(157)
    await tested.wait(1000)
    assert cluster.machines.get(NODE)["spec"]["unschedulable"] is True
    assert tested.ray.drained == []
    assert leaving(cluster) == set()


async def test_a_disruption_budget_is_waited_for(
    tmp_path: Path, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    tested = bench(tmp_path, cluster.connect())
    cluster.api.fail_next("POST", "pods", 429, times=2)
    await tested.see(0)
    await tested.see(79)
    await tested.wait(30)
    assert leaving(cluster) == set()
    await tested.wait(1)
    assert tested.metric("steps_failed_total", step="evict") == 1, "it does not hammer"
    await tested.wait(5)
    await tested.wait(10)
    assert leaving(cluster) == {"worker-a", "worker-bb"}
    assert "eviction blocked" in told(caplog, "gpu step failed")[0].reason


async def test_no_more_nodes_are_taken_out_than_may_be(
    tmp_path: Path, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    for other in ("gpu-2", "gpu-3"):
        patch = {"metadata": {"labels": {FAULT_LABEL: "drain"}}, "spec": {"unschedulable": True}}
        cluster.machines.patch(other, patch)
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(48)
    assert "unschedulable" not in cluster.machines.get(NODE)["spec"]
    assert tested.ray.drained == []
    assert "2 nodes are out already (gpu-2, gpu-3)" in told(caplog, "gpu step failed")[0].reason
    await tested.wait(1000)
    cluster.machines.patch("gpu-3", {"spec": {"unschedulable": False}})
    await tested.wait(60)
    assert cluster.machines.get(NODE)["spec"]["unschedulable"] is True
    assert leaving(cluster) == set(), "the notice counts from when it is given"
    [(_, notice_s, _)] = tested.ray.drained
    await tested.wait(notice_s)
    assert leaving(cluster) == {"worker-a", "worker-bb"}


async def test_a_node_that_was_returned_may_be_cordoned_for_other_reasons(
    tmp_path: Path, cluster: Cluster
) -> None:
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(48)
    cluster.machines.patch(NODE, {"spec": {"unschedulable": False}})
    cluster.api.fail_next("PATCH", "nodes", 500)
    await tested.wait(600)
    assert tested.metric("node_out") == 1, "not before its label is away"
    await tested.wait(31)
    assert tested.metric("node_out") == 0
    cluster.machines.patch(NODE, {"spec": {"unschedulable": True}})
    another = bench(tmp_path, cluster.connect())
    await another.see(0)
    assert another.ray.drained == []
    assert not another.watch.busy


async def test_a_label_that_was_left_on_a_node_in_service_is_taken_away(
    tmp_path: Path, cluster: Cluster
) -> None:
    cluster.machines.patch(NODE, {"metadata": {"labels": {FAULT_LABEL: "drain"}}})
    await bench(tmp_path, cluster.connect()).see(0)
    assert FAULT_LABEL not in cluster.machines.get(NODE)["metadata"]["labels"]


async def test_a_claim_that_was_left_goes_although_somebody_else_cordoned_the_node(
    tmp_path: Path, cluster: Cluster
) -> None:
    patch = {"metadata": {"labels": {FAULT_LABEL: CLAIM}}, "spec": {"unschedulable": True}}
    cluster.machines.patch(NODE, patch)
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    node = cluster.machines.get(NODE)
    assert (node["metadata"]["labels"], node["spec"]["unschedulable"]) == ({}, True)
    assert tested.metric("node_out") == 0


@pytest.mark.parametrize("fault", [CLAIM, "cordon", "drain"])
async def test_a_dry_run_leaves_a_node_that_is_or_was_out_as_it_is(
    tmp_path: Path, cluster: Cluster, fault: str
) -> None:
    await cluster.connect().cordon(NODE, fault, "earlier", 1)
    tested = bench(tmp_path, cluster.connect(), dry_run=True)
    await tested.see(0)
    await tested.see(79)
    cluster.machines.patch(NODE, {"spec": {"unschedulable": False}})
    before = cluster.machines.get(NODE)
    await tested.wait(31)
    await bench(tmp_path, cluster.connect(), dry_run=True).see(0)
    assert tested.metric("node_out") == 0
    assert cluster.machines.get(NODE) == before
    assert before["metadata"]["labels"] == {FAULT_LABEL: fault}
    assert tested.ray.drained == []


async def test_a_node_that_is_returned_is_watched_again_and_its_resets_are_remembered(
    tmp_path: Path, cluster: Cluster
) -> None:
    for resets in (1, 2):
        tested = bench(tmp_path, cluster.connect())  # each time a watcher that starts anew
        await tested.see(0)
        await tested.see(48)
        assert cluster.machines.get(NODE)["metadata"]["annotations"][RESETS_ANNOTATION] == str(
            resets
        )
        cluster.machines.patch(NODE, {"spec": {"unschedulable": False}})
        await tested.wait(600)
        await tested.wait(31)
        assert tested.metric("node_out") == 0
    await tested.see(0)
    await tested.see(95)
    assert cluster.machines.get(NODE)["metadata"]["labels"] == {FAULT_LABEL: "inspect"}


@pytest.mark.parametrize("fault", ["drain", "inspect"])
async def test_a_watcher_that_starts_on_a_node_that_is_out_finishes_what_was_begun(
    tmp_path: Path, cluster: Cluster, fault: str
) -> None:
    await cluster.connect().cordon(NODE, fault, "earlier", 1)
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(48)
    assert [why for _, _, why in tested.ray.drained] == [f"taken out earlier ({fault})"]
    assert tested.metric("node_out") == 1
    await tested.wait(600)
    assert leaving(cluster) == {"worker-a", "worker-bb"}


async def test_a_watcher_that_starts_on_a_cordoned_node_drains_it_for_worse(
    tmp_path: Path, cluster: Cluster
) -> None:
    await cluster.connect().cordon(NODE, "cordon", "earlier", 0)
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    assert tested.ray.drained == []
    await tested.see(48)
    assert [why for _, _, why in tested.ray.drained] == ["XID 48"]


async def test_a_record_that_could_not_be_read_at_first_is_read_before_it_is_written(
    tmp_path: Path, cluster: Cluster
) -> None:
    cluster.machines.patch(NODE, {"metadata": {"annotations": {RESETS_ANNOTATION: "2"}}})
    cluster.api.fail_next("GET", "nodes", 500)
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(48)
    assert cluster.machines.get(NODE)["metadata"]["annotations"][RESETS_ANNOTATION] == "3"


async def test_of_watchers_at_once_no_more_take_their_nodes_out_than_may(
    tmp_path: Path, cluster: Cluster
) -> None:
    nodes = (NODE, "gpu-2", "gpu-3")
    several = []
    for name in nodes:
        (tmp_path / name).mkdir()
        several.append(bench(tmp_path / name, cluster.connect(), node=name, nodes_out_max=1))
        await several[-1].see(0)

    def out() -> list[str]:
        return [name for name in nodes if cluster.machines.get(name)["spec"].get("unschedulable")]

    # Every one has looked before any claims, and claims before any looks again.
    looked, claimed = asyncio.Barrier(len(nodes)), asyncio.Barrier(len(nodes))
    for each in several:
        kubernetes = each.watch._kubernetes
        assert kubernetes is not None
        look, claim = kubernetes.nodes_held, kubernetes.claim

        async def look_together(kubernetes: Any = kubernetes, look: Any = look) -> list[Any]:
            held: list[Any] = await look()
            del kubernetes.nodes_held
            await looked.wait()
            return held

        async def claim_together(name: str, fault: str | None = CLAIM, claim: Any = claim) -> None:
            await claim(name, fault)
            if fault is not None:
                await claimed.wait()

        kubernetes.nodes_held = look_together  # type: ignore[method-assign]
        kubernetes.claim = claim_together  # type: ignore[method-assign]
    await asyncio.gather(*[each.see(48) for each in several])
    assert out() == []
    for each in several:
        del each.watch._kubernetes.claim  # type: ignore
    for _ in range(3):
        for each in several:
            await each.wait(60)
            assert len(out()) <= 1
    assert out() == [NODE]
    others = [cluster.machines.get(name)["metadata"]["labels"] for name in nodes[1:]]
    assert others == [{}, {}], "claims are withdrawn"


async def test_a_node_that_an_operator_returned_meanwhile_is_not_emptied(
    tmp_path: Path, cluster: Cluster
) -> None:
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(48)
    cluster.machines.patch(NODE, {"spec": {"unschedulable": False}})
    await tested.wait(600)
    assert leaving(cluster) == set()
    assert not tested.watch.busy
    assert tested.metric("node_out") == 0


async def test_a_pod_that_cannot_be_evicted_holds_up_no_other_and_the_head_stays(
    tmp_path: Path, cluster: Cluster
) -> None:
    head = pod("head", NODE)
    head["metadata"]["labels"]["ray.io/node-type"] = "head"
    cluster.objects.create_pod(head)
    tested = bench(tmp_path, cluster.connect())
    cluster.api.fail_next("POST", "pods", 429)
    await tested.see(0)
    await tested.see(79)
    assert tested.ray.drained[0][0] == {"worker-a", "worker-bb", "10.0.0.8", "10.0.0.9"}
    await tested.wait(30)
    assert len(leaving(cluster)) == 1
    await tested.wait(5)
    assert leaving(cluster) == {"worker-a", "worker-bb"}


async def test_a_blocked_cordon_holds_up_no_restart_and_is_no_node_out(
    tmp_path: Path, cluster: Cluster
) -> None:
    tested = bench(tmp_path, cluster.connect())
    cluster.api.fail_next("PATCH", "nodes", 500)
    await tested.see(0)
    await tested.see(48)
    assert tested.metric("node_out") == 0
    await tested.see(31)
    assert tested.engines.restarted == ["GPU-1"]
    await tested.wait(5)
    assert tested.metric("node_out") == 1


async def test_an_engine_that_cannot_be_ended_is_given_up_and_blocks_nothing(
    tmp_path: Path,
) -> None:
    tested = bench(tmp_path)
    tried = []

    def denied(gpu: str) -> list[int]:
        tried.append(gpu)
        raise psutil.AccessDenied(4711)

    tested.engines.restart = denied  # type: ignore[method-assign]
    await tested.see(0)
    await tested.see(31)
    await tested.see(48)
    assert tested.ray.drained
    for _ in range(20):
        await tested.wait(60)
    assert len(tried) == TRIES_MAX
    assert not tested.watch.busy


NEEDED = [
    ("nodes", "list"),
    ("nodes", "patch"),
    ("pods", "list"),
    ("pods/eviction", "create"),
]


@pytest.mark.parametrize(
    ("cluster", "permission"),
    [((resource, verb), f"{verb} on {resource}") for resource, verb in NEEDED],
    indirect=["cluster"],
)
async def test_a_watcher_without_a_permission_says_which(
    tmp_path: Path, cluster: Cluster, permission: str, caplog: pytest.LogCaptureFixture
) -> None:
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(79)
    await tested.wait(30)
    reasons = {each.reason for each in told(caplog, "gpu step failed")}
    assert any(f"lacks permission: {permission} (" in each for each in reasons), reasons
    assert tested.watch.busy, "it goes on trying"


@pytest.mark.parametrize("cluster", [("nodes", "get")], indirect=True)
async def test_a_watcher_that_cannot_read_its_node_watches_all_the_same(
    tmp_path: Path, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    tested = bench(tmp_path, cluster.connect())
    await tested.see(0)
    await tested.see(31)
    assert tested.engines.restarted == ["GPU-1"]
    assert "get on nodes (ClusterRole)" in told(caplog, "gpu node not read")[0].reason


async def test_an_api_server_that_is_away_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x")

    def gone(_: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("connection refused")

    client = httpx.AsyncClient(
        transport=httpx.MockTransport(gone), base_url="https://kubernetes.test"
    )
    tested = bench(tmp_path, Kubernetes(client, "serving", tmp_path / "token"))
    await tested.see(0)
    await tested.see(48)
    await tested.wait(5)
    assert tested.metric("steps_failed_total", step="cordon") == 2


def test_outside_a_pod_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(KubernetesFailed, match="this is no pod"):
        in_cluster({})
    inside = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
    with pytest.raises(KubernetesFailed, match="no service account"):
        in_cluster(inside, tmp_path)


async def test_a_stranger_is_not_let_in(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "account" / "token").write_text("another")
    with pytest.raises(KubernetesFailed, match="401"):
        await cluster.connect().node(NODE)


async def test_the_certificate_of_the_api_server_is_checked(
    cluster: Cluster, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    authority = certificates.write(other).authority
    (tmp_path / "account" / "ca.crt").write_bytes(authority.read_bytes())
    with pytest.raises(KubernetesFailed, match="certificate verify failed"):
        await cluster.connect().node(NODE)


# Sources


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<html>not here</html>", "not Prometheus text|has none of"),
        ("", "has none of DCGM_EXP_XID_ERRORS_COUNT"),
        ("DCGM_FI_DEV_GPU_TEMP 50\n", "enable them"),
        ("DCGM_FI_DEV_XID_ERRORS{gpu=} x\n", "not Prometheus text"),
    ],
)
def test_what_is_not_dcgms_text_is_refused(text: str, why: str) -> None:
    with pytest.raises(SourceFailed, match=why):
        samples(text)


async def test_an_exporter_that_fails_is_a_failed_source() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(200, text=DCGM % 0)
        return httpx.Response(500)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    assert (await dcgm_source("http://node:9400/metrics", client).look()).faults == []
    with pytest.raises(SourceFailed, match="500"):
        await dcgm_source("http://node:9400/wrong", client).look()


@asynccontextmanager
async def exporter(*parts: bytes, every_s: float) -> AsyncIterator[str]:
    """Serve an answer that goes round and round in these parts."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for part in itertools.cycle(parts):
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(every_s)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/metrics"


async def test_an_exporter_that_answers_in_drops_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_sources, "TIMEOUT_S", 0.5)
    async with exporter(b"#", every_s=0.05) as url, httpx.AsyncClient() as client:
        async with asyncio.timeout(120):
            with pytest.raises(SourceFailed, match="no whole answer within"):
                await dcgm_source(url, client).look()


async def test_an_exporter_that_never_ends_is_not_read_to_its_end() -> None:
    async with exporter(b"#" * 2**16, every_s=0) as url, httpx.AsyncClient() as client:
        async with asyncio.timeout(120):
            with pytest.raises(SourceFailed, match="more than 4194304 bytes"):
                await dcgm_source(url, client).look()


async def test_an_exporter_that_compresses_unasked_is_not_unpacked() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        assert request.headers["accept-encoding"] == "identity"
        packed = gzip.compress((DCGM % 0).encode())
        return httpx.Response(200, content=packed, headers={"content-encoding": "gzip"})

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    with pytest.raises(SourceFailed, match="compressed, unasked"):
        await dcgm_source("http://node:9400/metrics", client).look()


async def test_a_file_that_never_ends_or_is_none_is_a_failed_source(tmp_path: Path) -> None:
    file, pipe = tmp_path / "dcgm.prom", tmp_path / "pipe"
    file.write_text(DCGM % 0 + "#" * gpu_sources.TEXT_BYTES_MAX)
    with pytest.raises(SourceFailed, match="more than 4194304 bytes"):
        await file_source(file).look()
    os.mkfifo(pipe)
    with pytest.raises(SourceFailed, match="no regular file"):
        await file_source(pipe).look()


async def test_a_file_that_cannot_be_read_in_time_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, over = tmp_path / "dcgm.prom", threading.Event()
    monkeypatch.setattr(gpu_sources, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(Path, "stat", lambda _: over.wait(120))
    try:
        with pytest.raises(SourceFailed, match="not read within"):
            await file_source(file).look()
    finally:
        over.set()


class FakeNvml(ModuleType):
    """As much of pynvml as is used; ``events`` are waiting, ``users`` are processes on a GPU."""

    class NVMLError(Exception):
        pass

    class NVMLError_Timeout(NVMLError):  # NVML's own name
        pass

    nvmlEventTypeXidCriticalError = 8

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.events: list[Any] = []
        self.users: list[int] = []
        self.registered: list[Any] = []
        self.deaf: set[str] = set()
        self.lost = False

    def __getattr__(self, name: str) -> Any:
        fakes: dict[str, Any] = {
            "nvmlInit": lambda: None,
            "nvmlEventSetCreate": object,
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlDeviceGetHandleByIndex": lambda index: f"GPU-{index}",
            "nvmlDeviceRegisterEvents": self._register,
            "nvmlEventSetWait_v2": self._wait,
            "nvmlDeviceGetUUID": self._uuid,
            "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
            "nvmlDeviceGetComputeRunningProcesses": lambda _: [
                SimpleNamespace(pid=pid) for pid in self.users
            ],
        }
        return fakes[name]

    def _wait(self, _: Any, __: int) -> Any:
        if not self.events:
            raise self.NVMLError_Timeout
        event = self.events.pop(0)
        if isinstance(event, Exception):
            raise event
        return event

    def _uuid(self, device: str) -> bytes:
        if self.lost:
            raise self.NVMLError("GPU is lost")
        return device.encode()

    def _register(self, device: str, _: Any, __: Any) -> None:
        if device in self.deaf:
            raise self.NVMLError("Not Supported")
        self.registered.append(device)


async def test_nvml_tells_every_event_of_every_gpu() -> None:
    nvml = FakeNvml()
    source = NvmlSource(nvml)
    assert nvml.registered == ["GPU-0", "GPU-1"]
    nvml.events = [SimpleNamespace(device="GPU-1", eventData=xid) for xid in (31, 31, 79)]
    found = await source.look()
    assert found.faults == [xid_fault("GPU-1", xid) for xid in (31, 31, 79)]
    assert (await source.look()).faults == []


async def test_what_nvml_told_before_it_failed_is_not_lost() -> None:
    nvml = FakeNvml()
    source = NvmlSource(nvml)
    nvml.events = [SimpleNamespace(device="GPU-1", eventData=79), nvml.NVMLError("GPU is lost")]
    nvml.lost = True
    assert (await source.look()).faults == [xid_fault("GPU-1", 79)]
    with pytest.raises(SourceFailed, match="GPU is lost"):
        await source.look()
    assert (await source.look()).faults == []


async def test_a_gpu_that_cannot_be_watched_stops_no_watcher() -> None:
    nvml = FakeNvml()
    nvml.deaf = {"GPU-0"}
    source = NvmlSource(nvml)
    assert nvml.registered == ["GPU-1"]
    nvml.events = [SimpleNamespace(device="GPU-1", eventData=31)]
    assert (await source.look()).faults == [xid_fault("GPU-1", 31)]
    nvml.deaf = {"GPU-0", "GPU-1"}
    with pytest.raises(SourceFailed, match="no GPU reports XIDs"):
        NvmlSource(nvml)


def test_without_pynvml_it_says_what_to_install() -> None:
    with pytest.raises(SourceFailed, match="pip install nvidia-ml-py"):
        load_nvml()


# Which engine


@dataclass
class FakeProcess:
    pid: int
    line: list[str]
    below: tuple[int, ...] = ()
    signals: list[int] = field(default_factory=list)

    def cmdline(self) -> list[str]:
        return self.line

    def children(self, recursive: bool) -> list[Any]:
        assert recursive
        return [SimpleNamespace(pid=pid) for pid in self.below]

    def send_signal(self, signum: int) -> None:
        self.signals.append(signum)


def node_with(*engines: FakeProcess) -> Callable[[], list[Any]]:
    router = FakeProcess(1, ["ray::ServeReplica:gateway:Router"])
    return lambda: [router, *engines]


def engine(pid: int, *below: int) -> FakeProcess:
    return FakeProcess(pid, ["ray::ServeReplica:pool-chat:Engine"], below)


def without_nvml() -> ModuleType:
    raise SourceFailed("pynvml is not installed")


def test_the_engine_whose_child_uses_the_gpu_is_ended() -> None:
    nvml, one, other = FakeNvml(), engine(10, 11, 12), engine(20, 21)
    nvml.users = [12]
    assert ProcessEngines(lambda: nvml, node_with(one, other)).restart("GPU-1") == [10]
    assert (len(one.signals), other.signals) == (1, [])


def test_a_single_engine_leaves_no_question_and_two_do() -> None:
    one, other = engine(10), engine(20)
    assert ProcessEngines(without_nvml, node_with(one), lambda: 1).restart("GPU-1") == [10]
    with pytest.raises(EngineNotFound, match="cannot be told: pynvml"):
        ProcessEngines(without_nvml, node_with(one), lambda: 2).restart("GPU-1")
    with pytest.raises(EngineNotFound, match="cannot be told: pynvml"):
        ProcessEngines(without_nvml, node_with(one, other)).restart("GPU-1")
    assert ProcessEngines(without_nvml, node_with(one, other)).restart("pid:20") == [20]
    with pytest.raises(EngineNotFound, match="none of the node's 2 engines"):
        ProcessEngines(without_nvml, node_with(one, other)).restart("pid:30")


def test_no_engine_at_all_is_said() -> None:
    with pytest.raises(EngineNotFound, match="hostPID"):
        ProcessEngines(without_nvml, node_with()).restart("GPU-1")


async def test_an_engine_that_is_not_found_is_not_looked_for_for_ever(tmp_path: Path) -> None:
    tested = bench(tmp_path)
    tested.watch._engines = ProcessEngines(without_nvml, node_with())
    await tested.see(0)
    await tested.see(31)
    assert not tested.watch.busy
    assert tested.metric("steps_failed_total", step="restart_engine") == 1


# One watcher a node


def test_the_second_watcher_stands_by_says_so_and_takes_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    registry = CollectorRegistry()
    first = Turn(tmp_path / "run" / "lock", WatchMetrics(CollectorRegistry()))
    second = Turn(tmp_path / "run" / "lock", WatchMetrics(registry))
    assert first.mine()
    assert not second.mine()
    assert not second.mine()
    assert registry.get_sample_value("headrace_gpu_standby") == 1
    assert len(told(caplog, "gpu standby")) == 1
    first.over()
    assert second.mine()
    assert registry.get_sample_value("headrace_gpu_standby") == 0


@pytest.mark.parametrize("denied", [True, False])
async def test_a_lock_that_cannot_be_taken_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denied: bool
) -> None:
    tested, lock = bench(tmp_path), tmp_path / "lock"
    turn = Turn(lock, WatchMetrics(CollectorRegistry()))
    if denied:

        def another_users(path: str, *_: Any, **__: Any) -> int:
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(os, "open", another_users)
    else:
        lock.mkdir()
    with pytest.raises(CommandFailed, match=f"cannot lock {lock}: .*remove it, or give --lock"):
        await _until(asyncio.Event(), tested.watch, turn, lock, period_s=1)
