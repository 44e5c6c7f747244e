"""configs/ray.env: every name is one that the installed Ray reads, every value fits the limits."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app.config import LimitSettings

ROOT = Path(__file__).resolve().parents[2]
RAY_ENV = ROOT / "configs" / "ray.env"


def settings() -> dict[str, str]:
    """Return the file's settings, refusing what a shell, Docker and a chart read differently."""
    found: dict[str, str] = {}
    for line in RAY_ENV.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        assert re.fullmatch(r"RAY_[A-Za-z0-9_]+=[A-Za-z0-9_./:-]+", line), line
        name, value = line.split("=", 1)
        assert name not in found, f"{name} is set twice"
        found[name] = value
    return found


def ray_file(name: str) -> Path:
    """Return a file of the installed Ray, without importing Ray."""
    return Path(str(importlib.metadata.distribution("ray").locate_file(name)))


def is_read_by_ray(name: str) -> bool:
    """Tell whether Ray reads this environment variable.

    ``RAY_`` and a name in small letters is a setting of Ray's core, which is compiled.
    """
    core_setting = name.removeprefix("RAY_")
    if core_setting.islower():
        return core_setting.encode() + b"\0" in ray_file("ray/_raylet.so").read_bytes()
    sources = (
        "ray/serve/_private/constants.py",
        "ray/_private/ray_constants.py",
        "ray/_private/authentication/authentication_token_setup.py",
        "ray/_private/metrics_agent.py",
        "ray/_common/usage/usage_constants.py",
    )
    return any(f'"{name}"' in ray_file(source).read_text() for source in sources)


def test_every_name_is_one_the_installed_ray_reads() -> None:
    unknown = [name for name in settings() if not is_read_by_ray(name)]

    assert unknown == []
    assert not is_read_by_ray("RAY_SERVE_ENABLE_HAPROXY"), "nearly a name"
    assert not is_read_by_ray("RAY_worker_nicenes"), "nearly a name"


def test_nothing_cuts_the_longest_response() -> None:
    values, limits = settings(), LimitSettings()

    for name in (
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S",
    ):
        assert float(values[name]) >= limits.max_stream_s + 30, name


def test_the_largest_body_fits_into_a_message_between_router_and_engine() -> None:
    length = int(settings()["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])

    assert length >= 2 * LimitSettings().max_body_bytes


def test_a_request_that_was_sent_is_never_retried() -> None:
    assert settings()["RAY_SERVE_HAPROXY_RETRY_ON"] == "conn-failure"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_takes_the_values_that_stand_in_the_file() -> None:
    values = {name: value for name, value in settings().items() if "_SERVE_" in name}
    script = (
        "import json, sys; from ray.serve._private.constants import *; known = globals();"
        # Some are called in Serve without what they begin with outside.
        "value = lambda n: known[n] if n in known else known[n.removeprefix('RAY_SERVE_')];"
        "print(json.dumps({n: str(value(n)) for n in json.loads(sys.argv[1])}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(list(values))],
        env={**os.environ, **settings()},
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )

    taken = json.loads(done.stdout.splitlines()[-1])

    def normal(value: str) -> str | float:
        truth = {"True": "1", "False": "0"}.get(value, value)
        return float(truth) if re.fullmatch(r"[0-9.]+", truth) else truth

    assert {n: normal(v) for n, v in taken.items()} == {n: normal(v) for n, v in values.items()}
