"""Ray's own GCS against a Redis by TLS whose authority nobody knows, as Google's Memorystore is."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.conftest import Render, parsed
from tests.kubernetes import certificates
from tests.kubernetes.certificates import Certificates
from tests.redis import Redis, running_redis

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("redis_tls")]
ANSWER_TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates.write(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with running_redis() as found:
        yield found


def variable(render: Render) -> str:
    """Return the variable by which the chart tells the head of a certificate."""
    done = render("gke", "--set", "redis.certificate.existingSecret=authority")
    head = next(iter(parsed("gke", done).pods())).spec["containers"][0]
    [mount] = [m["mountPath"] for m in head["volumeMounts"] if m["name"] == "certificate"]
    [name] = [e["name"] for e in head["env"] if str(e.get("value")).startswith(f"{mount}/")]
    return str(name)


@contextmanager
def gcs(redis: Redis, port: int, folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a GCS that keeps its state behind ``port``."""
    from ray._private import services

    host, number, by_tls = services.get_address(f"rediss://127.0.0.1:{port}")
    assert by_tls
    command = ["setpriv", "--pdeathsig", "KILL", "--", services.GCS_SERVER_EXECUTABLE]
    command += [f"--redis_address={host}", f"--redis_port={number}", "--redis_enable_ssl=true"]
    command += [f"--redis_password={redis.password}", "--gcs_server_port=0"]
    command += ["--config_list=e30=", "--node_ip_address=127.0.0.1", "--session_name=tls"]
    command += [f"--session_dir={folder}", f"--log_dir={folder}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **environment}
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def first_words(files: Certificates, listener: socket.socket, redis: Redis) -> bytes:
    """Take a connection by TLS and hand its first words to Redis; return what that answers.

    Raises:
        ssl.SSLError: The client does not trust the server.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server, files.server_key)
    listener.settimeout(ANSWER_TIMEOUT_S)
    plain, _ = listener.accept()
    plain.settimeout(ANSWER_TIMEOUT_S)
    host, _, port = redis.address.partition(":")
    with (
        context.wrap_socket(plain, server_side=True) as client,
        socket.create_connection((host, int(port)), ANSWER_TIMEOUT_S) as server,
    ):
        server.sendall(client.recv(65_536))
        return server.recv(65_536)


@pytest.mark.parametrize("trusts", [True, False])
def test_the_head_trusts_the_authority_that_the_chart_mounts_and_no_other(
    trusts: bool, render: Render, files: Certificates, redis: Redis, tmp_path: Path
) -> None:
    environment = {variable(render): str(files.authority)} if trusts else {}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with gcs(redis, port, tmp_path, environment):
            if trusts:
                assert first_words(files, listener, redis).startswith(b"+OK"), "its password"
            else:
                with pytest.raises((ssl.SSLError, ConnectionResetError)):
                    first_words(files, listener, redis)
