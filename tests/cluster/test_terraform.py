"""Terraform: its own formatter and parser, providers' schemas, policies, and the chart's needs."""

from __future__ import annotations

import ipaddress
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.conftest import Render
from tests.cluster.crds import refusals
from tests.cluster.manifests import CHART, Manifests
from tests.cluster.network import NAMESPACE
from tests.cluster.terraform import (
    FOLDERS,
    ROOTS,
    SCHEMAS,
    TERRAFORM,
    arguments,
    blocks,
    documents,
    planned,
    providers,
    resources,
    run_terraform,
    sections,
    words,
)

NODES = TERRAFORM / "eks" / "karpenter" / "nodes.yaml"
# One worker plans, once.
pytestmark = pytest.mark.xdist_group("terraform")
LABELS = {"gke": "cloud.google.com/gke-accelerator", "eks": "karpenter.k8s.aws/instance-gpu-name"}
# vCPUs and GiB of the machines, from the cloud's lists; some of it is the node's own.
MACHINES = {"g2-standard-32": (32, 128, 1), "a3-highgpu-2g": (52, 468, 2)}


def short(folder: Path) -> str:
    return str(folder.relative_to(TERRAFORM))


def one(type_: str) -> dict[str, Any]:
    [found] = resources(type_)
    return found.body


# Terraform itself.


def test_terraform_would_format_nothing() -> None:
    status, said = run_terraform(TERRAFORM, "fmt", "-recursive", "-check", "-diff", ".")
    assert status == 0, said


# Plans, by a real Terraform on providers that know their schemas only.


VARIANTS = {
    "gke": ("gke", ()),
    "gke autopilot": ("gke", ("-var=autopilot=true", "-var=managed_prometheus=true")),
    "eks": ("eks", ()),
}


@pytest.fixture(scope="session")
def environment() -> Iterator[dict[str, str]]:
    """Where Terraform finds providers."""
    with providers() as found:
        yield found


@pytest.fixture(scope="session")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Terraform may write beside its files, with the chart whose values it reads."""
    folder = tmp_path_factory.mktemp("plan")
    shutil.copytree(TERRAFORM, folder / "terraform", ignore=shutil.ignore_patterns(".terraform"))
    (folder / "charts").symlink_to(CHART.parent)
    return folder / "terraform"


@pytest.fixture(scope="session")
def shown(environment: dict[str, str], copy: Path) -> dict[str, dict[str, Any]]:
    """What Terraform shows of each variant's plan."""
    return {
        variant: planned(copy / root, environment, *given)
        for variant, (root, given) in VARIANTS.items()
    }


