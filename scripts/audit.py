"""Look every locked package up in OSV's database of known vulnerabilities, by pip-audit.

    python3 scripts/audit.py            # make audit

Ends with 0 where nothing is known, 1 where something is, 2 where the database or pip-audit cannot
be had: then nothing was checked. requirements/accepted.txt names what is known and accepted, until
when and why.
"""

from __future__ import annotations

import datetime
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
ACCEPTED = REQUIREMENTS / "accepted.txt"
TOOL = ROOT / ".headrace" / "tools" / "pip-audit-2.10.1"
PACKAGE = "pip-audit==2.10.1"
DATABASE = "api.osv.dev"


class NotChecked(Exception):
    """Nothing is known of the packages; the message says why."""


def main() -> int:
    try:
        accepted = read_accepted(ACCEPTED.read_text().splitlines(), datetime.date.today())
        reach(DATABASE)
        program = install()
    except NotChecked as error:
        print(f"nothing was checked: {error}", file=sys.stderr)
        return 2
    known = False
    for lock in locks():
        print(f"==> {lock.relative_to(ROOT)}", flush=True)
        known |= subprocess.run(command(program, lock, accepted), check=False).returncode != 0
    return int(known)


def locks() -> list[Path]:
    """Return every file that pins packages with their hashes."""
    return sorted(REQUIREMENTS.glob("*.lock"))


def read_accepted(lines: Iterable[str], today: datetime.date) -> list[str]:
    """Return the ids of ``ID YYYY-MM-DD WHY`` lines; `#` begins a comment.

    Raises:
        NotChecked: a line is none of these, or its time is over.
    """
    found = []
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split(maxsplit=2)
        if len(words) < 3:
            raise NotChecked(f"requirements/accepted.txt: {line!r} is not `ID YYYY-MM-DD WHY`")
        try:
            until = datetime.date.fromisoformat(words[1])
        except ValueError:
            raise NotChecked(f"requirements/accepted.txt: {words[1]} is no date") from None
        if until < today:
            raise NotChecked(
                f"requirements/accepted.txt: {words[0]} was accepted until {until}; take a version "
                "without it, or say again until when and why"
            )
        found.append(words[0])
    return found


def reach(host: str) -> None:
    """Raises ``NotChecked`` if nothing answers there."""
    try:
        socket.create_connection((host, 443), timeout=10).close()
    except OSError as error:
        raise NotChecked(
            f"{host} cannot be reached ({error}); the CI workflow runs this on every change"
        ) from error


def install() -> Path:
    """Return pip-audit's program, in an environment of its own.

    Raises:
        NotChecked: it cannot be installed.
    """
    program = TOOL / "bin" / "pip-audit"
    if not program.exists():
        python = TOOL / "bin" / "python"
        for step in (
            [sys.executable, "-m", "venv", "--clear", str(TOOL)],
            [str(python), "-m", "pip", "install", "--quiet", PACKAGE],
        ):
            done = subprocess.run(step, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotChecked(f"{PACKAGE} cannot be installed: {done.stderr.strip()[-300:]}")
    return program


def command(program: Path, lock: Path, accepted: Iterable[str]) -> list[str]:
    """Return how pip-audit is asked about a lock: as it stands, nothing resolved or installed."""
    words = [str(program), "--requirement", str(lock), "--disable-pip", "--require-hashes"]
    words += ["--vulnerability-service", "osv", "--progress-spinner", "off"]
    return words + [word for each in accepted for word in ("--ignore-vuln", each)]


if __name__ == "__main__":
    sys.exit(main())
