"""The environment around Ray: HAProxy's program, and what is said when it is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve_app import cli, haproxy, ray_env
from tests.stack import ROOT, free_port

FAST = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def test_the_program_becomes_haproxy() -> None:
    program = haproxy.program()
    assert program is not None, "`make setup` installs it"
    # Ray names the program in its environment; it must not start itself for ever.
    environment = {**os.environ, haproxy.BINARY_PATH: str(program)}

    done = subprocess.run(
        [str(program), "-v"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )

    assert done.stdout.startswith("HAProxy version")


def test_the_environment_is_the_file_and_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ray.env"
    file.write_text("# why\nRAY_A=1\n\nRAY_B=two words\n")
    monkeypatch.setenv("RAY_A", "set already")
    monkeypatch.delenv(haproxy.BINARY_PATH, raising=False)

    assert cli.main(["env", str(file)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "export RAY_B='two words'",
        f"export {haproxy.BINARY_PATH}={haproxy.program()}",
    ]


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "nowhere/ray.env"]) == 1
    assert "there is no file nowhere/ray.env" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, "fast path is off"),
        ({"RAY_SERVE_ENABLE_HA_PROXY": "1"}, "fast path is off"),
        (FAST, "HAProxy splices"),
        ({**FAST, haproxy.BINARY_PATH: "/usr/sbin/haproxy"}, "HAProxy splices"),
        ({**FAST, haproxy.BINARY_PATH: "/venv/bin/headrace-haproxy"}, None),
    ],
)
def test_a_poorer_environment_is_complained_of(
    environment: dict[str, str], told: str | None
) -> None:
    found = ray_env.shortcomings(environment)
    assert len(found) == (0 if told is None else 1)
    assert told is None or told in found[0]


# HAProxy on the configuration that Ray writes for it


CONNECTIONS = 6
HEALTH = b"GET /-/healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
SLOW = b"GET /-/healthz HTTP/1.1\r\nhost: x\r\nx-slow: "


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[psutil.Process]:
    """HAProxy as Ray starts it, for few connections and with 0.3 s for headers."""
    from ray.serve._private.haproxy import HAProxyApi, HAProxyConfig
    from ray.serve.config import HTTPOptions

    folder = tmp_path_factory.mktemp("h")
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=free_port()),
        maxconn=CONNECTIONS,
        socket_path=str(folder / "admin.sock"),
        metrics_socket_path=str(folder / "metrics.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        stats_port=free_port(),
        metrics_port=free_port(),
        is_head=True,
    )
    api = HAProxyApi(config, config_file_path=str(folder / "haproxy.cfg"))
    api._generate_config_file_internal()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), haproxy.HEADERS_S: "0.3"}
    command = [str(haproxy.program()), "-db", "-f", api.config_file_path]
    with subprocess.Popen(command, env=environment) as process:
        try:
            found = psutil.Process(process.pid)
            deadline_s = time.monotonic() + 120
            while len(listening(found)) < 3:
                assert process.poll() is None
                assert time.monotonic() < deadline_s, "it listens"
            yield found
        finally:
            process.kill()


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    connections = process.net_connections("tcp")
    return [each.laddr for each in connections if each.status == psutil.CONN_LISTEN]


def connected(door: psutil.Process) -> socket.socket:
    config = Path(door.cmdline()[-1]).read_text()
    port = int(config.partition("frontend http_frontend\n    bind 127.0.0.1:")[2].split()[0])
    return socket.create_connection(("127.0.0.1", port), timeout=120)


@pytest.mark.ray
def test_a_client_that_never_ends_its_headers_is_sent_away(door: psutil.Process) -> None:
    """Each of its bytes would have moved the bound on: it is on all of them."""
    with connected(door) as slow:
        slow.sendall(SLOW)
        slow.settimeout(0.05)
        answer = b""
        deadline_s = time.monotonic() + 120
        while not answer:
            assert time.monotonic() < deadline_s, "it is still let in"
            try:
                slow.sendall(b"a")
                answer = slow.recv(4096)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.ray
def test_clients_that_say_nothing_do_not_keep_others_out(door: psutil.Process) -> None:
    """As many as may be connected, and one more: the kernel holds it until there is room."""
    silent = [connected(door) for _ in range(CONNECTIONS)]
    slow = [connected(door) for _ in range(CONNECTIONS)]
    for each in slow:
        each.sendall(SLOW)
    with connected(door) as served:
        served.sendall(HEALTH)
        assert b"Route table is not populated yet." in served.recv(4096), "HAProxy answers itself"
    assert {each.recv(4096) for each in silent} == {b""}, "probes of load balancers get no 408"
    for each in (*silent, *slow):
        each.close()


@pytest.mark.ray
def test_its_own_pages_are_for_nobody_else(door: psutil.Process) -> None:
    assert {address for address, _ in listening(door)} == {"127.0.0.1"}
    assert len(listening(door)) == 3, "clients, metrics, statistics"


def test_a_configuration_without_defaults_is_not_served_without_a_bound() -> None:
    with pytest.raises(haproxy.ConfigurationUnknown):
        haproxy.amended("global\n    maxconn 5\nlisten x\n", 10)


def test_amending_twice_changes_nothing_more() -> None:
    once = haproxy.amended("global\ndefaults\n    mode http\nlisten stats\n  bind *:8404\n", 10)
    assert "timeout http-request 10000ms" in once
    assert "bind 127.0.0.1:8404" in once
    assert haproxy.amended(once, 10) == once