@pytest.fixture(scope="session")
def plans(shown: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The resources that each variant plans."""
    return {
        variant: [each["change"]["after"] | each for each in plan["resource_changes"]]
        for variant, plan in shown.items()
    }


def of(plan: list[dict[str, Any]], type_: str) -> dict[str, dict[str, Any]]:
    """Return a plan's resources of a type by their address in their module."""
    return {e["address"].split(f"{type_}.")[1]: e for e in plan if e["type"] == type_}


def test_terraform_plans_everything_that_is_written(plans: dict[str, list[dict[str, Any]]]) -> None:
    """Arguments, references and types are Terraform's to judge; nothing is left out of it."""
    made = {(each["type"], each["name"]) for plan in plans.values() for each in plan}
    written = {(r.type, r.name) for f in FOLDERS for r in blocks(f) if r.kind == "resource"}
    assert written <= made


@pytest.mark.parametrize("cloud", ROOTS)
def test_node_groups_are_those_that_the_chart_wants(
    cloud: str, shown: dict[str, dict[str, Any]], render: Render
) -> None:
    """The module `pools` reads the chart's values; the chart renders them."""
    groups = shown[cloud]["planned_values"]["outputs"]["gpu_groups"]["value"]
    documents_ = [d for d in yaml.safe_load_all(render(cloud).stdout) if d]
    wanted = {
        group["groupName"]: group
        for group in Manifests(cloud, documents_).cluster["workerGroupSpecs"]
        if "GPU" in group["resources"]
    }
    assert groups.keys() == wanted.keys()
    for name, group in groups.items():
        template = wanted[name]["template"]["spec"]
        assert group["max_nodes"] == wanted[name]["maxReplicas"]
        assert str(group["gpus"]) == wanted[name]["resources"]["GPU"]
        assert group["accelerator"] == template["nodeSelector"][LABELS[cloud]]
        assert group["spot"] is name.endswith("-spot")


def test_gke_plans_a_pool_of_nodes_for_each_group(
    plans: dict[str, list[dict[str, Any]]], render: Render
) -> None:
    pools = of(plans["gke"], "google_container_node_pool")
    documents_ = [d for d in yaml.safe_load_all(render("gke").stdout) if d]
    for group in Manifests("gke", documents_).cluster["workerGroupSpecs"]:
        if "GPU" not in group["resources"]:
            continue
        pool = pools.pop(f'gpu["{group["groupName"]}"]')
        [node] = pool["node_config"]
        [scaling] = pool["autoscaling"]
        [gpu] = node["guest_accelerator"]
        assert node["spot"] is group["groupName"].endswith("-spot")
        assert bool(node["taint"]) is node["spot"]
        assert gpu["count"] == int(group["resources"]["GPU"])
        assert scaling["total_max_node_count"] == 2 * group["maxReplicas"], "room for an upgrade"
    assert pools.keys() == {"cpu[0]"}


def test_autopilot_plans_no_nodes_of_ours(plans: dict[str, list[dict[str, Any]]]) -> None:
    assert not of(plans["gke autopilot"], "google_container_node_pool")
    assert of(plans["gke autopilot"], "google_container_cluster").keys() == {"autopilot[0]"}
    assert of(plans["gke"], "google_container_cluster").keys() == {"standard[0]"}


@pytest.mark.parametrize(
    ("root", "given"),
    [
        ("gke", ('administrators={anyone="0.0.0.0/0"}', "backup_location=europe-west4")),
        ("eks", ('administrators={anyone="8.8.8.0/24"}', "backup_region=eu-west-1")),
    ],
)
def test_dangerous_settings_are_refused(
    environment: dict[str, str], copy: Path, root: str, given: tuple[str, ...]
) -> None:
    with pytest.raises(AssertionError) as refused:
        planned(copy / root, environment, *(f"-var={each}" for each in given))
    said = " ".join(str(refused.value).split())
    assert "private ranges only" in said
    assert "a region's loss must not take the backups with it" in said


@pytest.mark.parametrize("folder", FOLDERS, ids=short)
def test_versions_are_pinned(folder: Path) -> None:
    [terraform] = [t for d in documents(folder).values() for t in d.get("terraform", [])]
    assert re.fullmatch(r">= 1\.\d+, < 2\.0", terraform["required_version"])
    for required in terraform.get("required_providers", []):
        for name, each in required.items():
            if name == "__is_block__":
                continue
            assert re.fullmatch(r"\d+\.\d+\.\d+", each["version"]), f"{name} may move by itself"
            if name in SCHEMAS["versions"]:
                assert each["version"] == SCHEMAS["versions"][name], "held against another schema"


@pytest.mark.parametrize("name", ROOTS)
def test_state_is_remote_and_everything_asked_for_has_an_example(name: str) -> None:
    folder = TERRAFORM / name
    [terraform] = [t for d in documents(folder).values() for t in d.get("terraform", [])]
    [backend] = terraform["backend"]
    assert (backend.keys() - {"__is_block__"}) <= {"gcs", "s3"}
    given = set(re.findall(r"^(\w+) +=", (folder / "example.tfvars").read_text(), re.MULTILINE))
    variables = dict(sections(folder, "variable"))
    assert given == {each for each, body in variables.items() if "default" not in body}
    assert "bucket" in (folder / "backend.hcl.example").read_text()


# Policies.


def test_the_api_servers_have_no_public_address() -> None:
    for cluster in resources("google_container_cluster"):
        [private] = cluster.body["private_cluster_config"]
        assert private["enable_private_nodes"] is True
        assert private["enable_private_endpoint"] is True
    [vpc] = one("aws_eks_cluster")["vpc_config"]
    assert vpc["endpoint_public_access"] is False
    assert vpc["endpoint_private_access"] is True
    for name in ROOTS:
        [condition] = dict(sections(TERRAFORM / name, "variable"))["administrators"]["validation"]
        assert "192" in condition["condition"], "private ranges only"


def test_nodes_and_data_have_no_public_address() -> None:
    for subnet in resources("aws_subnet"):
        assert subnet.body["map_public_ip_on_launch"] is False, subnet.where
    assert one("aws_db_instance")["publicly_accessible"] is False
    [settings] = one("google_sql_database_instance")["settings"]
    [address] = settings["ip_configuration"]
    assert address["ipv4_enabled"] is False
    assert address["ssl_mode"] == "ENCRYPTED_ONLY"
    assert one("google_redis_instance")["connect_mode"] == "PRIVATE_SERVICE_ACCESS"
    for type_ in ("google_compute_firewall", "aws_security_group_rule"):
        assert not resources(type_), "rules stand in what is looked at below"


def test_nothing_comes_in_from_anywhere() -> None:
    for rule in resources("aws_vpc_security_group_ingress_rule"):
        assert "0.0.0.0/0" not in json.dumps(rule.body), rule.where
        assert "cidr_ipv6" not in rule.body, rule.where
        source_given = {"cidr_ipv4", "referenced_security_group_id"} & rule.body.keys()
        assert source_given, rule.where
        assert rule.body["ip_protocol"] == "tcp", rule.where
    for group in resources("aws_security_group"):
        assert not group.body.get("ingress"), group.where
    routes = [r for r in resources("aws_route") if "0.0.0.0/0" in json.dumps(r.body)]
    assert [r.name for r in routes if "gateway_id" in r.body] == ["edge"], "nodes go out by NAT"
    default = one("aws_default_security_group")
    assert not default.get("ingress")
    assert not default.get("egress")


def test_what_is_stored_and_sent_is_encrypted() -> None:
    database = one("aws_db_instance")
    assert database["storage_encrypted"] is True
    assert "kms_key_id" in database
    [parameter] = one("aws_db_parameter_group")["parameter"]
    assert (parameter["name"], parameter["value"]) == ("rds.force_ssl", "1")
    cache = one("aws_elasticache_replication_group")
    assert cache["at_rest_encryption_enabled"] is True
    assert cache["transit_encryption_enabled"] is True
    assert "auth_token" in cache
    [encryption] = one("aws_eks_cluster")["encryption_config"]
    assert encryption["resources"] == ["secrets"]
    assert resources("aws_s3_bucket_server_side_encryption_configuration")
    redis = one("google_redis_instance")
    assert redis["auth_enabled"] is True
    assert redis["transit_encryption_mode"] == "SERVER_AUTHENTICATION"
    assert "customer_managed_key" in redis
    assert "encryption_key_name" in one("google_sql_database_instance")
    assert one("google_storage_bucket")["encryption"]
    for cluster in resources("google_container_cluster"):
        [encryption] = cluster.body["database_encryption"]
        assert encryption["state"] == "ENCRYPTED"
    for pool in resources("google_container_node_pool"):
        [node] = pool.body["node_config"]
        assert "boot_disk_kms_key" in node, pool.where
    [disk] = node_class()["spec"]["blockDeviceMappings"]
    assert disk["ebs"]["encrypted"] is True


def test_what_must_not_be_lost_cannot_be_deleted_by_a_slip() -> None:
    for type_ in ("google_container_cluster", "google_sql_database_instance", "aws_db_instance"):
        for each in resources(type_):
            assert each.body["deletion_protection"] is True, each.where
    assert one("aws_eks_cluster")["deletion_protection"] is True
    for type_ in (
        "aws_db_instance",
        "aws_kms_key",
        "aws_s3_bucket",
        "google_kms_crypto_key",
        "google_sql_database_instance",
        "google_storage_bucket",
    ):
        for each in resources(type_):
            [life] = each.body["lifecycle"]
            assert life["prevent_destroy"] is True, each.where
    assert one("aws_db_instance")["skip_final_snapshot"] is False
    assert one("aws_s3_bucket")["force_destroy"] is False
    assert one("google_storage_bucket")["force_destroy"] is False


def test_the_ledger_can_go_back_to_a_point_in_time_and_outlives_its_region() -> None:
    """What docs/runbooks/disaster.md counts on."""
    database = one("aws_db_instance")
    assert database["backup_retention_period"] >= 14
    assert database["multi_az"] is True
    assert "var.backup_region" in one("aws_db_instance_automated_backups_replication")["region"]
    [settings] = one("google_sql_database_instance")["settings"]
    [backup] = settings["backup_configuration"]
    assert backup["point_in_time_recovery_enabled"] is True
    assert "var.backup_location" in backup["location"]
    assert settings["availability_type"] == "REGIONAL"
    [versions] = one("aws_s3_bucket_versioning")["versioning_configuration"]
    assert versions["status"] == "Enabled"
    assert one("google_storage_bucket")["versioning"][0]["enabled"] is True


def test_no_password_of_the_ledger_is_in_the_state() -> None:
    assert "password_wo" in one("google_sql_user")
    assert "password" not in one("google_sql_user")
    assert "secret_data_wo" in one("google_secret_manager_secret_version")
    assert one("aws_db_instance")["manage_master_user_password"] is True
    assert "password" not in one("aws_db_instance")


def test_buckets_are_nobodys_but_ours() -> None:
    assert one("google_storage_bucket")["public_access_prevention"] == "enforced"
    assert one("google_storage_bucket")["uniform_bucket_level_access"] is True
    block = one("aws_s3_bucket_public_access_block")
    assert all(block[name] is True for name in arguments(block) - {"bucket"})


def test_pods_cannot_be_nodes() -> None:
    for pool in resources("google_container_node_pool"):
        [node] = pool.body["node_config"]
        assert node["workload_metadata_config"][0]["mode"] == "GKE_METADATA", pool.where
        assert node["shielded_instance_config"][0]["enable_secure_boot"] is True, pool.where
    [options] = one("aws_launch_template")["metadata_options"]
    assert (options["http_tokens"], options["http_put_response_hop_limit"]) == ("required", 1)
    options = node_class()["spec"]["metadataOptions"]
    assert (options["httpTokens"], options["httpPutResponseHopLimit"]) == ("required", 1)


def test_no_role_may_everything() -> None:
    text = "".join(path.read_text() for path in TERRAFORM.rglob("*.tf"))
    pattern = r'Effect += "(\w+)"\s+Action += (\[[^\]]*\]|"[^"]*")'
    statements = re.findall(pattern, text.replace(", Action", "\nAction"))
    assert len(statements) == len(re.findall(r"\bEffect +=", text)), "each is looked at"
    for effect, actions in statements:
        assert effect == "Deny" or "*" not in actions, actions
    members = json.dumps([r.body for r in resources("google_project_iam_member")])
    assert "roles/owner" not in members
    assert "roles/editor" not in members


def test_network_policies_are_enforced() -> None:
    [standard] = [r for r in resources("google_container_cluster") if r.name == "standard"]
    assert standard.body["datapath_provider"] == "ADVANCED_DATAPATH"
    assert 'enableNetworkPolicy = "true"' in words(TERRAFORM / "modules" / "eks")


# The chart beside it.


def test_workload_identity_is_the_charts_own_service_account(render: Render) -> None:
    documents_ = [d for d in yaml.safe_load_all(render("gke").stdout) if d]
    accounts = {d["metadata"]["name"] for d in documents_ if d["kind"] == "ServiceAccount"}
    engines = {
        group["template"]["spec"]["serviceAccountName"]
        for group in Manifests("gke", documents_).cluster["workerGroupSpecs"]
    }
    for name, module in (("gke", "gcp-data"), ("eks", "aws-data")):
        variables = dict(sections(TERRAFORM / name, "variable"))
        assert variables["namespace"]["default"] == NAMESPACE
        account = f"{variables['release']['default']}-worker"
        assert account in accounts
        assert engines == {account}
        assert "${var.release}-worker" in words(TERRAFORM / "modules" / module)


def test_gke_makes_the_spot_nodes_that_the_chart_tolerates() -> None:
    values = yaml.safe_load((CHART / "values-gke.yaml").read_text())
    [gpu] = [r for r in resources("google_container_node_pool") if r.name == "gpu"]
    [node] = gpu.body["node_config"]
    taint = json.dumps(node["dynamic"])
    for pool in values["pools"].values():
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pool[
            "tolerations"
        ], "GKE's own taint"
        for each in pool.get("spot", {}).get("tolerations", []):
            assert each["key"] in taint
            assert each["value"] == "true"
            assert "NO_SCHEDULE" in taint


def test_a_pods_requests_fit_its_machine() -> None:
    values = yaml.safe_load((CHART / "values-gke.yaml").read_text())
    machines = dict(sections(TERRAFORM / "gke", "variable"))["machines"]["default"]
    for name, pool in values["pools"].items():
        machine = machines[pool["nodeSelector"][LABELS["gke"]]]["machine_type"]
        vcpus, memory_gib, gpus = MACHINES[machine]
        wanted = pool["resources"]["requests"]
        # A node keeps some for itself: a little of its CPUs, up to 9 GiB.
        assert int(wanted["cpu"]) <= vcpus * 0.97, name
        assert int(wanted["memory"].removesuffix("Gi")) <= memory_gib - 10, name
        assert pool["gpus"] == gpus, name


def test_ranges_do_not_overlap() -> None:
    variables = dict(sections(TERRAFORM / "gke", "variable"))
    ranges = variables["ranges"]["default"]
    managed = f"{ranges['managed']['address']}/{ranges['managed']['prefix_length']}"
    texts = [ranges["nodes"], ranges["pods"], ranges["services"], managed]
    networks = [
        ipaddress.ip_network(t) for t in (*texts, variables["control_plane_range"]["default"])
    ]
    for index, each in enumerate(networks):
        assert each.is_private
        assert not any(each.overlaps(other) for other in networks[:index]), each


# Karpenter.


def node_class() -> dict[str, Any]:
    [found] = [d for d in karpenter() if d["kind"] == "EC2NodeClass"]
    return found


def karpenter() -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(NODES.read_text()) if d]


