"""The API server: HTTPS on loopback, client certificates, and no mercy.

It answers what Ray's KubeRay provider and an operator ask for and nothing else: any other path,
method, parameter or content is refused and remembered in ``violations``, by which a test fails.
"""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from tests.kubernetes.certificates import Certificates
from tests.kubernetes.machines import Machines
from tests.kubernetes.objects import Document, Objects, Refused
from tests.kubernetes.rbac import Rbac

JSON_PATCH: Final = "application/json-patch+json"
MERGE_PATCH: Final = "application/merge-patch+json"
LIST_PARAMETERS: Final = {
    "fieldSelector",
    "labelSelector",
    "resourceVersion",
    "resourceVersionMatch",
}
NODES_PATH: Final = "/api/v1/nodes"
NODE_FIELD: Final = "spec.nodeName="
WATCH_PARAMETERS: Final = {"labelSelector", "resourceVersion", "watch", "timeoutSeconds"}
WATCH_S: Final = 60.0
BODY_BYTES_MAX: Final = 1_000_000
# What an API server answers a client that did nothing wrong.
INNOCENT: Final = frozenset({404, 409})


@dataclass(frozen=True, slots=True)
class Answer:
    """One request and how it was answered."""

    method: str
    path: str
    status: int
    body: Any = None


@dataclass(slots=True)
class _Injected:
    method: str
    resource: str
    status: int
    left: int


