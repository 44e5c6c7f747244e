"""Print where a promtool is: HEADRACE_PROMTOOL, the PATH, or one fetched once from Debian.

Debian's package `prometheus` carries the binary. apt checks what it fetches; nothing is installed,
the binary alone is kept under .headrace/tools. It needs apt and no privileges.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from fetch_package import NotFetched, given, kept, show

PACKAGE = "prometheus"
TIMEOUT_S = 120


def find() -> Path:
    """Return a promtool that can be run.

    Raises:
        NotFetched: none is installed, and none can be had.
    """
    return given("HEADRACE_PROMTOOL", "promtool") or kept("promtool", _downloaded, _binary)


def _downloaded(folder: Path) -> Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NotFetched("there is no apt to fetch Debian's with")
    # Lists of packages of its own: the machine's may be empty, and need root to fill.
    (folder / "lists" / "partial").mkdir(parents=True)
    apt = ["apt-get", "--quiet", "--quiet", "--option", f"Dir::State::lists={folder}/lists"]
    apt += ["--option", f"Dir::Cache={folder}", "--option", "APT::Sandbox::User="]
    apt += ["--option", "Acquire::Retries=1", "--option", "Acquire::http::Timeout=20"]
    _run([*apt, "update"], folder)
    _run([*apt, "download", PACKAGE], folder)
    [package] = folder.glob("*.deb")
    return package


def _binary(package: Path, target: Path) -> None:
    _run(["dpkg-deb", "--extract", package.name, "package"], package.parent)
    (package.parent / "package" / "usr" / "bin" / "promtool").replace(target)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotFetched(f"{command[0]} took longer than {TIMEOUT_S} s") from error
    if done.returncode:
        raise NotFetched(f"{command[0]} failed: {done.stderr.strip()[-200:]}")


if __name__ == "__main__":
    sys.exit(show(find, "promtool", "install it, or set HEADRACE_PROMTOOL"))