def node_pools() -> dict[str, dict[str, Any]]:
    return {d["metadata"]["name"]: d["spec"] for d in karpenter() if d["kind"] == "NodePool"}


def values_of(pool: dict[str, Any], key: str) -> list[str]:
    [found] = [r["values"] for r in pool["template"]["spec"]["requirements"] if r["key"] == key]
    return list(found)


def test_node_pools_are_what_karpenters_crds_say() -> None:
    for document in karpenter():
        assert not refusals(document), document["metadata"]["name"]


def test_karpenter_uses_what_terraform_made() -> None:
    variables = dict(sections(TERRAFORM / "eks", "variable"))
    name = variables["name"]["default"]
    spec = node_class()["spec"]
    [role] = [r for r in resources("aws_iam_role") if r.name == "nodes"]
    assert spec["role"] == role.body["name"].replace("${var.name}", name)
    for terms in (spec["subnetSelectorTerms"], spec["securityGroupSelectorTerms"]):
        assert terms == [{"tags": {"karpenter.sh/discovery": name}}]
    tagged = [r for r in resources("aws_subnet") if "karpenter.sh/discovery" in json.dumps(r.body)]
    assert [r.name for r in tagged] == ["nodes"], "never the edge"
    assert one("aws_ec2_tag")["key"] == "karpenter.sh/discovery"
    assert all("latest" not in each["alias"] for each in spec["amiSelectorTerms"]), "pinned"