class Api:
    """What is asked of the server, and how it is answered. Thread-safe."""

    def __init__(
        self, objects: Objects, machines: Machines | None = None, rbac: Rbac | None = None
    ) -> None:
        """Without ``rbac`` only clients with a certificate are let in, and may do everything."""
        self.objects = objects
        self.machines = machines or Machines()
        self.rbac = rbac
        self.answers: list[Answer] = []
        self.violations: list[str] = []
        self._injected: list[_Injected] = []
        self._lock = threading.Lock()
        base = f"namespaces/{objects.namespace}"
        self.ray_cluster_path = f"/apis/ray.io/v1/{base}/rayclusters/{objects.name}"
        self.pods_path = f"/api/v1/{base}/pods"

    def fail_next(self, method: str, resource: str, status: int, times: int = 1) -> None:
        """Answer the next requests for ``rayclusters`` or ``pods`` with an error instead."""
        with self._lock:
            self._injected.append(_Injected(method, resource, status, times))

    def injected_left(self) -> int:
        """Return how many injected errors nobody has run into yet."""
        with self._lock:
            return sum(each.left for each in self._injected)

    def patches(self) -> list[Any]:
        """Return the JSON patches that were applied, oldest first."""
        with self._lock:
            return [
                each.body for each in self.answers if each.method == "PATCH" and each.status == 200
            ]

    def authorize(self, method: str, target: str, authorization: str) -> None:
        """Let a client without a certificate do what its service account may.

        Raises:
            Refused: 401 if nobody knows its token, 403 if its roles do not say so.
        """
        if self.rbac is None:
            raise Refused(401, "Unauthorized", "no certificate")
        url = urlsplit(target)
        self.rbac.check(method, url.path, self.pods_path, authorization)

    def answer(self, method: str, target: str, content_type: str, body: bytes) -> Document:
        """Return the answer to a request that is not a watch.

        Raises:
            Refused: it is answered with an error.
        """
        url = urlsplit(target)
        parameters = self._parameters(method, url.query)
        self._run_into_injected(method, url.path)
        if url.path == NODES_PATH or url.path.startswith(f"{NODES_PATH}/"):
            return self._node_answer(method, url.path, parameters, content_type, body)
        if url.path == self.ray_cluster_path:
            if method == "GET" and not parameters:
                return self.objects.ray_cluster()
            if method == "PATCH" and not parameters:
                return self.objects.patch_ray_cluster(self._patch(content_type, body))
        elif url.path == self.pods_path:
            if method == "GET" and parameters.keys() <= LIST_PARAMETERS:
                return self._pod_list(parameters)
        elif url.path.startswith(f"{self.pods_path}/") and not parameters:
            name, _, part = url.path.removeprefix(f"{self.pods_path}/").partition("/")
            if part == "eviction" and method == "POST":
                return self._evict(name, body)
            if part:
                raise Refused(400, "BadRequest", f"no such path: {url.path}")
            if method == "GET":
                return self.objects.pod(name)
            if method == "DELETE":
                return self.objects.delete_pod(name, _grace_s(body))
        else:
            raise Refused(400, "BadRequest", f"no such path: {url.path}")
        raise Refused(405, "MethodNotAllowed", f"{method} {target}")

    def _node_answer(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, str],
        content_type: str,
        body: bytes,
    ) -> Document:
        name = path.removeprefix(NODES_PATH).removeprefix("/")
        if method == "GET" and not name and parameters.keys() <= {"labelSelector"}:
            return self.machines.listed(parameters.get("labelSelector", ""))
        if method == "GET" and name and not parameters:
            return self.machines.get(name)
        if method == "PATCH" and name and not parameters:
            if content_type != MERGE_PATCH:
                raise Refused(415, "UnsupportedMediaType", f"{content_type!r} is no merge patch")
            return self.machines.patch(name, _json(body))
        raise Refused(405, "MethodNotAllowed", f"{method} {path} {sorted(parameters)}")

    def _evict(self, name: str, body: bytes) -> Document:
        wanted = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": self.objects.namespace},
        }
        if _json(body) != wanted:
            raise Refused(400, "BadRequest", f"not the eviction of {name}: {_json(body)}")
        self.objects.delete_pod(name)
        return {"kind": "Status", "apiVersion": "v1", "status": "Success", "code": 201}

    def watched(self, target: str) -> tuple[int, Mapping[str, str], float] | None:
        """Return from which version, which labels and how long to watch; None for no watch."""
        url = urlsplit(target)
        parameters = self._parameters("GET", url.query)
        if url.path != self.pods_path or parameters.get("watch") not in ("1", "true"):
            return None
        if not parameters.keys() <= WATCH_PARAMETERS:
            raise Refused(400, "BadRequest", f"parameters of a watch: {sorted(parameters)}")
        return (
            _whole(parameters.get("resourceVersion", "0"), "resourceVersion"),
            _labels(parameters.get("labelSelector", "")),
            min(WATCH_S, float(_whole(parameters.get("timeoutSeconds", "60"), "timeoutSeconds"))),
        )

    def note(self, answer: Answer, why: Refused | None = None) -> None:
        """Remember a request; one that no client should make is a violation."""
        with self._lock:
            self.answers.append(answer)
            if why is not None and why.status not in INNOCENT and why.reason != "Injected":
                self.violations.append(f"{answer.method} {answer.path}: {why}")

    def _run_into_injected(self, method: str, path: str) -> None:
        with self._lock:
            for each in self._injected:
                if each.left and each.method == method and f"/{each.resource}" in path:
                    each.left -= 1
                    raise Refused(each.status, "Injected", "asked for by the test")

    def _parameters(self, method: str, query: str) -> dict[str, str]:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        if len(dict(pairs)) != len(pairs):
            raise Refused(400, "BadRequest", f"{method}: a parameter twice: {query}")
        return dict(pairs)

    def _patch(self, content_type: str, body: bytes) -> Any:
        if content_type != JSON_PATCH:
            raise Refused(415, "UnsupportedMediaType", f"{content_type!r} is not {JSON_PATCH}")
        try:
            operations = json.loads(body)
        except ValueError as error:
            raise Refused(400, "BadRequest", f"the patch is no JSON: {error}") from error
        self._check_deletions(operations)
        return operations

    def _check_deletions(self, operations: Any) -> None:
        """Refuse to delete a worker that never was, or is of another group than it says."""
        cluster = self.objects.ray_cluster()
        groups = [group["groupName"] for group in cluster["spec"]["workerGroupSpecs"]]
        for operation in operations if isinstance(operations, list) else []:
            steps = str(operation.get("path", "")).split("/")
            if steps[-1] != "scaleStrategy" or not steps[-2].isdigit():
                continue
            group = groups[int(steps[-2])] if int(steps[-2]) < len(groups) else None
            for name in operation.get("value", {}).get("workersToDelete", []):
                if group is None or self.objects.group_of(name) != group:
                    raise Refused(422, "Invalid", f"{name} is no worker of group {group}")

    def _pod_list(self, parameters: Mapping[str, str]) -> Document:
        version = parameters.get("resourceVersion")
        if "resourceVersionMatch" in parameters and version is None:
            raise Refused(400, "BadRequest", "resourceVersionMatch without resourceVersion")
        if version is not None and _whole(version, "resourceVersion") > int(self.objects.version):
            raise Refused(504, "Timeout", "Too large resource version")
        selector = parameters.get("labelSelector", "")
        # A name alone asks for the label, whatever its value.
        exists = selector if selector and "=" not in selector else None
        pods = self.objects.select(_labels("" if exists else selector))
        if exists:
            pods = [pod for pod in pods if exists in pod["metadata"].get("labels", {})]
        field = parameters.get("fieldSelector", "")
        if field and not field.startswith(NODE_FIELD):
            raise Refused(400, "BadRequest", f"field label not supported: {field}")
        if field:
            node = field.removeprefix(NODE_FIELD)
            pods = [pod for pod in pods if pod["spec"].get("nodeName") == node]
        return {
            "kind": "PodList",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": self.objects.version},
            "items": pods,
        }


