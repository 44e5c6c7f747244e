"""The command line: what it prints, what it exits with, and what it does not import."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import Scope

from serve_app import admin_client
from serve_app.admin_client import HttpKeys
from serve_app.changes import Actor
from serve_app.cli import build_parser, command_summaries, main
from serve_app.core.types import TenantId
from serve_app.gateway.admin import KeyAdministration
from serve_app.gateway.auth import authenticate
from serve_app.gateway.http import exception_handlers
from serve_app.keys import KeyRecord, KeyState, KeyWish, bootstrap_record
from serve_app.ledger.store import KeyStore
from serve_app.terminal import CommandFailed

ADMIN = "the-admin-key"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEADRACE_URL", "HEADRACE_ADMIN_KEY", "HEADRACE_PORT", "HEADRACE_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a configuration whose keys are in a database of the test's own."""
    file = tmp_path / "some.yaml"
    control = {"database": f"sqlite:///{tmp_path}/keys.db"}
    document = {
        "applications": [
            {
                "name": "control",
                "route_prefix": None,
                "import_path": "serve_app.app:control",
                "args": control,
            },
            {
                "name": "gateway",
                "route_prefix": "/",
                "import_path": "serve_app.app:gateway",
                "deployments": [{"name": "Router", "user_config": {"pools": {}}}],
            },
        ]
    }
    file.write_text(yaml.safe_dump(document))
    return file


@pytest.fixture
def store(tmp_path: Path, config: Path) -> Iterator[KeyStore]:
    made = KeyStore(f"sqlite:///{tmp_path}/keys.db")
    yield made
    made.close()


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Run the command; return its status, standard output and standard error."""
    try:
        status = main([str(argument) for argument in argv])
    except SystemExit as stop:
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def helps(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield the name and the help of a command and of each of its actions."""
    yield parser.prog, parser.format_help()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from helps(inner)


@pytest.mark.parametrize("command", sorted(command_summaries()))
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    parser = build_parser(command)
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for prog, text in helps(subparsers.choices[command]):
        before, _, example = text.partition("example")
        assert len(before.splitlines()) > 4, prog
        assert prog in example, prog


def test_help_names_every_command_and_imports_none() -> None:
    script = (
        "import sys\n"
        "from serve_app import cli, commands\n"
        "try:\n"
        "    cli.main(['--help'])\n"
        "except SystemExit:\n"
        "    print([m for m in sys.modules if m.startswith(commands.__name__ + '.')])\n"
        "    print([m for m in ('ray', 'pydantic', 'sqlalchemy', 'numpy') if m in sys.modules])\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, check=True
    )
    assert answer.stdout.splitlines()[-2:] == ["[]", "[]"]
    for command, summary in command_summaries().items():
        assert summary
        assert f"    {command}" in answer.stdout


@pytest.mark.parametrize("argv", [[], ["fly"], ["keys"], ["keys", "create"], ["check-config"]])
def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("usage: headrace")


