"""The sockets of a running cluster, recorded, against the policies: what must talk can."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.config import CHANNEL_PORTS
from tests.cluster import record_flows
from tests.cluster.manifests import Manifests
from tests.cluster.network import RAY, ends, opened, reachable
from tests.cluster.pods import Pod, bridge

FLOWS = yaml.safe_load(Path(__file__).with_name("flows.yaml").read_text())


def stopped(flows: list[dict[str, Any]], manifests: Manifests) -> list[str]:
    """Return the flows that the policies do not let through."""
    policies, by_name = manifests.of("NetworkPolicy"), ends(manifests)
    return [
        f"{flow['from']} to {flow['to']}:{port}"
        for flow in flows
        for port in flow["ports"]
        if not reachable(policies, by_name[flow["from"]], by_name[flow["to"]], port)
    ]


def test_what_was_seen_to_talk_can(manifests: Manifests) -> None:
    seen = {(flow["from"], flow["to"]) for flow in FLOWS["flows"]}
    assert seen >= {("cpu", "engine"), ("engine", "head"), ("operator", "head"), ("client", "cpu")}
    assert not stopped(FLOWS["flows"], manifests)


@pytest.mark.proof
@pytest.mark.ray
@pytest.mark.skipif(os.geteuid() != 0, reason="pods with addresses of their own need root")
@pytest.mark.skipif(shutil.which("nft") is None, reason="needs nft (Debian's nftables)")
def test_a_cluster_starts_and_serves_under_the_policies_and_shuts_others_out() -> None:
    """Real Ray in pods with addresses of their own, whose kernel enforces the policies."""
    if os.environ.get("HEADRACE_ISOLATED") != "1":
        pytest.skip("it makes network devices: run it by scripts/isolated")
    manifests = record_flows.render()
    with bridge(), record_flows.running(manifests, enforced=True) as pods:
        workers = [pod for name, pod in pods.items() if "-" in name]
        assert all(record_flows.chat(pods["client"], each) for each in workers)
        assert connects(pods["prometheus"], pods["head"], 8080)
        assert connects(pods["operator"], pods["head"], 8265)
        for name in ("client", "stranger", "prometheus"):
            for target, port in (("head", 8265), ("head", 6379), ("head", 10001), ("cpu-0", 6380)):
                assert not connects(pods[name], pods[target], port), (name, target, port)
        assert not connects(pods["engine-0"], pods["head"], 8265)
        assert connects(pods["head"], pods["head"], 8265), "somebody does listen"


def connects(source: Pod, target: Pod, port: int) -> bool:
    """Whether a TCP connection can be made; in a second it is, or is not."""
    command = f"exec 3<>/dev/tcp/{target.address}/{port}"
    return source.run("timeout", "2", "bash", "-c", command).returncode == 0


def test_ports_that_run_code_are_for_rays_pods_and_the_operator_alone(
    manifests: Manifests,
) -> None:
    """Dashboard, jobs, client, GCS, raylets, workers: whoever reaches them may run code."""
    policies, by_name = manifests.of("NetworkPolicy"), ends(manifests)
    dangerous = {port for ports in FLOWS["listening"].values() for port in ports} - {8000, 8080}
    assert dangerous >= {6379, 8265, 6380, 52365}
    dangerous |= {10001, 10002, 19999, *CHANNEL_PORTS, 30000, 32768}
    for source in ("client", "prometheus", "stranger", "neighbour", "dns", "pre-pull"):
        for target in RAY:
            for port in dangerous:
                assert not reachable(policies, by_name[source], by_name[target], port), (
                    f"{source} reaches {target}:{port}"
                )


def test_among_rays_pods_what_is_open_was_seen_in_use(manifests: Manifests) -> None:
    """A range that nobody used in a whole run has no reason to be open."""
    used = {
        port
        for flow in FLOWS["flows"]
        if flow["from"] in RAY and flow["to"] in RAY
        for port in flow["ports"]
    }
    [policy] = [
        each for each in manifests.of("NetworkPolicy") if each["metadata"]["name"].endswith("-ray")
    ]
    for rule in policy["spec"]["egress"]:
        assert rule["to"], "to anywhere"
        for each in rule["ports"]:
            run = range(each["port"], each.get("endPort", each["port"]) + 1)
            assert used & set(run), f"{each}: nothing was seen there"


def test_nobody_reaches_rays_client(manifests: Manifests) -> None:
    policies, by_name = manifests.of("NetworkPolicy"), ends(manifests)
    for name, source in by_name.items():
        for target in RAY:
            runs = opened(policies, source, by_name[target])
            assert not any(first <= 10001 <= last for first, last in runs), f"{name} to {target}"