def test_every_group_of_the_chart_has_nodes_that_karpenter_may_make(render: Render) -> None:
    documents_ = [d for d in yaml.safe_load_all(render("eks").stdout) if d]
    pools = node_pools()
    for group in Manifests("eks", documents_).cluster["workerGroupSpecs"]:
        template = group["template"]["spec"]
        homes = [name for name, pool in pools.items() if accepts(pool, template)]
        assert len(homes) == 1, f"{group['groupName']}: {homes}"
        if "GPU" in group["resources"]:
            limit = int(pools[homes[0]]["limits"]["nvidia.com/gpu"])
            needed = int(group["resources"]["GPU"]) * group["maxReplicas"]
            assert limit >= needed, group["groupName"]


def accepts(pool: dict[str, Any], pod: dict[str, Any]) -> bool:
    """Return whether a pod with this template could run on a node of this pool."""
    spec = pool["template"]["spec"]
    tolerated = {each["key"] for each in pod.get("tolerations", [])}
    if any(taint["key"] not in tolerated for taint in spec.get("taints", [])):
        return False
    offered = {r["key"]: r.get("values") for r in spec["requirements"] if r["operator"] == "In"}
    wanted = pod.get("nodeSelector", {})
    wants_gpu = any("nvidia.com/gpu" in c["resources"]["limits"] for c in pod["containers"])
    has_gpu = "karpenter.k8s.aws/instance-gpu-name" in offered
    return wants_gpu is has_gpu and all(
        value in offered.get(key, []) for key, value in wanted.items()
    )


