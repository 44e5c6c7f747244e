"""The environment that Ray's processes need: configs/ray.env, and what depends on the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serve_app import haproxy

FILE_NAME = "ray.env"
FAST_PATH_FLAGS = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


def read(path: Path) -> dict[str, str]:
    """Return the settings of a file of NAME=VALUE lines; none if there is no such file."""
    if not path.is_file():
        return {}
    found = {}
    for line in path.read_text().splitlines():
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if equals and not name.startswith("#"):
            found[name.strip()] = value.strip().strip("'\"")
    return found


def missing(path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what ``environment`` lacks of the file's settings and of HAProxy's program."""
    wanted = read(path)
    program = haproxy.program()
    if program is not None:
        wanted[haproxy.BINARY_PATH] = str(program)
    return {name: value for name, value in wanted.items() if name not in environment}


def fast_path(environment: Mapping[str, str]) -> bool:
    """Whether the flags are set that make Serve's path through HAProxy and gRPC."""
    return all(environment.get(flag) == "1" for flag in FAST_PATH_FLAGS)


def shortcomings(environment: Mapping[str, str]) -> list[str]:
    """Return what a process with this environment does worse than it could, for operators."""
    found = []
    if not fast_path(environment):
        found.append(
            "Ray Serve's fast path is off: start with `headrace up`, or evaluate "
            "`headrace env` before `serve run`"
        )
    elif Path(environment.get(haproxy.BINARY_PATH, "")).name != haproxy.PROGRAM:
        found.append(
            "HAProxy splices: it overlooks clients that leave while they wait; start with "
            f"`headrace up`, or set {haproxy.BINARY_PATH} to {haproxy.PROGRAM}"
        )
    return found
