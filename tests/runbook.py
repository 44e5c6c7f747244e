"""Blocks of a runbook that a test runs as they stand: those under a comment ``tried: NAME``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sqlalchemy.engine import make_url

from tests.postgres import client_programs
from tests.stack import ROOT

PAGES = ROOT / "docs" / "runbooks"
BLOCK = re.compile(r"^<!-- tried: (\S+) -->\n```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> dict[str, str]:
    """Return the blocks of docs/runbooks/``page`` that are tried, by name."""
    return dict(BLOCK.findall((PAGES / page).read_text()))


def run_block(script: str, folder: Path, environment: Mapping[str, str]) -> str:
    """Run a block in ``folder`` and return what it printed; ``headrace`` is this checkout's."""
    programs = folder / ".programs"
    if not programs.exists():
        programs.mkdir()
        headrace = programs / "headrace"
        headrace.write_text(f'#!/bin/sh\nexec {sys.executable} -m serve_app.cli "$@"\n')
        headrace.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name[:2] != "PG"}
    path = f"{programs}:{client_programs()}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def libpq(url: str) -> dict[str, str]:
    """Return the variables by which PostgreSQL's programs reach a database."""
    parsed = make_url(url)
    return {
        "PGHOST": str(parsed.host),
        "PGPORT": str(parsed.port),
        "PGUSER": str(parsed.username),
        "PGPASSWORD": str(parsed.password),
        "PGDATABASE": str(parsed.database),
    }
