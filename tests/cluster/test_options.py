"""What is off by default does what it says when it is on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve_app.config_file import load
from serve_app.core.gpu_readings import SIGNALS
from tests.cluster.conftest import PROFILES, Render, parsed
from tests.cluster.manifests import CHART, Manifests
from tests.cluster.network import Peer, reachable

CLOUDS = ("gke", "eks")
DIGEST = "sha256:" + "0" * 64
GPU = r"nvidia\.com/gpu"


def with_settings(render: Render, profile: str, *settings: str) -> Manifests:
    words = [word for each in settings for word in ("--set", each)]
    return parsed(profile, render(profile, *words))


def refused(render: Render, profile: str, *settings: str) -> str:
    words = [word for each in settings for word in ("--set", each)]
    done = render(profile, *words)
    assert done.returncode != 0, done.stdout[:200]
    return done.stderr


def models_volume(manifests: Manifests) -> dict[str, Any]:
    """Return the volume at /models of the small model's engines, which is mounted read-only."""
    group = next(g for g in manifests.cluster["workerGroupSpecs"] if "llama-8b" in g["groupName"])
    spec = group["template"]["spec"]
    [mount] = [m for m in spec["containers"][0]["volumeMounts"] if m["mountPath"] == "/models"]
    assert mount["readOnly"] is True
    [volume] = [v for v in spec["volumes"] if v["name"] == mount["name"]]
    return dict(volume)


def engine_extra(manifests: Manifests, pool: str) -> dict[str, Any]:
    apps = {each["name"]: each for each in manifests.serve_config["applications"]}
    extra: dict[str, Any] = apps[f"pool-{pool}"]["args"]["engine"].get("extra", {})
    return extra


@pytest.mark.parametrize("profile", CLOUDS)
def test_models_come_from_a_claim_an_image_or_a_bucket(render: Render, profile: str) -> None:
    claim = models_volume(with_settings(render, profile))
    assert claim["persistentVolumeClaim"] == {"claimName": "headrace-models", "readOnly": True}
    models = "pools.llama-8b.models"
    image = with_settings(
        render,
        profile,
        f"{models}.claim=null",
        f"{models}.image.repository=registry.test/models",
        f"{models}.image.digest={DIGEST}",
    )
    assert models_volume(image)["image"] == {
        "reference": f"registry.test/models@{DIGEST}",
        "pullPolicy": "IfNotPresent",
    }
    bucket = with_settings(
        render,
        profile,
        f"{models}.claim=null",
        f"{models}.csi.driver=bucket.test",
        f"{models}.csi.attributes.bucketName=models",
    )
    assert models_volume(bucket)["csi"] == {
        "driver": "bucket.test",
        "readOnly": True,
        "volumeAttributes": {"bucketName": "models"},
    }


@pytest.mark.parametrize("setting", ["csi.driver=bucket.test", "claim=null"])
def test_models_come_from_one_place_only(render: Render, setting: str) -> None:
    assert "oneOf" in refused(render, "eks", f"pools.llama-8b.models.{setting}")


def test_an_old_kubernetes_mounts_no_image(render: Render) -> None:
    image = ("--set", "pools.llama-8b.models.image.repository=registry.test/models")
    done = render(
        "eks", "--kube-version", "1.32.0", "--set", "pools.llama-8b.models.claim=null", *image
    )
    assert "Kubernetes mounts images from 1.33 on" in done.stderr


def test_weights_are_read_and_spans_sent_as_the_values_say(render: Render, tmp_path: Path) -> None:
    manifests = with_settings(
        render,
        "gke",
        "pools.llama-8b.models.loadFormat=fastsafetensors",
        "tracing.endpoint=http://collector.telemetry:4317",
    )
    spans = {"otlp_traces_endpoint": "http://collector.telemetry:4317"}
    assert engine_extra(manifests, "llama-8b") == {"load_format": "fastsafetensors", **spans}
    assert engine_extra(manifests, "llama-70b") == spans
    path = tmp_path / "serve.yaml"
    path.write_text(manifests.service["serveConfigV2"])
    assert load(path).warnings == ()
    engine = next(p for p in manifests.pods() if p.labels["headrace.io/component"] == "engine")
    collector = Peer({"app": "collector"}, namespace="telemetry")
    policies = manifests.of("NetworkPolicy")
    assert reachable(policies, Peer(engine.labels), collector, 4317)
    assert not reachable(policies, collector, Peer(engine.labels), 4317)
    assert not reachable(policies, Peer(engine.labels), Peer(namespace="default"), 4317)


def test_control_may_ask_the_opencost_that_it_is_told_of(manifests: Manifests) -> None:
    apps = {each["name"]: each for each in manifests.serve_config["applications"]}
    assert apps["control"]["args"]["costs"]["opencost"] == {"url": "http://opencost.opencost:9003"}
    opencost = Peer({"app": "opencost"}, namespace="opencost")
    for pod in manifests.pods():
        may = pod.labels["headrace.io/component"] == "cpu"
        assert reachable(manifests.of("NetworkPolicy"), Peer(pod.labels), opencost, 9003) is may


