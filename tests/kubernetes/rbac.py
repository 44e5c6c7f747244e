"""Role-based access control, as the fake API server enforces it on service accounts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from tests.kubernetes.objects import Refused

_VERBS: Final = {"GET": "get", "PATCH": "patch", "POST": "create", "DELETE": "delete"}


class Rbac:
    """The rules of roles bound to one service account, known by its token."""

    def __init__(self, token: str, manifests: Iterable[dict[str, Any]]) -> None:
        """``manifests`` are roles, cluster roles and their bindings."""
        self.token = token
        documents = list(manifests)
        bound = {
            (each["roleRef"]["kind"], each["roleRef"]["name"])
            for each in documents
            if each["kind"].endswith("Binding") and each["subjects"]
        }
        self._granted = {
            (each["kind"], resource, verb)
            for each in documents
            if (each["kind"], each["metadata"]["name"]) in bound
            for rule in each.get("rules", [])
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    def check(self, method: str, path: str, pods_path: str, authorization: str) -> None:
        """Raise ``Refused`` unless the token may do this."""
        if authorization != f"Bearer {self.token}":
            raise Refused(401, "Unauthorized", "nobody has this token")
        resource, named, wide = _resource(path, pods_path)
        verb = _VERBS.get(method, method.lower())
        verb = "list" if verb == "get" and not named else verb
        kinds = {"ClusterRole"} if wide else {"ClusterRole", "Role"}
        if not any((kind, resource, verb) in self._granted for kind in kinds):
            raise Refused(403, "Forbidden", f'cannot {verb} resource "{resource}"')


def _resource(path: str, pods_path: str) -> tuple[str, bool, bool]:
    """Return the resource, whether one is named, and whether it is cluster-wide."""
    if path.startswith("/api/v1/nodes"):
        return "nodes", path != "/api/v1/nodes", True
    name, _, part = path.removeprefix(pods_path).removeprefix("/").partition("/")
    return f"pods/{part}" if part else "pods", bool(name), False
