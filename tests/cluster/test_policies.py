"""What may never be rendered: privileges, secrets by value, open ports, ends that cut streams."""

from __future__ import annotations

import re

import pytest
import yaml

from serve_app.config import GatewayArgs, PoolArgs
from serve_app.kubernetes import rbac
from tests.cluster.conftest import PROFILES, Render, parsed
from tests.cluster.manifests import CHART, ROOT, Manifests
from tests.cluster.network import selects

RAY = ("head", "cpu", "engine")
SECRET = re.compile(r"password|token|secret|key$", re.IGNORECASE)


def test_no_container_has_privileges(manifests: Manifests) -> None:
    for name, container in manifests.containers():
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["runAsNonRoot"] is True, name
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert not security.get("privileged"), name
    for pod in manifests.pods():
        security = pod.spec["securityContext"]
        assert security["runAsUser"] > 0, pod.owner
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, pod.owner
        assert not pod.spec.get("hostNetwork"), pod.owner
        assert not pod.spec.get("hostIPC"), pod.owner
        for container in pod.spec["containers"]:
            assert not any("hostPort" in each for each in container.get("ports", [])), pod.owner
        watcher = pod.labels["headrace.io/component"] == "gpu-health"
        assert pod.spec.get("hostPID", False) is watcher, pod.owner
        volumes = pod.spec.get("volumes", [])
        assert watcher or not any("hostPath" in each for each in volumes), pod.owner


def test_what_is_written_to_is_a_volume(manifests: Manifests) -> None:
    for pod in manifests.pods():
        if pod.labels["headrace.io/component"] in RAY:
            [container] = pod.spec["containers"]
            mounts = {each["mountPath"] for each in container["volumeMounts"]}
            assert mounts >= {"/tmp", "/dev/shm", "/home/headrace", "/var/lib/headrace"}
            folders = [e["value"] for e in container["env"] if str(e.get("value"))[:5] == "/var/"]
            assert folders
            assert all(any(f.startswith(m) for m in mounts) for f in folders)


def test_every_container_has_limits(manifests: Manifests) -> None:
    for name, container in manifests.containers():
        for part in ("requests", "limits"):
            assert {"cpu", "memory"} <= container["resources"][part].keys(), name


def test_no_image_floats(manifests: Manifests) -> None:
    for name, container in manifests.containers():
        tag = container["image"].rpartition("/")[2].partition(":")[2]
        assert tag not in ("", "latest"), f"{name}: {container['image']}"


def test_secrets_come_by_reference(manifests: Manifests) -> None:
    assert not manifests.of("Secret")
    for name, container in manifests.containers():
        for variable in container.get("env", []):
            if SECRET.search(variable["name"]):
                assert "value" not in variable, f"{name}: {variable['name']}"
    password = manifests.cluster["gcsFaultToleranceOptions"]["redisPassword"]
    assert password.keys() == {"valueFrom"}
    assert "://" in manifests.service["serveConfigV2"]
    assert not re.search(r"://[^/\s]*:[^/\s]*@", yaml.safe_dump(manifests.documents))


def test_only_the_gpu_watcher_and_the_head_have_a_token_of_kubernetes(
    manifests: Manifests,
) -> None:
    for pod in manifests.pods():
        may = pod.labels["headrace.io/component"] in ("head", "gpu-health")
        assert pod.spec["automountServiceAccountToken"] is may, pod.owner


def test_nothing_is_published_but_by_the_route_to_the_gateway(manifests: Manifests) -> None:
    assert manifests.cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert "enableIngress" not in manifests.cluster["headGroupSpec"]
    assert all(each["spec"]["type"] == "ClusterIP" for each in manifests.of("Service"))
    assert not manifests.of("Ingress")
    [route] = manifests.of("HTTPRoute")
    [rule] = route["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": "headrace-serve-svc", "port": 8000}]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]