def test_a_good_configuration_is_printed_resolved(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.config_file.ray_problems", lambda _: [])
    monkeypatch.setenv("HEADRACE_PORT", "9123")
    status, out, err = run(capsys, "check-config", config)
    assert status == 0
    resolved = yaml.safe_load(out)
    assert resolved["http_options"]["port"] == 9123
    assert resolved["applications"][1]["args"]["limits"]["max_messages"] == 2048
    assert "warning: applications[1]: no aliases" in err


def test_a_bad_configuration_is_told_in_lines_and_exits_with_2(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    config.write_text(config.read_text().replace("user_config", "user_confg"))
    status, out, err = run(capsys, "check-config", config, "nowhere.yaml")
    assert (status, out) == (2, "")
    assert "user_confg: unknown field; did you mean user_config?" in err
    assert "nowhere.yaml: cannot be read" in err
    assert "Traceback" not in err


def test_a_bad_port_exits_with_2(
    capsys: pytest.CaptureFixture[str], config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_PORT", "http")
    status, _, err = run(capsys, "check-config", config)
    assert (status, err) == (
        2,
        "headrace: HEADRACE_PORT must be a port from 1 to 65535; got 'http'\n",
    )


def test_a_created_key_is_the_only_line_of_output_and_works(
    capsys: pytest.CaptureFixture[str], config: Path, store: KeyStore
) -> None:
    arguments = ["--tenant", "acme", "--ceiling", "sheddable", "--models", "a,b", "--expires", "2d"]
    status, out, _ = run(capsys, "keys", "create", "--name", "x", "--config", config, *arguments)
    assert status == 0
    state, record = store.snapshot().find(out.strip(), 0.0)
    assert state is KeyState.VALID
    assert record is not None
    assert (record.tenant, record.priority_ceiling.name) == ("acme", "SHEDDABLE")
    assert record.models == ("a", "b")
    assert record.expires_at_s is not None
    assert record.expires_at_s - record.created_at_s == pytest.approx(2 * 86_400)


def test_a_key_is_rotated_by_id_or_by_secret(
    capsys: pytest.CaptureFixture[str], config: Path, store: KeyStore
) -> None:
    secret, first = store.create(KeyWish(name="first", tenant=TenantId("acme")))
    status, out, err = run(capsys, "keys", "rotate", secret, "--overlap", "1h", "--config", config)
    assert status == 0
    assert f"key {first.key_id} works until" in err
    state, found = store.snapshot().find(out.strip(), time.time())
    assert (state, found and found.tenant) == (KeyState.VALID, "acme")
    status, _, err = run(capsys, "keys", "rotate", "nobody", "--config", config)
    assert (status, err) == (
        1,
        "headrace: there is no valid key 'nobody'; see `headrace keys list`\n",
    )
    status, _, err = run(
        capsys, "keys", "rotate", first.key_id, "--overlap", "soon", "--config", config
    )
    assert status == 2
    assert "--overlap must be a number with s, m, h, d or w" in err


def test_keys_are_listed_and_revoked_by_id_or_by_secret(
    capsys: pytest.CaptureFixture[str], config: Path, store: KeyStore
) -> None:
    secret, first = store.create(KeyWish(name="first"))
    _, second = store.create(KeyWish(name="second"))
    assert run(capsys, "keys", "revoke", secret, "--config", config)[0] == 0
    _, out, err = run(capsys, "keys", "list", "--config", config)
    assert second.key_id in out
    assert first.key_id not in out
    assert "--all" in err
    assert run(capsys, "keys", "revoke", second.key_id, "--config", config)[0] == 0
    _, out, _ = run(capsys, "keys", "list", "--all", "--json", "--config", config)
    assert [record["state"] for record in json.loads(out)] == ["revoked", "revoked"]
    assert secret[12:] not in out


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["keys", "list"], 2, "say where the keys are"),
        (["keys", "list", "--url", "http://x"], 2, "set HEADRACE_ADMIN_KEY"),
        (["keys", "list", "--url", "x", "--admin-key", "k"], 2, "must start with http://"),
        (["keys", "list", "--url", "http://127.0.0.1:9", "--admin-key", "k"], 1, "cannot reach"),
        (["keys", "list", "--config", "nowhere.yaml"], 2, "nowhere.yaml: cannot be read"),
        (["keys", "create", "--name", "x", "--expires", "soon", "--config", "c"], 2, "--expires"),
        (["models", "prepare", "gpt-5"], 2, "there is no built-in model 'gpt-5'"),
        (["models", "verify", "/nowhere"], 2, "/nowhere"),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], status: int, words: str
) -> None:
    found, out, err = run(capsys, *argv)
    assert (found, out) == (status, "")
    assert words in err
    assert err.startswith("headrace: ")
    assert err.count("\n") == 1


