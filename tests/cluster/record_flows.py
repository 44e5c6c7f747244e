"""Write tests/cluster/flows.yaml: who connected to whom on which port, in a running cluster.

    scripts/isolated .venv/bin/python -m tests.cluster.record_flows tests/cluster/flows.yaml

The kind profile as rendered, in pods with addresses of their own (tests/cluster/pods.py): a head,
two CPU and two engine pods start with the parameters, resources and environment of the manifests;
pods that stand for the KubeRay operator, Prometheus and a client do what those do. What is
written down are the sockets. Beside it stand the ports that somebody listens on.

Changed for it: Control's ledger is SQLite and the GCS keeps its state in memory (PostgreSQL and
Redis are outside), folders are below /tmp, no autoscaler runs (there is no API server), and there
are two routers.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import conftest, network
from tests.cluster.manifests import CHART, Manifests
from tests.cluster.pods import LISTENING, Pod, Runs, address, bridge
from tests.stack import ROOT, ray_flags

KEY = "flows-bootstrap-key-0123456789"
TOKEN = secrets.token_hex(32)
BIN = Path(sys.executable).parent
READY_S = 240.0
# Long enough for every period of Ray's and ours: metrics, health, snapshots, grants.
WATCH_S = 45.0
OBJECT_STORE_BYTES = 100_000_000
# Pods by their role, and the last part of their addresses.
NUMBERS = {"head": 2, "cpu-0": 3, "cpu-1": 4, "engine-0": 5, "engine-1": 6}
NUMBERS |= {"operator": 100, "prometheus": 101, "client": 102, "stranger": 103}
OVERRIDES = {
    "control": {"args": {"database": "sqlite:////tmp/ledger.db"}},
    "gateway": {"args": {"replicas": {"num_replicas": 2}}},
    "pool-sim": {"args": {"replicas": {"num_replicas": 2, "num_cpus": 1}}},
}
Flows = dict[tuple[str, str], set[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    target = parser.parse_args().file
    header = "# Written by tests/cluster/record_flows.py; do not edit.\n"
    document = yaml.safe_dump(record(), sort_keys=False, default_flow_style=None)
    target.write_text(header + document)


def record() -> dict[str, Any]:
    """Return the flows between roles and the ports that each role listens on."""
    manifests = render()
    with bridge(), running(manifests) as pods:
        flows, listening = watch(pods, lambda: use(pods))
    return {
        "flows": [
            {"from": source, "to": to, "ports": sorted(ports)}
            for (source, to), ports in sorted(flows.items())
        ],
        "listening": {role: sorted(ports) for role, ports in sorted(listening.items())},
    }


def render() -> Manifests:
    """Return the kind profile as helm renders it, with what is changed for the recording."""
    command = [str(conftest.found("find_helm.py")), "template", "headrace", str(CHART)]
    command += ["--namespace", "serving", "--values", str(CHART / "values-kind.yaml")]
    command += ["--set-json", f"serve.overrides={json.dumps(OVERRIDES)}"]
    return conftest.parsed(
        "kind", subprocess.run(command, capture_output=True, text=True, check=False)
    )


@contextmanager
def running(manifests: Manifests, *, enforced: bool = False) -> Iterator[dict[str, Pod]]:
    """Start the cluster and those who use it, yield the pods once requests are answered.

    ``enforced``: under the network policies of the manifests, from the first packet on.
    """
    groups = {each["groupName"]: each for each in manifests.cluster["workerGroupSpecs"]}
    started_as = {
        "head": manifests.cluster["headGroupSpec"],
        "cpu": groups["cpu"],
        "engine": groups["sim-on-demand"],
    }
    with ExitStack() as stack:
        pods: dict[str, Pod] = {}
        for name, number in NUMBERS.items():
            allowed = openings(manifests, name) if enforced else None
            group = started_as.get(role(name))
            if group is None:
                pods[name] = Pod(name, number, ["sleep", "infinity"], allowed=allowed)
            else:
                pods[name] = ray_pod(name, group, allowed)
            stack.callback(pods[name].end)
        deploy(pods, manifests)
        yield pods


def openings(manifests: Manifests, name: str) -> dict[str, Runs]:
    """Return the ports, by address, that the policies let a pod reach."""
    policies, by_name = manifests.of("NetworkPolicy"), network.ends(manifests)
    return {
        address(number): network.opened(policies, by_name[role(name)], by_name[role(other)])
        for other, number in NUMBERS.items()
        if other != name
    }


def ray_pod(name: str, group: Mapping[str, Any], allowed: Mapping[str, Runs] | None) -> Pod:
    """Start a pod of a group as KubeRay does: `ray start` from resources and parameters."""
    [container] = group["template"]["spec"]["containers"]
    resources = {key: float(value) for key, value in group["resources"].items()}
    command = [str(BIN / "ray"), "start", "--block"]
    command += [f"--num-cpus={int(resources.pop('CPU'))}", f"--resources={json.dumps(resources)}"]
    command += [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    head = ["--head", "--port=6379"]
    command += head if name == "head" else [f"--address={address(NUMBERS['head'])}:6379"]
    with open(Path(os.environ["TMPDIR"]) / f"{name}.log", "w") as log:
        given = {"env": environment(container), "stdout": log, "stderr": log}
        return Pod(name, NUMBERS[name], command, allowed=allowed, **given)


def environment(container: Mapping[str, Any]) -> dict[str, str]:
    """Return a container's environment, its folders below /tmp."""
    kept = {name: os.environ[name] for name in ("PATH",)}
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    below = {name: f"/tmp{value}" for name, value in given.items() if value.startswith("/var/")}
    return {
        **kept,
        **given,
        **below,
        "RAY_SERVE_HAPROXY_BINARY_PATH": ray_flags()["RAY_SERVE_HAPROXY_BINARY_PATH"],
        "HOME": "/tmp",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "HEADRACE_BOOTSTRAP_KEY": KEY,
    }


