"""Who reaches whom: what a running cluster's sockets need is open, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster.conftest import Render, parsed
from tests.cluster.manifests import Manifests
from tests.cluster.network import NAMESPACE, OTHERS, RAY, Peer, ends, opened, reachable

# Ray's client, and what one forwards a port to.
NOBODYS = ("client", "query")
Runs = list[tuple[int, int]]


def only(*ports: int) -> Runs:
    return [(port, port) for port in ports]


def intended(manifests: Manifests) -> dict[tuple[str, str], Runs]:
    """Return all that is open but among Ray's pods; what is not here is shut."""
    found = {("head", "store"): only(443, 6443), ("head", "client"): only(443, 6443)}
    for name in ends(manifests).keys() - OTHERS.keys():
        found[name, "dns"] = only(53)
    for source in OTHERS:
        found |= {(source, target): only(8000) for target in ("cpu", "engine")}
    found["operator", "head"] = only(8000, 8265, 52365)
    found["prometheus", "head"] = only(8080)
    found |= {("prometheus", each): only(8000, 8080) for each in ("cpu", "engine")}
    found["cpu", "opencost"] = only(9003)
    found["engine", "jaeger"] = only(4317)
    if manifests.profile == "kind":
        return {**found, ("cpu", "postgres"): only(5432), ("head", "redis"): only(6379)}
    found |= {("gpu-health", each): only(9400) for each in OTHERS}
    found |= {("gpu-health", each): only(443, 6443, 9400) for each in ("client", "store")}
    found["gpu-health", "dns"] = only(53, 9400)
    found |= {("gpu-health", "head"): only(6379), ("prometheus", "gpu-health"): only(9401)}
    return {**found, ("cpu", "store"): only(5432), ("head", "store"): only(443, 6379, 6443)}


def test_nothing_else_can_but_among_rays_pods(manifests: Manifests) -> None:
    policies, by_name, wanted = manifests.of("NetworkPolicy"), ends(manifests), intended(manifests)
    own = by_name.keys() - OTHERS.keys()
    for source in by_name:
        for target in by_name:
            if (source in RAY and target in RAY) or not {source, target} & own:
                continue
            found = opened(policies, by_name[source], by_name[target])
            assert found == wanted.get((source, target), []), f"{source} to {target}"


def test_a_gateway_for_some_is_shut_to_others(render: Render) -> None:
    label = "networkPolicy.gatewayFrom[0].namespaceSelector.matchLabels.team=web"
    shut = parsed("eks", render("eks", "--set", label)).of("NetworkPolicy")
    cpu = ends(parsed("eks", render("eks")))["cpu"]
    assert not reachable(shut, OTHERS["client"], cpu, 8000)
    assert not reachable(shut, OTHERS["stranger"], cpu, 8000)
    assert reachable(shut, OTHERS["prometheus"], cpu, 8000)


def test_another_channel_range_opens_another_range(manifests: Manifests, render: Render) -> None:
    name = "pool-sim" if manifests.profile == "kind" else "pool-llama-8b"
    ports = f"serve.overrides.{name}.args.channel_ports={{22000,22100}}"
    other = parsed(manifests.profile, render(manifests.profile, "--set", ports))
    cpu, engine = ends(other)["cpu"], ends(other)["engine"]
    assert reachable(other.of("NetworkPolicy"), cpu, engine, 22100)
    assert not reachable(manifests.of("NetworkPolicy"), cpu, engine, 22100)


def test_every_named_port_is_a_port_of_the_policies(manifests: Manifests) -> None:
    policies, by_name = manifests.of("NetworkPolicy"), ends(manifests)
    for pod in manifests.pods():
        for container in pod.spec["containers"]:
            for port in container.get("ports", []):
                number, target = port["containerPort"], Peer(pod.labels)
                reached = any(
                    reachable(policies, each, target, number) for each in by_name.values()
                )
                assert reached is (port["name"] not in NOBODYS), (pod.owner, port)


def policy(selected: dict[str, str], **rules: Any) -> dict[str, Any]:
    types = [way.capitalize() for way in rules]
    return {"spec": {"podSelector": {"matchLabels": selected}, "policyTypes": types, **rules}}


ALL: Runs = [(1, 65535)]
WEB, DATA = Peer({"app": "web"}), Peer({"app": "data"})
FROM_WEB = {"podSelector": {"matchLabels": {"app": "web"}}}
OF_TEAM = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "team"}}}
BUT_11 = {"cidr": "0.0.0.0/0", "except": ["11.0.0.0/8"]}
AT_TEAM = Peer({"app": "web"}, namespace="team")


@pytest.mark.parametrize(
    ("policies", "source", "target", "runs"),
    [
        pytest.param([], WEB, DATA, ALL, id="no policy, all open"),
        pytest.param([policy({}, ingress=[])], WEB, DATA, [], id="denied by default"),
        pytest.param([policy({}, egress=[])], WEB, DATA, [], id="neither out"),
        pytest.param([policy({}, egress=[])], AT_TEAM, DATA, ALL, id="another namespace's"),
        pytest.param([policy({}, ingress=[{}])], WEB, DATA, ALL, id="an empty rule is all"),
        pytest.param(
            [policy({}, ingress=[]), policy({}, ingress=[{"ports": [{"port": 5, "endPort": 7}]}])],
            WEB,
            DATA,
            [(5, 7)],
            id="policies add up",
        ),
        pytest.param(
            [policy({}, ingress=[{"ports": [{"port": 53, "protocol": "UDP"}]}])],
            WEB,
            DATA,
            [],
            id="another protocol's",
        ),
        pytest.param(
            [policy({}, ingress=[{"from": [FROM_WEB]}])], AT_TEAM, DATA, [], id="pods at home only"
        ),
        pytest.param(
            [policy({}, ingress=[{"from": [{**FROM_WEB, **OF_TEAM}]}])],
            WEB,
            DATA,
            [],
            id="both of one peer",
        ),
        pytest.param(
            [policy({}, ingress=[{"from": [FROM_WEB, OF_TEAM]}])],
            WEB,
            DATA,
            [(1, 65535)],
            id="either of two peers",
        ),
        pytest.param(
            [policy({}, egress=[{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}])],
            WEB,
            Peer(address="11.0.0.1"),
            [],
            id="outside the block",
        ),
        pytest.param(
            [
                policy(
                    {},
                    egress=[{"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["11.0.0.0/8"]}}]}],
                )
            ],
            WEB,
            Peer(address="11.0.0.1"),
            [],
            id="excepted",
        ),
    ],
)
def test_the_model_is_kubernetes(
    policies: list[dict[str, Any]], source: Peer, target: Peer, runs: Runs
) -> None:
    assert WEB.namespace == NAMESPACE
    assert opened(policies, source, target) == runs
