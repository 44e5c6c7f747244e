"""The environment around Ray: HAProxy's program, and what is said when it is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from serve_app import cli, haproxy, ray_env

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
        timeout=30,
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
