"""What the cluster serves is what configs/ says, and every check of ours and Ray's takes it."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import ray_env
from serve_app.config import PoolArgs
from serve_app.config_file import ServeFile, ask_ray, load
from tests.cluster.conftest import Render
from tests.cluster.manifests import CHART, ROOT, Manifests

SOURCES = {"kind": "sim.yaml", "gke": "prod.yaml", "eks": "prod.yaml"}
# All that a cluster needs different from the file in configs/.
DIFFERENT = {
    "http_options.host",
    "control.args.database",
    "control.args.nodes",
}
OF_THE_POD = {"RAY_AUTH_MODE", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"}


@pytest.fixture
def loaded(manifests: Manifests, tmp_path: Path) -> ServeFile:
    path = tmp_path / "serve.yaml"
    path.write_text(manifests.service["serveConfigV2"])
    return load(path)


def leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a document with its path; applications go by their names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for inner in value:
            prefix = "" if where == "applications" else f"{where}."
            yield from leaves(inner, prefix + inner["name"])
    else:
        yield where, value


def test_local_and_cluster_serve_the_same(plain: Manifests) -> None:
    source = yaml.safe_load((ROOT / "configs" / SOURCES[plain.profile]).read_text())
    local, cluster = dict(leaves(source)), dict(leaves(plain.serve_config))
    changed = {path for path in local if path not in cluster or cluster[path] != local[path]}
    assert changed <= DIFFERENT
    added = cluster.keys() - local.keys() - DIFFERENT
    assert all(".resources." in path for path in added), added


def test_the_chart_reads_configs_itself() -> None:
    for link in [*CHART.glob("files/configs/*.yaml"), CHART / "files" / "ray.env"]:
        assert link.is_symlink(), f"{link}: a copy would drift"
        assert link.resolve() == ROOT / "configs" / link.name


@pytest.mark.parametrize("folder", ["alerts", "dashboards"])
def test_the_chart_brings_every_alert_and_board(folder: str) -> None:
    for file in (ROOT / "cluster" / folder).iterdir():
        assert (CHART / "files" / folder / file.name).resolve() == file


def test_check_config_takes_it_without_a_warning(loaded: ServeFile) -> None:
    assert loaded.warnings == ()
    assert loaded.control.database.startswith("postgresql")
    assert loaded.port == 8000


@pytest.mark.ray
def test_ray_serve_takes_it(loaded: ServeFile) -> None:
    ask_ray(loaded)


@pytest.mark.ray
def test_rays_autoscaler_reads_the_groups(manifests: Manifests) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    metadata = {"name": "headrace", "namespace": "serving"}
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": metadata, "spec": manifests.cluster}
    )
    types = config["available_node_types"]
    for group in manifests.cluster["workerGroupSpecs"]:
        found = types[group["groupName"]]
        assert (found["min_workers"], found["max_workers"]) == (
            group["minReplicas"],
            group["maxReplicas"],
        )
        wanted = {name: float(amount) for name, amount in group["resources"].items()}
        assert wanted.items() <= {k: float(v) for k, v in found["resources"].items()}.items()


def test_every_ray_process_gets_the_settings_of_ray_env(manifests: Manifests) -> None:
    wanted = ray_env.read(ROOT / "configs" / "ray.env")
    for pod in manifests.pods():
        if pod.labels["headrace.io/component"] not in ("head", "cpu", "engine"):
            continue
        [container] = pod.spec["containers"]
        given = {each["name"]: each.get("value") for each in container["env"]}
        assert len(given) == len(container["env"]), "a variable stands twice"
        assert {n: given.get(n) for n in wanted if n not in OF_THE_POD} == {
            name: value for name, value in wanted.items() if name not in OF_THE_POD
        }
        assert ray_env.shortcomings({k: v for k, v in given.items() if v is not None}) == []
    assert manifests.cluster["authOptions"]["mode"] == "token"


def test_each_pool_fits_on_its_own_nodes_and_no_other(
    manifests: Manifests, loaded: ServeFile
) -> None:
    groups = manifests.cluster["workerGroupSpecs"]
    for name, pool in loaded.pools.items():
        wanted = {"CPU": pool.replicas.num_cpus, "GPU": pool.replicas.num_gpus}
        wanted |= pool.replicas.resources
        homes = [g for g in groups if _most_at_once(wanted, g["resources"])]
        assert homes, f"no node holds a replica of {name}"
        assert all(g["template"]["metadata"]["labels"]["headrace.io/pool"] == name for g in homes)
        places = sum(_most_at_once(wanted, g["resources"]) * g["maxReplicas"] for g in homes)
        assert places >= _most_replicas(pool)


def test_routers_and_control_are_tied_to_the_cpu_nodes(
    manifests: Manifests, loaded: ServeFile
) -> None:
    holders = [
        group["groupName"]
        for group in manifests.cluster["workerGroupSpecs"]
        if "cpu_pool" in group["resources"]
    ]
    assert holders == ["cpu"]
    assert loaded.control.resources["cpu_pool"] > 0
    assert loaded.gateway.replicas.resources["cpu_pool"] > 0
    assert manifests.cluster["headGroupSpec"]["resources"] == {"CPU": "0"}


def _most_at_once(wanted: dict[str, float], offered: dict[str, str]) -> int:
    return int(min(float(offered.get(n, 0)) / need for n, need in wanted.items() if need))


def _most_replicas(pool: PoolArgs) -> int:
    bounds = pool.replicas.bounds
    return bounds[1] if bounds else pool.replicas.num_replicas


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    return done.stderr


def test_mistakes_are_named(render: Render) -> None:
    assert "no such application" in said(render("kind", "--set", "serve.overrides.gatway.x=1"))
    assert "pools.llama-8b: missing" in said(render("kind", "--set", "serve.config=prod.yaml"))
    assert "the chart has no" in said(render("kind", "--set", "serve.config=none.yaml"))
    # Helm 3 and helm 4 word it differently.
    assert re.search("propert(y|ies) '?hed", said(render("kind", "--set", "hed.x=1")))