def deploy(pods: Mapping[str, Pod], manifests: Manifests) -> None:
    """Hand Serve its configuration as the operator does, and wait until a client is answered."""
    body = json.dumps(manifests.serve_config)
    url = f"http://{pods['head'].address}:8265/api/serve/applications/"
    deadline_s = time.monotonic() + READY_S
    while not asked(pods["operator"], url, TOKEN, "--request", "PUT", "--data", body):
        wait(pods, deadline_s)
    while not all(chat(pods["client"], pods[each]) for each in ("cpu-0", "engine-0")):
        wait(pods, deadline_s)


def wait(pods: Mapping[str, Pod], deadline_s: float) -> None:
    gone = [name for name, pod in pods.items() if pod.ended()]
    if gone or time.monotonic() > deadline_s:
        raise SystemExit(f"not ready; ended: {gone}; see {os.environ['TMPDIR']}/*.log")
    time.sleep(1)


def use(pods: Mapping[str, Pod]) -> None:
    """Do what operator, Prometheus and clients do."""
    head, workers = pods["head"], [each for name, each in pods.items() if "-" in name]
    asked(pods["operator"], f"http://{head.address}:8265/api/serve/applications/", TOKEN)
    for pod in (head, *workers):
        asked(pods["prometheus"], f"http://{pod.address}:8080/metrics", "")
    asked(pods["prometheus"], f"http://{workers[0].address}:8000/metrics", KEY)
    for pod in workers:
        chat(pods["client"], pod)


def chat(client: Pod, target: Pod) -> bool:
    message = {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    options = ("--header", "Content-Type: application/json", "--data", json.dumps(message))
    return asked(client, f"http://{target.address}:8000/v1/chat/completions", KEY, *options)


def asked(pod: Pod, url: str, key: str, *options: str) -> bool:
    """Whether a pod gets an answer from another."""
    curl = ["curl", "--silent", "--fail", "--connect-timeout", "3", "--max-time", "10"]
    curl += ["--output", "/dev/null"]
    header = ("--header", f"Authorization: Bearer {key}")
    return pod.run(*curl, *header, *options, url).returncode == 0


def watch(pods: Mapping[str, Pod], act: Any) -> tuple[Flows, dict[str, set[int]]]:
    """Return what goes on between roles meanwhile, and the ports that each role listens on."""
    names = {pod.address: name for name, pod in pods.items()}
    flows: Flows = defaultdict(set)
    listening: dict[str, set[int]] = defaultdict(set)
    until_s = time.monotonic() + WATCH_S
    while time.monotonic() < until_s:
        act()
        sockets = {name: list(pod.sockets()) for name, pod in pods.items()}
        opened = {
            name: {each.local_port for each in found if each.state == LISTENING}
            for name, found in sockets.items()
        }
        for name, found in sockets.items():
            listening[role(name)] |= {
                each.local_port
                for each in found
                if each.state == LISTENING and not each.local.startswith("127.")
            }
            for each in found:
                other = names.get(each.remote)
                if other is None or other == name or each.state == LISTENING:
                    continue
                if each.remote_port in opened[other]:
                    flows[role(name), role(other)].add(each.remote_port)
                elif each.local_port in opened[name]:
                    flows[role(other), role(name)].add(each.local_port)
    return flows, {name: ports for name, ports in listening.items() if ports}


def role(name: str) -> str:
    return name.partition("-")[0]


if __name__ == "__main__":
    main()
