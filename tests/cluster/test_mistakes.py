"""Values that can be written and cannot be meant: refused, by name, before anything is applied."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import PROFILES, Render
from tests.cluster.manifests import CHART

VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
# Lists that may be empty: everybody may call, nothing more is opened.
MAY_BE_EMPTY = {"networkPolicy.gatewayFrom", "networkPolicy.extraEgress"}


def refusal(render: Render, profile: str, *settings: str) -> str:
    """Return what helm says against a profile with other values, nothing if nothing.

    Helm 3 names a value by dots, helm 4 by slashes: here all have dots.
    """
    words = [word for each in settings for word in ("--set-json", each)]
    done = render(profile, *words)
    return done.stderr.replace("/", ".") if done.returncode else ""


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ('hed={"x": 1}', "hed"),
        ('cpu.minReplicas="two"', "cpu.minReplicas"),
        ("cpu.minReplicas=5", "cpu.minReplicas: 5 is above maxReplicas, 4"),
        ("pools.llama-8b.onDemand.minReplicas=9", "pools.llama-8b.onDemand.minReplicas: 9"),
        ("pools.llama-8b.rayCpus=3", "pools.llama-8b.rayCpus: 3, and a replica takes 4"),
        ("pools.llama-70b.gpus=1", "pools.llama-70b.gpus: 1, and a replica takes 2"),
        ('cacheSize="lots"', "cacheSize"),
        ('head.resources.limits.memory="8GiB"', "head.resources.limits.memory"),
        ('pools.llama-8b.shmSize="8 Gi"', "pools.llama-8b.shmSize"),
        ('gpuHealth.enabled="yes"', "gpuHealth.enabled"),
        ('image.gpu.digest="sha256:abc"', "image.gpu.digest"),
        ('image.cpu.tag="latest"', "headrace-cpu: name it by a digest"),
        ('image.gpu.tag=""', "headrace-gpu: name it by a digest"),
        ('networkPolicy.postgres.cidrs=["database.internal"]', "networkPolicy.postgres.cidrs"),
        ("route.enabled=true", "route.parentRefs: name the Gateway"),
        ('serve.overrides.gateway={"args": {"limits": {"max_stream_s": "long"}}}', "max_stream_s"),
    ],
    ids=lambda value: value.partition("=")[0],
)
def test_what_cannot_be_meant_is_named(render: Render, setting: str, said: str) -> None:
    assert said in refusal(render, "gke", setting)


def test_a_policy_that_names_nobody_is_not_one_for_everybody(render: Render) -> None:
    """To Kubernetes an empty list of peers or ports is all of them, and an empty selector too."""
    names = [f"networkPolicy.{name}" for name in VALUES["networkPolicy"]]
    lists = dict(lists_of(VALUES, {*names, "tracing.collector", "opencost.namespace"}))
    assert {"networkPolicy.dns", "networkPolicy.apiServer.ports"} <= lists.keys()
    for name, value in lists.items():
        if isinstance(value, dict):
            [key] = value
            setting = f"{name}.{key.replace('.', chr(92) + '.')}=null"
        else:
            setting = f"{name}=[]"
        said = refusal(render, "kind", setting)
        assert bool(said) is (name not in MAY_BE_EMPTY), name
        assert not said or name in said


def lists_of(values: dict[str, Any], names: set[str]) -> list[tuple[str, Any]]:
    """Return the lists and selectors at or one below these names."""
    found = []
    for name in names:
        first, second = name.split(".")
        value = values[first][second]
        if isinstance(value, dict) and any(isinstance(each, list) for each in value.values()):
            found += [(f"{name}.{k}", v) for k, v in value.items() if isinstance(v, list)]
        elif isinstance(value, list | dict):
            found.append((name, value))
    return found


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("serve.overrides.control", {"args": {"database": "postgresql://u:secret@host/ledger"}}),
        ("redis.address", "redis://:secret@host:6379"),
        ("opencost.url", "http://u:secret@opencost:9003"),
        ("tracing.endpoint", "http://u:secret@collector:4317"),
    ],
)
def test_a_password_in_a_url_is_refused(
    render: Render, profile: str, name: str, value: object
) -> None:
    said = refusal(render, profile, f"{name}={json.dumps(value)}")
    assert "password" in said or name in said