def test_wrong_wishes_and_unknown_keys_fail_in_one_line(
    capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    status, _, err = run(capsys, "keys", "create", "--name", "", "--config", config)
    assert status == 1
    assert "name" in err
    status, _, err = run(capsys, "keys", "revoke", "nobody", "--config", config)
    assert (status, err.count("\n")) == (1, 1)
    assert "there is no key 'nobody'" in err
    status, _, err = run(capsys, "keys", "revoke", "bootstrap", "--config", config)
    assert status == 1
    assert "HEADRACE_BOOTSTRAP_KEY" in err


def test_a_database_that_fails_is_one_line(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    (tmp_path / "keys.db").write_bytes(b"this is not a database" * 100)
    status, _, err = run(capsys, "keys", "list", "--config", config)
    assert (status, err.count("\n")) == (1, 1)
    assert "not a database" in err


class StoredKeys:
    """Control's part, in this process."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store

    async def list_keys(self) -> list[KeyRecord]:
        return self._store.list()

    async def create_key(self, wish: KeyWish, by: Actor) -> tuple[str, KeyRecord]:
        return self._store.create(wish, by)

    async def rotate_key(
        self, key_id: str, overlap_s: float, by: Actor
    ) -> tuple[str, KeyRecord, KeyRecord] | None:
        return self._store.rotate(key_id, overlap_s, by)

    async def revoke_key(self, key_id: str, by: Actor) -> KeyRecord | None:
        return self._store.revoke(key_id, by)


def _forwarded(client: TestClient, request: httpx.Request) -> httpx.Response:
    answer = client.request(
        request.method, request.url.path, content=request.content, headers=dict(request.headers)
    )
    return httpx.Response(answer.status_code, content=answer.content)


@pytest.fixture
def service(store: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the admin routes, without a socket, where the command line looks for a service."""

    def caller(scope: Scope) -> KeyRecord:
        table = store.snapshot().with_record(bootstrap_record(ADMIN))
        return authenticate(scope["headers"], table, 0.0)

    routes = KeyAdministration(caller, StoredKeys(store)).routes()
    app = Starlette(routes=routes, exception_handlers=exception_handlers())
    transport = httpx.MockTransport(lambda request: _forwarded(TestClient(app), request))

    def connected(url: str, admin_key: str) -> HttpKeys:
        return HttpKeys(url, admin_key, transport)

    monkeypatch.setattr(admin_client, "HttpKeys", connected)
    monkeypatch.setenv("HEADRACE_URL", "http://127.0.0.1:8000/v1/")
    monkeypatch.setenv("HEADRACE_ADMIN_KEY", ADMIN)


@pytest.mark.usefixtures("service")
def test_keys_of_a_running_service_are_administered_over_http(
    capsys: pytest.CaptureFixture[str], store: KeyStore
) -> None:
    status, out, _ = run(capsys, "keys", "create", "--name", "bot", "--expires", "5m")
    assert status == 0
    (record,) = store.list()
    assert store.snapshot().find(out.strip(), 0.0) == (KeyState.VALID, record)
    status, out, _ = run(capsys, "keys", "rotate", record.key_id, "--overlap", "0s")
    assert status == 0
    assert store.snapshot().find(out.strip(), 0.0)[0] is KeyState.VALID
    assert run(capsys, "keys", "revoke", record.key_id)[0] == 0
    _, out, _ = run(capsys, "keys", "list", "--all")
    assert "revoked" in out
    status, _, err = run(capsys, "keys", "revoke", "nobody")
    assert (status, err) == (1, "headrace: the service answered 404: There is no key 'nobody'.\n")


@pytest.mark.usefixtures("service")
def test_a_wrong_admin_key_is_told_as_such(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_ADMIN_KEY", "wrong-key")
    status, _, err = run(capsys, "keys", "list")
    assert status == 1
    assert "does not know this admin key" in err


def test_something_else_at_the_url_is_told_as_such() -> None:
    page = httpx.MockTransport(lambda _: httpx.Response(200, text="<html>"))
    with pytest.raises(CommandFailed, match="not as Headrace does"):
        HttpKeys("http://127.0.0.1:1", "k", page).list()


def test_versions_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "version")
    assert status == 0
    assert "python 3." in out


def test_models_are_listed_with_the_way_to_prepare_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, _ = run(capsys, "models", "list", "--cache-dir", tmp_path)
    assert status == 0
    assert "headrace models prepare smollm2" in out
