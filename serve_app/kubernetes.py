"""The few calls of the Kubernetes API that taking a node out of service needs."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MERGE_PATCH: Final = "application/merge-patch+json"
TIMEOUT_S: Final = 10.0
FAULT_LABEL: Final = "headrace.io/gpu-fault"
WHY_ANNOTATION: Final = "headrace.io/gpu-fault-reason"
RESETS_ANNOTATION: Final = "headrace.io/gpu-resets"
# Of a node that is about to be taken out, so that watchers see each other before they do.
CLAIM: Final = "claim"
RAY_NODE_TYPE: Final = "ray.io/node-type"
RAY_PODS: Final = "ray.io/cluster"
# Everything that is asked of the API: resource, verbs, and whether it is cluster-wide.
PERMISSIONS: Final = (
    ("nodes", ("get", "list", "patch"), True),
    ("pods", ("list",), False),
    ("pods/eviction", ("create",), False),
)


class KubernetesFailed(Exception):
    """The API did not do what it was asked; the message says what, and what is missing."""


class EvictionBlocked(KubernetesFailed):
    """A disruption budget does not allow the eviction yet: try again."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of a Ray cluster; ``head`` has its GCS."""

    name: str
    address: str
    head: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node's schedulability; ``fault`` says what it was taken out for its GPUs for, or None.

    The watcher takes it away when the node is returned. It is CLAIM before the node is taken out.
    """

    name: str
    unschedulable: bool
    fault: str | None
    resets: int


class Kubernetes:
    """One namespace's pods and the cluster's nodes, as a service account."""

    def __init__(self, client: httpx.AsyncClient, namespace: str, token_file: Path) -> None:
        """The token is read for every call: Kubernetes replaces it within the hour."""
        self._client = client
        self._namespace = namespace
        self._token_file = token_file

    async def node(self, name: str) -> Node:
        """Return a node."""
        return _node(await self._call("get", "nodes", f"/api/v1/nodes/{name}"))

    async def nodes_held(self) -> list[Node]:
        """Return the nodes that are out of service for their GPUs or claimed to be so."""
        listed = await self._call("list", "nodes", "/api/v1/nodes", labelSelector=FAULT_LABEL)
        nodes = [_node(each) for each in listed["items"]]
        return [each for each in nodes if each.unschedulable or each.fault == CLAIM]

    async def claim(self, name: str, fault: str | None = CLAIM) -> None:
        """Say that a node is about to be taken out; with None, that it is not."""
        patch = {"metadata": {"labels": {FAULT_LABEL: fault}}}
        await self._call("patch", "nodes", f"/api/v1/nodes/{name}", json=patch)

    async def cordon(self, name: str, fault: str, why: str, resets: int) -> None:
        """Have nothing more scheduled on a node, and write down why."""
        metadata = {
            "labels": {FAULT_LABEL: fault},
            "annotations": {WHY_ANNOTATION: why, RESETS_ANNOTATION: str(resets)},
        }
        patch = {"metadata": metadata, "spec": {"unschedulable": True}}
        await self._call("patch", "nodes", f"/api/v1/nodes/{name}", json=patch)

    async def ray_pods(self, node: str) -> list[Pod]:
        """Return the pods of Ray clusters on a node."""
        path = f"/api/v1/namespaces/{self._namespace}/pods"
        where = {"fieldSelector": f"spec.nodeName={node}", "labelSelector": RAY_PODS}
        listed = await self._call("list", "pods", path, **where)
        return [
            Pod(
                each["metadata"]["name"],
                str((each.get("status") or {}).get("podIP") or ""),
                each["metadata"]["labels"].get(RAY_NODE_TYPE) == "head",
            )
            for each in listed["items"]
            if "deletionTimestamp" not in each["metadata"]
        ]

    async def evict(self, pod: str) -> None:
        """Ask for a pod's end; one that is gone is fine.

        Raises:
            EvictionBlocked: a disruption budget forbids it for now.
        """
        path = f"/api/v1/namespaces/{self._namespace}/pods/{pod}/eviction"
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self._namespace},
        }
        await self._call("create", "pods/eviction", path, json=body)

    async def _call(
        self, verb: str, resource: str, path: str, json: Any = None, **parameters: str
    ) -> Mapping[str, Any]:
        method = {"patch": "PATCH", "create": "POST"}.get(verb, "GET")
        headers = {"content-type": MERGE_PATCH} if verb == "patch" else {}
        try:
            headers["authorization"] = f"Bearer {self._token_file.read_text().strip()}"
            answer = await self._client.request(
                method, path, params=parameters, json=json, headers=headers, timeout=TIMEOUT_S
            )
            body = answer.json()
        except (OSError, httpx.HTTPError, ValueError) as error:
            raise KubernetesFailed(
                f"could not {verb} {resource}: {error or type(error).__name__}"
            ) from error
        if answer.status_code == 403:
            kind = "ClusterRole" if resource == "nodes" else "Role"
            raise KubernetesFailed(
                f"the service account lacks permission: {verb} on {resource} ({kind}); "
                "`headrace gpu-health --print-rbac` prints what it needs"
            )
        if answer.status_code == 404 and verb == "create":
            return {}
        if answer.status_code == 429 and verb == "create":
            raise EvictionBlocked(f"eviction blocked: {_message(body)}")
        if answer.is_error:
            raise KubernetesFailed(
                f"could not {verb} {resource}: {answer.status_code} {_message(body)}"
            )
        assert isinstance(body, dict)
        return body


def in_cluster(environment: Mapping[str, str], account: Path = SERVICE_ACCOUNT) -> Kubernetes:
    """Return the API of the cluster that this pod runs in.

    Raises:
        KubernetesFailed: this is no pod, or it has no service account.
    """
    host, port = (environment.get(f"KUBERNETES_SERVICE_{name}") for name in ("HOST", "PORT"))
    if not host or not port:
        raise KubernetesFailed("KUBERNETES_SERVICE_HOST is not set: this is no pod")
    try:
        context = ssl.create_default_context(cafile=account / "ca.crt")
        namespace = (account / "namespace").read_text().strip()
    except OSError as error:
        raise KubernetesFailed(
            f"no service account in {account}: {error}; set automountServiceAccountToken"
        ) from error
    where = f"[{host}]" if ":" in host else host
    # No proxy of the environment stands between a pod and its API server.
    client = httpx.AsyncClient(base_url=f"https://{where}:{port}", verify=context, trust_env=False)
    return Kubernetes(client, namespace, account / "token")


def rbac(name: str, namespace: str) -> list[dict[str, Any]]:
    """Return the roles and bindings that a service account of this name needs."""
    account = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
    found: list[dict[str, Any]] = []
    for kind, wide in (("ClusterRole", True), ("Role", False)):
        metadata = {"name": name} if wide else {"name": name, "namespace": namespace}
        rules = [
            {"apiGroups": [""], "resources": [resource], "verbs": list(verbs)}
            for resource, verbs, cluster_wide in PERMISSIONS
            if cluster_wide is wide
        ]
        group = "rbac.authorization.k8s.io"
        head = {"apiVersion": f"{group}/v1", "metadata": metadata}
        role = {"apiGroup": group, "kind": kind, "name": name}
        found.append({"kind": kind, **head, "rules": rules})
        found.append({"kind": f"{kind}Binding", **head, "roleRef": role, "subjects": [account]})
    return found


def _node(document: Mapping[str, Any]) -> Node:
    metadata = document["metadata"]
    resets = str((metadata.get("annotations") or {}).get(RESETS_ANNOTATION, "0"))
    return Node(
        name=metadata["name"],
        unschedulable=bool((document.get("spec") or {}).get("unschedulable")),
        fault=(metadata.get("labels") or {}).get(FAULT_LABEL),
        resets=int(resets) if resets.isascii() and resets.isdigit() else 0,
    )


def _message(body: object) -> str:
    message = body.get("message") if isinstance(body, dict) else None
    return str(message)[:200]
