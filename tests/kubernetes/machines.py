"""The nodes of the fake cluster, as far as taking one out of service shows them."""

from __future__ import annotations

import copy
import threading
from typing import Any, Final

from tests.kubernetes.objects import Document, Refused

# What a watcher may change of a node; anything else is a mistake of its.
_PATCHABLE: Final = {"metadata": {"labels", "annotations"}, "spec": {"unschedulable"}}


class Machines:
    """Thread-safe. A real API server drops what it does not know; this one refuses it."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[str, Document] = {
            name: {
                "kind": "Node",
                "apiVersion": "v1",
                "metadata": {"name": name, "labels": {}, "annotations": {}},
                "spec": {},
            }
            for name in names
        }

    def get(self, name: str) -> Document:
        """Return a copy of a node.

        Raises:
            Refused: 404, there is none.
        """
        with self._lock:
            return copy.deepcopy(self._node(name))

    def listed(self, selector: str) -> Document:
        """Return a NodeList of those that carry the label ``selector``, whatever its value."""
        if "=" in selector or "," in selector:
            raise Refused(400, "BadRequest", f"label selector {selector!r} is not a name")
        with self._lock:
            nodes = [
                copy.deepcopy(node)
                for node in self._nodes.values()
                if not selector or selector in node["metadata"]["labels"]
            ]
        return {"kind": "NodeList", "apiVersion": "v1", "items": nodes}

    def patch(self, name: str, patch: Any) -> Document:
        """Merge a patch into a node (RFC 7386).

        Raises:
            Refused: 404, there is none; 422, it is not about what may be changed.
        """
        with self._lock:
            node = self._node(name)
            if not isinstance(patch, dict) or not patch.keys() <= _PATCHABLE.keys():
                raise Refused(422, "Invalid", f"patch of a node: {patch!r:.200}")
            for part, changes in patch.items():
                if not isinstance(changes, dict) or not changes.keys() <= _PATCHABLE[part]:
                    raise Refused(422, "Invalid", f"patch of a node's {part}: {changes!r:.200}")
            for key in ("labels", "annotations"):
                values = patch.get("metadata", {}).get(key, {})
                if not all(value is None or isinstance(value, str) for value in values.values()):
                    raise Refused(422, "Invalid", f"{key} must be strings: {values!r:.200}")
            _merge(node, patch)
            return copy.deepcopy(node)

    def _node(self, name: str) -> Document:
        if name not in self._nodes:
            raise Refused(404, "NotFound", f'nodes "{name}" not found')
        return self._nodes[name]


def _merge(target: Document, patch: Document) -> None:
    for name, value in patch.items():
        if value is None:
            target.pop(name, None)
        elif isinstance(value, dict):
            _merge(target.setdefault(name, {}), value)
        else:
            target[name] = value
