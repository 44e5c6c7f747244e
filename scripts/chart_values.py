"""The values of the chart as types; writes cluster/charts/headrace/values.schema.json from them.

    python scripts/chart_values.py [--check]

Helm refuses values that the schema does not know. What each value is for stands in values.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

CHART = Path(__file__).resolve().parent.parent / "cluster" / "charts" / "headrace"
SCHEMA = CHART / "values.schema.json"

Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
Name = Annotated[str, Field(min_length=1)]
QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
Size = Annotated[str, Field(pattern=QUANTITY)]
Quantity = Annotated[
    Size | int | float,
    WithJsonSchema({"type": ["string", "number"], "pattern": QUANTITY}),
]
# No user and no password: whoever may read the release reads its values.
Url = Annotated[str, Field(pattern=r"^(https?://[^@]*)?$")]
# Parts of Kubernetes' own kinds, handed on as they are.
Labels = dict[str, str]
Objects = list[dict[str, Any]]
# Of network policies, in which nothing named is everything.
Cidr = Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
Cidrs = Annotated[list[Cidr], Field(min_length=1)]
Ports = Annotated[list[Port], Field(min_length=1)]
Peers = Annotated[Objects, Field(min_length=1)]
Selector = Annotated[Labels, Field(min_length=1)]


class Values(BaseModel):
    """Of all below: written in camel case, nothing unknown, everything named in values.yaml."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True)


class Image(Values):
    repository: Name
    tag: str = ""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""


class Images(Values):
    cpu: Image
    gpu: Image
    require_digest: bool
    pull_policy: Literal["IfNotPresent", "Always", "Never"]
    pull_secrets: list[str]


class Amounts(BaseModel):
    """What Kubernetes calls resources, of one side; devices may be named beside these."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Quantity]
    cpu: Quantity
    memory: Quantity


class Resources(Values):
    requests: Amounts
    limits: Amounts


class Serve(Values):
    config: str
    config_text: str
    overrides: dict[str, Any]


class Certificate(Values):
    """Of the authority that signed a server's own."""

    existing_secret: str
    key: Name


class Database(Values):
    existing_secret: Name
    certificate: Certificate


class Redis(Values):
    address: Annotated[str, Field(pattern=r"^(rediss?://)?[^@/\s]+$")]
    existing_secret: Name
    password_key: Name
    certificate: Certificate


class Auth(Values):
    existing_secret: Name


class BootstrapKey(Values):
    existing_secret: str
    key: Name


class Upgrade(Values):
    type: Literal["None", "NewCluster", "NewClusterWithIncrementalUpgrade"]
    gateway_class_name: str
    step_size_percent: Annotated[int, Field(ge=1, le=100)]
    interval_seconds: Count
    max_surge_percent: Annotated[int, Field(ge=0, le=100)]


class Placed(Values):
    """Where pods go."""

    node_selector: Labels
    tolerations: Objects
    annotations: Labels


class Head(Placed):
    resources: Resources


class Autoscaler(Values):
    idle_timeout_seconds: Count
    allocate_timeout_seconds: Count
    resources: Resources


class Cpu(Placed):
    min_replicas: Count
    max_replicas: Count
    ray_cpus: Annotated[int, Field(ge=1)]
    resources: Resources


class Csi(Values):
    driver: Name
    attributes: Labels = {}


# A null that is set over a profile's value stays, and is nothing given.
PLACES = {"claim": "string", "image": "object", "csi": "object"}


def _given(place: str) -> dict[str, Any]:
    return {"required": [place], "properties": {place: {"type": PLACES[place]}}}


class Models(Values):
    """One of the first three."""

    claim: Name | None = None
    image: Image | None = None
    csi: Csi | None = None
    load_format: Literal["", "safetensors", "fastsafetensors", "runai_streamer"] = ""

    model_config = ConfigDict(json_schema_extra={"oneOf": [_given(each) for each in PLACES]})

    @model_validator(mode="after")
    def _one_place(self) -> Models:
        if sum(each is not None for each in (self.claim, self.image, self.csi)) != 1:
            raise ValueError("models: one of claim, image and csi")
        return self


class Group(Values):
    min_replicas: Count
    max_replicas: Count
    node_selector: Labels = {}
    tolerations: Objects = []


class Spot(Group):
    grace_seconds: Annotated[int, Field(ge=15)]