def test_karpenter_moves_nothing_that_streams_and_gives_it_its_time(render: Render) -> None:
    documents_ = [d for d in yaml.safe_load_all(render("eks").stdout) if d]
    manifests = Manifests("eks", documents_)
    grace_s = max(pod.spec.get("terminationGracePeriodSeconds", 30) for pod in manifests.pods())
    for name, pool in node_pools().items():
        given_s = int(pool["template"]["spec"]["terminationGracePeriod"].removesuffix("m")) * 60
        assert given_s > grace_s, name
        assert pool["disruption"]["budgets"], name
        assert all(each["nodes"] != "100%" for each in pool["disruption"]["budgets"]), name
        if name.startswith("gpu-"):
            assert pool["disruption"]["consolidationPolicy"] == "WhenEmpty", name
    for group in manifests.cluster["workerGroupSpecs"]:
        annotations = group["template"]["metadata"]["annotations"]
        assert annotations["karpenter.sh/do-not-disrupt"] == "true"


def test_there_are_spot_and_on_demand_nodes_and_spot_is_preferred() -> None:
    pools = node_pools()
    kinds = {n: values_of(p, "karpenter.sh/capacity-type") for n, p in pools.items()}
    assert ["spot"] in kinds.values()
    assert kinds["cpu"] == ["on-demand"], "routers and Control never on spot"
    assert pools["gpu-l40s-spot"]["weight"] > pools["gpu-l40s-on-demand"]["weight"]
    [gpu] = [r for r in resources("google_container_node_pool") if r.name == "gpu"]
    [cpu] = [r for r in resources("google_container_node_pool") if r.name == "cpu"]
    assert "each.value.spot" in gpu.body["node_config"][0]["spot"]
    assert "spot" not in cpu.body["node_config"][0]