@contextmanager
def serving(api: Api, certificates: Certificates) -> Iterator[int]:
    """Serve on a free port of 127.0.0.1 and yield it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api))
    server.daemon_threads = True
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates.authority)
    context.load_cert_chain(certificates.server, certificates.server_key)
    context.verify_mode = ssl.CERT_REQUIRED if api.rbac is None else ssl.CERT_OPTIONAL
    # The handshake is left to each connection's thread: a client that stalls stalls itself.
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    thread = threading.Thread(target=server.serve_forever, name="kubernetes-api", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(api: Api) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                self.close_connection = True  # the client has gone, or has no certificate

        def log_message(self, *_: Any) -> None:
            """Say nothing: the requests are in ``answers``."""

        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(min(length, BODY_BYTES_MAX))
            try:
                if not self.connection.getpeercert():  # type: ignore[attr-defined]  # TLS
                    api.authorize(self.command, self.path, self.headers.get("authorization", ""))
                watch = api.watched(self.path) if self.command == "GET" else None
                if watch is not None:
                    self._watch(*watch)
                    return
                content_type = self.headers.get("content-type", "")
                document = api.answer(self.command, self.path, content_type, body)
            except Refused as refused:
                api.note(Answer(self.command, self.path, refused.status, _json(body)), refused)
                self._send(refused.status, _status(refused))
                return
            api.note(Answer(self.command, self.path, 200, _json(body)))
            self._send(200, document)

        def _send(self, status: int, document: Document) -> None:
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _watch(self, after: int, labels: Mapping[str, str], seconds: float) -> None:
            api.note(Answer("GET", self.path, 200))
            self.close_connection = True
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("connection", "close")
            self.end_headers()
            for event in _events(api.objects, after, labels, seconds):
                self.wfile.write(json.dumps(event).encode() + b"\n")
                self.wfile.flush()

        do_GET = do_PATCH = do_DELETE = do_PUT = do_POST = do_HEAD = do_OPTIONS = _answer

    return Handler


def _events(
    objects: Objects, after: int, labels: Mapping[str, str], seconds: float
) -> Iterator[Document]:
    """Yield a watch's events until nothing has happened for so long."""
    while True:
        with objects.changed:
            new = objects.events(after, labels)
            if not new:
                if not objects.changed.wait(seconds):
                    return
                continue
        for event in new:
            yield {"type": event.kind, "object": event.pod}
        after = new[-1].version


def _labels(selector: str) -> dict[str, str]:
    """Return an equality selector (``a=b,c=d``) as a mapping."""
    if not selector:
        return {}
    pairs = [part.partition("=") for part in selector.split(",")]
    if any(not equals or not name or value.startswith("=") for name, equals, value in pairs):
        raise Refused(400, "BadRequest", f"label selector {selector!r} is not NAME=VALUE,...")
    return {name: value for name, _, value in pairs}


def _whole(text: str, name: str) -> int:
    if not text.isdigit():
        raise Refused(400, "BadRequest", f"{name} must be a whole number, got {text!r}")
    return int(text)


def _grace_s(body: bytes) -> float | None:
    """Return what a deletion's options say of its grace period, None for the pod's own."""
    options = _json(body) or {}
    if not isinstance(options, dict) or not options.keys() <= {
        "apiVersion",
        "kind",
        "gracePeriodSeconds",
    }:
        raise Refused(400, "BadRequest", f"options of a deletion: {options!r}")
    grace_s = options.get("gracePeriodSeconds")
    return None if grace_s is None else float(grace_s)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if body else None
    except ValueError:
        return None


def _status(refused: Refused) -> Document:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "code": refused.status,
        "reason": refused.reason,
        "message": refused.message,
    }