def test_kueue_is_given_the_service_and_a_queue_for_it(manifests: Manifests) -> None:
    [service] = manifests.of("RayService")
    [local], [cluster] = manifests.of("LocalQueue"), manifests.of("ClusterQueue")
    [flavor] = manifests.of("ResourceFlavor")
    assert service["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert service["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    assert local["metadata"]["namespace"] == service["metadata"]["namespace"]
    [group] = cluster["spec"]["resourceGroups"]
    assert [each["name"] for each in group["flavors"]] == [flavor["metadata"]["name"]]
    quota = {each["name"]: each["nominalQuota"] for each in group["flavors"][0]["resources"]}
    assert list(quota) == group["coveredResources"], "Kueue wants the same order"
    asked = {
        name
        for pod in manifests.pods()
        if pod.labels["headrace.io/component"] in ("head", "cpu", "engine")
        for container in pod.spec["containers"]
        for name in container["resources"]["requests"]
    }
    assert asked <= quota.keys(), "what no quota covers is never admitted"


def test_without_kueue_nothing_of_it_is_there(plain: Manifests) -> None:
    [service] = plain.of("RayService")
    assert not any("kueue" in key for key in service["metadata"]["labels"])
    assert "annotations" not in service["metadata"]
    assert not plain.of("ClusterQueue")


def test_flavors_of_a_queue_name_the_same_resources(render: Render) -> None:
    first = ("kueue.flavors[0].name=a", "kueue.flavors[0].quota.cpu=8")
    second = ("kueue.flavors[1].name=b", "kueue.flavors[1].quota.cpu=8")
    both = (
        *first,
        "kueue.flavors[0].quota.memory=8Gi",
        *second,
        "kueue.flavors[1].quota.memory=8Gi",
        f"kueue.flavors[1].quota.{GPU}=4",
    )
    assert "other resources" in refused(render, "kind", "kueue.enabled=true", *both)
    assert "name one at least" in refused(render, "kind", "kueue.enabled=true")


@pytest.mark.parametrize(("upgrade", "times"), [("None", 1), ("NewCluster", 2)])
def test_the_quota_has_room_for_all_groups_and_the_upgrade(
    render: Render, upgrade: str, times: int
) -> None:
    manifests = with_settings(render, "gke", "quota.enabled=true", f"upgrade.type={upgrade}")
    [quota] = manifests.of("ResourceQuota")
    most = sum(
        int(group["resources"].get("GPU", 0)) * group["maxReplicas"]
        for group in manifests.cluster["workerGroupSpecs"]
    )
    assert most > 0
    assert quota["spec"]["hard"] == {
        "requests.nvidia.com/gpu": str(times * most),
        "services.loadbalancers": "0",
        "services.nodeports": "0",
    }


def test_a_quota_of_ones_own_is_added(render: Render) -> None:
    manifests = with_settings(render, "kind", "quota.enabled=true", "quota.hard.pods=20")
    [quota] = manifests.of("ResourceQuota")
    assert quota["spec"]["hard"]["pods"] == 20


BOTH = (f"image.cpu.digest={DIGEST}", f"image.gpu.digest={DIGEST}", "image.requireDigest=true")


@pytest.mark.parametrize("profile", PROFILES)
def test_only_digests_are_rendered_where_they_are_required(render: Render, profile: str) -> None:
    manifests = with_settings(
        render,
        profile,
        *BOTH,
        "prePull.enabled=true",
        "tracing.jaeger.enabled=true",
        f"tracing.jaeger.image=jaeger@{DIGEST}",
        f"bundled.postgresImage=postgres@{DIGEST}",
        f"bundled.redisImage=redis@{DIGEST}",
    )
    for name, container in manifests.containers():
        assert container["image"].endswith(f"@{DIGEST}"), name


@pytest.mark.parametrize(
    ("profile", "setting", "named"),
    [
        ("eks", "image.gpu.digest=", "image.gpu.digest"),
        ("kind", "bundled.enabled=true", "bundled.postgresImage"),
        ("gke", "tracing.jaeger.enabled=true", "tracing.jaeger.image"),
    ],
)
def test_a_tag_is_refused_where_digests_are_required(
    render: Render, profile: str, setting: str, named: str
) -> None:
    assert f"{named}: " in refused(render, profile, *BOTH, setting)


def test_the_counters_for_nvidias_exporter_are_those_that_the_watcher_reads() -> None:
    lines = (CHART / "files" / "dcgm-counters.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines if line.strip() and not line.startswith("#")]
    assert all(len(row) == 3 and row[1].strip() in ("gauge", "counter") for row in rows)
    names = {row[0].strip() for row in rows}
    assert names >= SIGNALS
    assert len(names) == len(rows)