def longest_response_s(manifests: Manifests) -> float:
    gateway = next(a for a in manifests.serve_config["applications"] if a["name"] == "gateway")
    return GatewayArgs.model_validate(gateway["args"]).limits.max_stream_s


# Settings of HAProxy's that end a response.
CUTS = (
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S",
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S",
    "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S",
)


@pytest.mark.parametrize("longest_s", [600, 3600])
@pytest.mark.parametrize("profile", PROFILES)
def test_nothing_ends_before_the_longest_response_but_spot_nodes(
    render: Render, profile: str, longest_s: int
) -> None:
    """The longest response counts from the request's arrival: what waits is within it."""
    settings = ["route.enabled=true", "route.parentRefs[0].name=public"]
    settings += [f"serve.overrides.gateway.args.limits.max_stream_s={longest_s}"]
    words = [word for each in settings for word in ("--set", each)]
    manifests = parsed(profile, render(profile, *words))
    assert longest_response_s(manifests) == longest_s
    assert manifests.service["rayClusterDeletionDelaySeconds"] > longest_s
    for application in manifests.serve_config["applications"]:
        if application["name"] != "control":
            kinds = {"gateway": GatewayArgs}
            args = kinds.get(application["name"], PoolArgs).model_validate(application["args"])
            assert args.replicas.graceful_shutdown_timeout_s > longest_s, application["name"]
    for pod in manifests.pods():
        if pod.labels["headrace.io/component"] not in RAY:
            continue
        [container] = pod.spec["containers"]
        given = {each["name"]: each.get("value") for each in container["env"]}
        drain_s = float(given["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert pod.spec["terminationGracePeriodSeconds"] > drain_s, pod.owner
        assert all(float(given[name]) > longest_s for name in CUTS), pod.owner
        if pod.labels["headrace.io/component"] != "head" and not pod.owner.endswith("-spot"):
            assert drain_s > longest_s, pod.owner
        assert pod.spec["restartPolicy"] == "Never", "the autoscaler's second version wants it"
    [route] = manifests.of("HTTPRoute")
    for timeout in route["spec"]["rules"][0]["timeouts"].values():
        assert int(timeout.removesuffix("s")) > longest_s


def test_googles_load_balancer_waits_as_long_and_asks_what_there_is(manifests: Manifests) -> None:
    policies = {kind: manifests.of(kind) for kind in ("GCPBackendPolicy", "HealthCheckPolicy")}
    if manifests.profile != "gke":
        assert not any(policies.values())
        return
    [backend], [health] = policies.values()
    service = {"group": "", "kind": "Service", "name": "headrace-serve-svc"}
    [route] = manifests.of("HTTPRoute")
    wanted_s = int(route["spec"]["rules"][0]["timeouts"]["request"].removesuffix("s"))
    assert backend["spec"] == {
        "default": {
            "timeoutSec": wanted_s,
            "connectionDraining": {"drainingTimeoutSec": min(3600, wanted_s)},
        },
        "targetRef": service,
    }
    check = {"port": 8000, "requestPath": "/-/healthz"}
    assert health["spec"] == {
        "default": {"config": {"type": "HTTP", "httpHealthCheck": check}},
        "targetRef": service,
    }


def test_awss_load_balancer_waits_as_long_and_asks_what_there_is(manifests: Manifests) -> None:
    """Fields as in the controller's own definitions, which are not among the CRDs beside us."""
    kinds = ("LoadBalancerConfiguration", "TargetGroupConfiguration")
    if manifests.profile != "eks":
        assert not any(manifests.of(kind) for kind in kinds)
        return
    [[balancer], [targets]] = [manifests.of(kind) for kind in kinds]
    [route] = manifests.of("HTTPRoute")
    wanted = route["spec"]["rules"][0]["timeouts"]["request"].removesuffix("s")
    assert int(wanted) > longest_response_s(manifests)
    assert balancer["spec"] == {
        "loadBalancerAttributes": [{"key": "idle_timeout.timeout_seconds", "value": wanted}]
    }
    assert targets["spec"] == {
        "targetReference": {"kind": "Service", "name": "headrace-serve-svc"},
        "defaultConfiguration": {
            "targetType": "ip",
            "healthCheckConfig": {"healthCheckPath": "/-/healthz"},
            "targetGroupAttributes": [
                {"key": "deregistration_delay.timeout_seconds", "value": wanted}
            ],
        },
    }


def test_disruption_budgets_are_ones_that_work_for_ray_pods(manifests: Manifests) -> None:
    budgets = manifests.of("PodDisruptionBudget")
    assert len(budgets) == (0 if manifests.profile == "kind" else 1)
    for budget in budgets:
        spec = budget["spec"]
        assert "maxUnavailable" not in spec, "a RayCluster has no scale subresource"
        assert type(spec["minAvailable"]) is int
        assert all(key.startswith("headrace.io/") for key in spec["selector"]["matchLabels"])
        floor = sum(
            group["minReplicas"]
            for group in manifests.cluster["workerGroupSpecs"]
            if selects(spec["selector"], group["template"]["metadata"]["labels"])
        )
        assert 0 < spec["minAvailable"] < floor, "a drain must be possible"


def test_groups_are_as_the_autoscaler_wants_them(manifests: Manifests) -> None:
    groups = manifests.cluster["workerGroupSpecs"]
    assert manifests.cluster["autoscalerOptions"]["version"] == "v2"
    for group in groups:
        assert "replicas" not in group, "applied again it would undo the autoscaler's decision"
        assert group["scaleStrategy"] == {}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        assert group["resources"].get("GPU") == limits.get("nvidia.com/gpu")
    by_name = {group["groupName"]: group for group in groups}
    assert len(by_name) == len(groups)
    for name, group in by_name.items():
        other = by_name.get(name.replace("-spot", "-on-demand"))
        if name.endswith("-spot") and other:
            assert group["priority"] > other["priority"], "spot is tried first"


def test_ray_pods_bear_our_own_labels_only(manifests: Manifests) -> None:
    """KubeRay's services select the head by app.kubernetes.io labels that are its own."""
    for pod in manifests.pods():
        if pod.labels["headrace.io/component"] in RAY:
            assert all(label.startswith("headrace.io/") for label in pod.labels), pod.owner


def test_the_gpu_watcher_may_what_it_prints_and_no_more(manifests: Manifests) -> None:
    if manifests.profile == "kind":
        assert not manifests.of("ClusterRole")
        return
    for wanted in rbac("headrace-gpu-health", "serving"):
        [found] = manifests.of(wanted["kind"])
        assert found["metadata"]["name"] == wanted["metadata"]["name"]
        for part in ("rules", "roleRef", "subjects"):
            assert found.get(part) == wanted.get(part), wanted["kind"]


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_images_are_made_of_what_is_there(variant: str) -> None:
    images = ROOT / "cluster" / "images"
    lines = (images / f"Dockerfile.{variant}").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    context = [each for each in copied if not each.startswith(("--from", "/"))]
    ignored = (images / f"Dockerfile.{variant}.dockerignore").read_text()
    for name in context:
        assert (ROOT / name).exists(), name
        assert f"!{name.rstrip('/')}\n" in ignored, name
    text = "\n".join(lines)
    last_stage = text[text.rindex("\nFROM ") :]
    assert "USER 1000:1000" in last_stage
    assert re.search(r"install .*\bbash\b.*\bwget\b", last_stage), "KubeRay's probes call them"
    assert f"requirements/image-{variant}.lock" in text
    before, _, _ = text.partition("/uv pip install")
    assert re.search(r"^ENV .*\bUV_COMPILE_BYTECODE=1\b", before, re.MULTILINE), "starts are slow"
    haproxy = "/opt/headrace/bin/headrace-haproxy"
    assert haproxy in (CHART / "templates" / "_helpers.tpl").read_text()
    assert "COPY --from=build /opt/headrace /opt/headrace" in last_stage
