"""Where packages come from: pip's configuration handed on to uv.

uv reads its own configuration but not pip's, and a machine's mirror or folder of
wheels is usually configured for pip. What uv is told explicitly always wins.
"""

from __future__ import annotations

import ast
import os
import subprocess
from collections.abc import Mapping

PIP_SECTIONS = (":env:", "install", "global")


def pip_configuration(python: str) -> dict[str, str]:
    """Return pip's effective settings by long option name, environment first."""
    listing = subprocess.run(
        [python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    return parse_pip_configuration(listing)


def parse_pip_configuration(listing: str) -> dict[str, str]:
    """Read the output of ``pip config list``: one ``section.option='value'`` a line."""
    found: dict[str, dict[str, str]] = {section: {} for section in PIP_SECTIONS}
    for line in listing.splitlines():
        name, separator, literal = line.partition("=")
        section, dot, option = name.partition(".")
        if not separator or not dot or section not in found:
            continue
        try:
            value = ast.literal_eval(literal)
        except (SyntaxError, ValueError):
            continue
        found[section][option] = str(value)
    effective: dict[str, str] = {}
    for section in reversed(PIP_SECTIONS):
        effective.update(found[section])
    return effective


def uv_environment(
    pip: Mapping[str, str], environ: Mapping[str, str], *, extra_indexes: bool
) -> dict[str, str]:
    """Return the environment in which uv finds what pip would find.

    With ``extra_indexes`` pip's additional indexes are searched together with the
    first (uv by default stops at the first that knows a name): safe only for what a
    lock pins, and not for writing one, since they may hold fewer builds of a version.
    """
    environment = dict(environ)
    links = [link for link in environment.get("UV_FIND_LINKS", "").split(",") if link]
    links += [link for link in pip.get("find-links", "").split() if link not in links]
    if links:
        environment["UV_FIND_LINKS"] = ",".join(links)
    own_index = any(name in environment for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL"))
    if not own_index and pip.get("index-url"):
        environment["UV_DEFAULT_INDEX"] = pip["index-url"]
    own_extra = any(name in environment for name in ("UV_INDEX", "UV_EXTRA_INDEX_URL"))
    if extra_indexes and not own_extra and pip.get("extra-index-url"):
        environment["UV_INDEX"] = " ".join(pip["extra-index-url"].split())
        environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    if pip.get("cert"):
        environment.setdefault("SSL_CERT_FILE", pip["cert"])
    environment.setdefault("UV_HTTP_TIMEOUT", pip.get("default-timeout", "120"))
    return environment


def process_uv_environment(python: str, *, extra_indexes: bool) -> dict[str, str]:
    """Return this process's environment with pip's configuration handed on to uv."""
    return uv_environment(pip_configuration(python), os.environ, extra_indexes=extra_indexes)
