"""NetworkPolicies as a model: who reaches whom, and on which ports, as Kubernetes defines it.

Policies add up: a pod that any policy of a direction selects lets through what one of them lets
through, a pod that none selects everything. A connection needs both ends' consent.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.cluster.manifests import Manifests

NAMESPACE = "serving"
Policies = list[dict[str, Any]]


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod of a namespace or, with an address, something outside."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    address: str = ""


RAY = ("head", "cpu", "engine")
# Who is not of the release. Whoever is outside of the cluster has an address.
OTHERS = {
    "client": Peer(address="203.0.113.9"),
    "store": Peer(address="10.1.2.3"),
    "dns": Peer({"k8s-app": "kube-dns"}, namespace="kube-system"),
    "operator": Peer({"app": "kuberay-operator"}, namespace="kuberay-system"),
    "prometheus": Peer({"app": "prometheus"}, namespace="monitoring"),
    "opencost": Peer({"app": "opencost"}, namespace="opencost"),
    "stranger": Peer({"app": "shop"}, namespace="default"),
    "neighbour": Peer({"app": "shop"}),
}


def ends(manifests: Manifests) -> dict[str, Peer]:
    """Return every end there may be: the release's pods by component, and the others."""
    own = {pod.labels["headrace.io/component"]: Peer(pod.labels) for pod in manifests.pods()}
    return {**own, **OTHERS}


def reachable(policies: Policies, source: Peer, target: Peer, port: int) -> bool:
    """Return whether the policies let TCP from one to the other."""
    return _lets("egress", policies, source, target, port) and _lets(
        "ingress", policies, target, source, port
    )


def opened(policies: Policies, source: Peer, target: Peer) -> list[tuple[int, int]]:
    """Return the TCP ports, as first and last of each run, that one may reach of the other."""
    runs: list[tuple[int, int]] = []
    edges = sorted({1, 65536} | _edges(policies))
    for first, after in pairwise(edges):
        if reachable(policies, source, target, first):
            joined = runs and runs[-1][1] == first - 1
            runs[-1:] = [(runs[-1][0], after - 1)] if joined else [*runs[-1:], (first, after - 1)]
    return runs


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a label selector selects these labels."""
    wanted = selector.get("matchLabels", {})
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        _matches(each, labels) for each in selector.get("matchExpressions", [])
    )


def _matches(expression: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = expression["key"], expression.get("values", [])
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case other:
            raise AssertionError(f"no operator of selectors: {other}")


def _lets(way: str, policies: Policies, own: Peer, other: Peer, port: int) -> bool:
    if own.address or own.namespace != NAMESPACE:
        return True  # somebody else's to say
    selecting = [
        each["spec"]
        for each in policies
        if way.capitalize() in each["spec"]["policyTypes"]
        and selects(each["spec"]["podSelector"], own.labels)
    ]
    end = "to" if way == "egress" else "from"
    return not selecting or any(
        _port_matches(rule, port) and _peer_matches(rule.get(end), other)
        for spec in selecting
        for rule in spec.get(way, [])
    )


def _port_matches(rule: Mapping[str, Any], port: int) -> bool:
    ports = rule.get("ports")
    return not ports or any(
        each.get("protocol", "TCP") == "TCP"
        and each.get("port", 1) <= port <= each.get("endPort", each.get("port", 65535))
        for each in ports
    )


def _peer_matches(peers: list[dict[str, Any]] | None, other: Peer) -> bool:
    return not peers or any(_is_peer(each, other) for each in peers)


def _is_peer(peer: Mapping[str, Any], other: Peer) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return _within(other, block["cidr"]) and not any(
            _within(other, each) for each in block.get("except", [])
        )
    if other.address:
        return False
    names = {"kubernetes.io/metadata.name": other.namespace}
    if "namespaceSelector" in peer:
        at_home = selects(peer["namespaceSelector"], names)
    else:
        at_home = other.namespace == NAMESPACE
    return at_home and selects(peer.get("podSelector", {}), other.labels)


def _within(other: Peer, cidr: str) -> bool:
    return bool(other.address) and (
        ipaddress.ip_address(other.address) in ipaddress.ip_network(cidr)
    )


def _edges(policies: Policies) -> set[int]:
    """Return the ports at which anything may change: each first one, and each after a last."""
    found = set()
    for policy in policies:
        for way in ("ingress", "egress"):
            for rule in policy["spec"].get(way, []):
                for each in rule.get("ports") or []:
                    if "port" in each:
                        found |= {each["port"], each.get("endPort", each["port"]) + 1}
    return found
