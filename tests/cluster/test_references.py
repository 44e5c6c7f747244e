"""What manifests call by its name is there, or the notes ask for it; what else the notes tell."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import PROFILES, Render, parsed
from tests.cluster.manifests import CHART, Manifests

Notes = Callable[..., str]
# What names another object, and of which kind.
NAMES = {
    "priorityClassName": "PriorityClass",
    "serviceAccountName": "ServiceAccount",
    "claimName": "PersistentVolumeClaim",
}
SETTINGS = (
    "bootstrapKey.existingSecret=headrace-admin",
    "redis.certificate.existingSecret=redis-authority",
    "database.certificate.existingSecret=postgres-authority",
)


@pytest.fixture(scope="module")
def notes(helm: Path) -> Notes:
    """What helm tells who installs a profile."""

    @cache
    def run(profile: str, *settings: str) -> str:
        command = [helm, "install", "headrace", CHART, "--namespace", "serving"]
        command += ["--dry-run=client", "--values", CHART / f"values-{profile}.yaml"]
        command += [word for each in settings for word in ("--set", each)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        if "cluster unreachable" in done.stderr:
            pytest.skip("helm 3 writes notes in a cluster only")
        assert done.returncode == 0, done.stderr
        return done.stdout.partition("\nNOTES:\n")[2]

    return run


def references(node: Any) -> Iterator[tuple[str, str]]:
    """Yield kind and name of every object that a manifest refers to."""
    if isinstance(node, list):
        for each in node:
            yield from references(each)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key in NAMES:
                yield NAMES[key], value
            elif key == "secretName":
                yield "Secret", value
            elif key in ("secretKeyRef", "credentials"):
                yield "Secret", value["name"]
            else:
                yield from references(value)


@pytest.mark.parametrize("profile", PROFILES)
def test_what_is_named_is_made_or_asked_for(render: Render, notes: Notes, profile: str) -> None:
    words = [word for each in SETTINGS for word in ("--set", each)]
    manifests = parsed(profile, render(profile, *words))
    made = {(each["kind"], each["metadata"]["name"]) for each in manifests.documents}
    wanted = set(references(manifests.documents))
    assert {kind for kind, _ in wanted} >= {"PriorityClass", "ServiceAccount", "Secret"}
    asked = notes(profile, *SETTINGS)
    for kind, name in wanted - made:
        assert kind in ("Secret", "PersistentVolumeClaim"), (kind, name)
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", asked), (kind, name)


@pytest.mark.parametrize(
    ("upgrade", "told"),
    [
        ("None", "until you delete the RayService"),
        ("NewCluster", "as many GPUs again"),
        ("NewClusterWithIncrementalUpgrade", "a surge of 20 %"),
    ],
)
def test_the_notes_tell_what_an_upgrade_does(notes: Notes, upgrade: str, told: str) -> None:
    settings = (f"upgrade.type={upgrade}", "upgrade.gatewayClassName=public")
    assert told in notes("gke", *settings)


def test_the_notes_tell_the_traps_of_what_was_chosen(notes: Notes, plain: Manifests) -> None:
    told = notes(plain.profile)
    assert "does NOT hand it on" in told
    assert "Journals lie in an emptyDir" in told
    cpu = next(p for p in plain.pods() if p.labels["headrace.io/component"] == "cpu")
    assert f"{cpu.spec['terminationGracePeriodSeconds']} s, above" in told
    trial = plain.profile == "kind"
    assert ("for trials only" in told) is trial
    assert ("One CPU node" in told) is trial
    assert ("needs hostPID" in told) is not trial
    assert "POLICIES ARE OFF" in notes(plain.profile, "networkPolicy.enabled=false")
    route = ("route.enabled=true", "route.parentRefs[0].name=public")
    assert ("parametersRef" in notes(plain.profile, *route)) is (plain.profile == "eks")


def test_servers_certificates_are_trusted_by_those_who_ask_them(render: Render) -> None:
    words = [word for each in SETTINGS for word in ("--set", each)]
    wanted = {
        "head": ("RAY_REDIS_CA_CERT", "redis-authority"),
        "cpu": ("PGSSLROOTCERT", "postgres-authority"),
    }
    for settings in ((), words):
        for pod in parsed("gke", render("gke", *settings)).pods():
            [container] = pod.spec["containers"]
            given = {e["name"]: e.get("value") for e in container.get("env", [])}
            trusted = [n for n in ("RAY_REDIS_CA_CERT", "PGSSLROOTCERT") if n in given]
            mounted = [m for m in container.get("volumeMounts", []) if m["name"] == "certificate"]
            name, secret = wanted.get(pod.labels["headrace.io/component"], ("", ""))
            if not settings or not secret:
                assert not trusted, pod.owner
                assert not mounted, pod.owner
                continue
            assert trusted == [name]
            assert [(m["mountPath"], m["readOnly"]) for m in mounted] == [
                (str(Path(given[name] or "").parent), True)
            ]
            [volume] = [v for v in pod.spec["volumes"] if v["name"] == "certificate"]
            assert volume["secret"] == {
                "secretName": secret,
                "items": [{"key": "ca.crt", "path": Path(given[name] or "").name}],
            }


def test_what_runs_on_gpu_nodes_runs_wherever_engines_do(manifests: Manifests) -> None:
    """A taint that a pool tolerates and the watcher does not leaves its GPUs unwatched."""
    groups = [g for g in manifests.cluster["workerGroupSpecs"] if "GPU" in g["resources"]]
    images = {g["template"]["spec"]["containers"][0]["image"] for g in groups}
    for each in manifests.of("DaemonSet"):
        spec, name = each["spec"]["template"]["spec"], each["metadata"]["name"]
        affinity = spec["affinity"]["nodeAffinity"]
        [term] = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        [wanted] = term["matchExpressions"]
        assert not images or {c["image"] for c in spec["containers"]} == images, name
        for group in groups:
            pod = group["template"]["spec"]
            assert wanted["operator"] == "Exists"
            assert wanted["key"] in pod["nodeSelector"], (name, group["groupName"])
            for toleration in pod["tolerations"]:
                assert toleration in spec["tolerations"], (name, group["groupName"])


def test_the_chart_that_is_published_is_the_one_that_was_tested(
    helm: Path, render: Render, tmp_path: Path
) -> None:
    """Its files are links to the repository's: the package has to hold what they lead to."""
    command = [helm, "package", CHART, "--destination", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    [package] = tmp_path.glob("headrace-*.tgz")
    command = [helm, "template", "headrace", package, "--namespace", "serving"]
    command += ["--kube-version", "1.37.0", "--values", CHART / "values-eks.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == render("eks").stdout