class Pool(Values):
    """With nodes on demand, spot nodes, or both."""

    image: Literal["cpu", "gpu"]
    gpus: Count
    ray_cpus: Annotated[int, Field(ge=1)]
    resources: Resources
    node_selector: Labels = {}
    tolerations: Objects = []
    annotations: Labels = {}
    models: Models | None = None
    shm_size: Size = "2Gi"
    on_demand: Group | None = None
    spot: Spot | None = None

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["onDemand"]}, {"required": ["spot"]}]}
    )

    @model_validator(mode="after")
    def _some_nodes(self) -> Pool:
        if self.on_demand is None and self.spot is None:
            raise ValueError("a pool needs onDemand or spot")
        return self


PoolName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]


class Switch(Values):
    enabled: bool


class ApiServer(Values):
    cidrs: Cidrs
    ports: Ports


class Outside(Values):
    cidrs: Cidrs
    port: Port


class NetworkPolicy(Switch):
    gateway_from: Objects
    prometheus_namespace: Selector
    operator_namespace: Selector
    dns: Peers
    api_server: ApiServer
    postgres: Outside
    redis: Outside
    extra_egress: Objects


class Route(Switch):
    parent_refs: Objects
    hostnames: list[str]
    gke: bool
    aws: bool


class KeySecret(Values):
    name: str
    key: str


class Dcgm(Values):
    pod_monitor: bool
    namespace: Name
    labels: Labels
    port: Name


class Monitoring(Switch):
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m)$")]
    key_secret: KeySecret
    first_token_seconds: Annotated[float, Field(gt=0)]
    dashboard_labels: Labels
    dcgm: Dcgm


class OpenCost(Values):
    url: Url
    namespace: Selector
    port: Port


class Jaeger(Switch):
    image: Name


class Tracing(Values):
    endpoint: Url
    collector: Peers
    port: Port
    jaeger: Jaeger


class GpuHealth(Switch):
    dry_run: bool
    source: Name
    drain_notice_seconds: Count
    nodes_out_max: Annotated[int, Field(ge=1)]
    tolerations: Objects
    resources: Resources


class PriorityClasses(Switch):
    gateway: Count
    engine: Count


class PrePull(Switch):
    tolerations: Objects


class Quota(Switch):
    hard: dict[str, Quantity]


class LimitRange(Switch):
    default: Amounts
    default_request: Amounts


class Flavor(Values):
    name: Name
    node_labels: Labels = {}
    tolerations: Objects = []
    quota: Amounts


class Kueue(Switch):
    queue: Name
    create: bool
    cluster_queue: Name
    cohort: str
    priority_class: str
    flavors: list[Flavor]


class Bundled(Switch):
    postgres_image: Name
    redis_image: Name


class ChartValues(Values):
    """values.yaml. A field added here is added there, and explained."""

    fullname_override: str
    image: Images
    ray_version: Name
    serve: Serve
    database: Database
    redis: Redis
    auth: Auth
    bootstrap_key: BootstrapKey
    upgrade: Upgrade
    # The drain ends 30 s before the grace, and a response 15 s at least before the drain.
    grace_margin_seconds: Annotated[int, Field(ge=45)]
    head: Head
    autoscaler: Autoscaler
    cpu: Cpu
    pools: dict[PoolName, Pool]
    cache_size: Size
    disruption: Switch
    network_policy: NetworkPolicy
    route: Route
    monitoring: Monitoring
    opencost: OpenCost
    tracing: Tracing
    gpu_node_label: Name
    gpu_health: GpuHealth
    priority_classes: PriorityClasses
    quota: Quota
    limit_range: LimitRange
    kueue: Kueue
    pre_pull: PrePull
    bundled: Bundled
    # Helm's own, of parent charts.
    global_: Annotated[dict[str, Any], Field(alias="global")] = {}


def schema() -> str:
    """Return the text of values.schema.json."""
    document = ChartValues.model_json_schema()
    return json.dumps(_plain({"$schema": DRAFT, **document}), indent=1) + "\n"


# What helm 3 and helm 4 both understand.
DRAFT = "http://json-schema.org/draft-07/schema#"


def _plain(node: Any, *, names: bool = False) -> Any:
    """Drop what no validator asks for; ``names`` where keys are names of values, not keywords."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    dropped = set() if names else {"title", "description", "default"}
    return {
        key: _plain(value, names=not names and key in ("properties", "$defs"))
        for key, value in node.items()
        if key not in dropped
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether it is up to date")
    if parser.parse_args().check:
        if SCHEMA.read_text() == schema():
            return 0
        print(f"{SCHEMA.name} is not what scripts/chart_values.py says: make chart-schema")
        return 1
    SCHEMA.write_text(schema())
    return 0


if __name__ == "__main__":
    sys.exit(main())
