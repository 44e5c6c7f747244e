"""Manifests against the CRDs' own schemas, and metrics against those that there are."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.cluster.conftest import PROFILES, Render, parsed
from tests.cluster.crds import FILES, refusals
from tests.cluster.manifests import CHART, ROOT, Manifests

# Kinds whose CRDs are not to be had: their fields are compared in test_policies.py.
UNKNOWN = (
    "GCPBackendPolicy",
    "HealthCheckPolicy",
    "LoadBalancerConfiguration",
    "TargetGroupConfiguration",
)
# Of Kubernetes: the oldest that the chart takes, and the newest that is known.
KUBERNETES = ("1.29", "1.37")
METRIC = re.compile(r"headrace_[a-z_]+")


def problems(manifests: Manifests) -> list[str]:
    """Return what the CRDs have against the manifests of their kinds."""
    found = []
    for document in manifests.documents:
        if document["kind"] in FILES:
            found += refusals(document)
    return found[:5]


def test_manifests_are_what_their_crds_say(manifests: Manifests) -> None:
    assert not problems(manifests)
    kinds = {document["kind"] for document in manifests.documents}
    assert kinds >= {"RayService", "HTTPRoute", "ClusterQueue", "LocalQueue", "ResourceFlavor"}


MODELS = "pools.llama-8b.models"


@pytest.mark.parametrize(
    "settings",
    [
        ("upgrade.type=NewCluster",),
        ("upgrade.type=NewClusterWithIncrementalUpgrade", "upgrade.gatewayClassName=public"),
        (f"{MODELS}.claim=null", f"{MODELS}.image.repository=models", f"{MODELS}.image.tag=v1"),
        (f"{MODELS}.claim=null", f"{MODELS}.csi.driver=bucket.test"),
        ("image.pullSecrets={registry}", "networkPolicy.enabled=false", "disruption.enabled=false"),
        ("cpu.nodeSelector.pool=cpu", "priorityClasses.enabled=false", "gpuHealth.enabled=false"),
    ],
    ids=lambda settings: settings[0],
)
def test_other_choices_are_what_the_crds_say_too(render: Render, settings: tuple[str, ...]) -> None:
    words = [word for each in settings for word in ("--set", each)]
    manifests = parsed("gke", render("gke", *words))
    assert not problems(manifests)
    for document in manifests.documents:
        if document["kind"] not in (*FILES, *UNKNOWN):
            kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_own_kinds_are_what_its_strict_schemas_say(
    manifests: Manifests, version: str
) -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}.0-0"
    seen = set()
    for document in manifests.documents:
        if document["kind"] not in (*FILES, *UNKNOWN):
            kubernetes_validate.validate(document, version, strict=True)
            seen.add(document["kind"])
    assert {"Deployment" if manifests.profile == "kind" else "DaemonSet", "NetworkPolicy"} <= seen


def test_a_misspelt_field_of_kubernetes_would_be_seen(manifests: Manifests) -> None:
    wrong = json.loads(json.dumps(manifests.of("NetworkPolicy")[0]))
    wrong["spec"]["policyType"] = wrong["spec"].pop("policyTypes")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES[-1], strict=True)


@pytest.mark.parametrize("profile", PROFILES)
def test_helm_has_nothing_to_say_against_the_chart(helm: Path, profile: str) -> None:
    command = [str(helm), "lint", "--strict", str(CHART)]
    command += ["--values", str(CHART / f"values-{profile}.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_misspelt_field_would_be_seen(manifests: Manifests) -> None:
    [service] = manifests.of("RayService")
    wrong = json.loads(json.dumps(service))
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["maxReplica"] = 3
    assert refusals(wrong)


def test_every_object_is_named_once_and_in_the_namespace(manifests: Manifests) -> None:
    wide = {"ClusterRole", "ClusterRoleBinding", "PriorityClass", "ClusterQueue", "ResourceFlavor"}
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests.documents]
    assert len(names) == len(set(names))
    for document in manifests.documents:
        wanted = None if document["kind"] in wide else "serving"
        assert document["metadata"].get("namespace") == wanted, document["metadata"]


def declared() -> set[str]:
    """Return the name of every metric of ours, as the source declares it."""
    return {
        name
        for path in (ROOT / "serve_app").rglob("*.py")
        for name in METRIC.findall(path.read_text())
    }


def asked(text: str) -> set[str]:
    """Return the metrics that an expression asks for; a histogram by its own name."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in METRIC.findall(text)}


def test_alerts_and_the_dashboard_ask_for_metrics_that_there_are(manifests: Manifests) -> None:
    rules = [
        rule
        for each in manifests.of("PrometheusRule")
        for group in each["spec"]["groups"]
        for rule in group["rules"]
    ]
    assert len(rules) == (0 if manifests.profile == "kind" else 6)
    for rule in rules:
        assert asked(rule["expr"]), rule["alert"]
        assert asked(rule["expr"]) <= declared(), rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}
    [board] = [e for e in manifests.of("ConfigMap") if e["metadata"]["name"].endswith("dashboards")]
    panels = json.loads(board["data"]["headrace-overview.json"])["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    assert len(panels) == len({panel["id"] for panel in panels})
    for expression in expressions:
        assert asked(expression), expression
        assert asked(expression) <= declared(), expression
