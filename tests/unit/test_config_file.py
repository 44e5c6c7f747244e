"""Whole configuration files: what they resolve to, and every way to get one wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app import config_ray
from serve_app.config import SimSettings
from serve_app.config_file import ServeFile, ask_ray, load, parse_port, with_port
from serve_app.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


def document() -> dict[str, Any]:
    """Return a small configuration that holds together."""
    return {
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {"name": "control", "route_prefix": None, "import_path": "serve_app.app:control"},
            {
                "name": "pool-sim",
                "route_prefix": None,
                "import_path": "serve_app.app:pool",
                "args": {"name": "sim", "engine": {"kind": "sim", "max_num_seqs": 8}},
            },
            {
                "name": "gateway",
                "route_prefix": "/",
                "import_path": "serve_app.app:gateway",
                "args": {},
                "deployments": [
                    {
                        "name": "Router",
                        "user_config": {"pools": {"sim": {}}, "aliases": {"m": "sim"}},
                    }
                ],
            },
        ],
    }


def write(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "some.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def loaded(tmp_path: Path, content: object) -> ServeFile:
    return load(write(tmp_path, content))


def problems(tmp_path: Path, content: object) -> list[str]:
    """Return the lines of the refusal, without the file's name that begins each."""
    file = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        load(file)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in lines)
    return [line.removeprefix(f"{file}: ") for line in lines]


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.name)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    found = load(file)
    assert found.pools
    assert set(found.router.pools) == set(found.pools)
    assert found.warnings == ()


def test_a_file_resolves_to_typed_models(tmp_path: Path) -> None:
    file = loaded(tmp_path, document())
    engine = file.pools["sim"].engine
    assert isinstance(engine, SimSettings)
    assert engine.max_num_seqs == 8
    assert {name: alias.pool for name, alias in file.router.aliases.items()} == {"m": "sim"}
    assert file.gateway.max_in_flight > 0
    assert file.control.database.startswith("sqlite:///")
    assert file.port == 8000


def test_the_resolved_file_is_a_valid_file_with_every_default(tmp_path: Path) -> None:
    file = loaded(tmp_path, document())
    text = file.to_yaml()
    again = loaded(tmp_path, text)
    assert again.resolved() == file.resolved()
    assert "kv_blocks" in text
    assert "queue_timeout_s" in text


def test_the_port_can_be_moved(tmp_path: Path) -> None:
    file = loaded(tmp_path, document())
    moved = with_port(file, 9000)
    assert (moved.port, file.port) == (9000, 8000)
    assert moved.document["http_options"]["host"] == "127.0.0.1"
    bare = document()
    del bare["http_options"]
    assert with_port(loaded(tmp_path, bare), 9000).port == 9000


@pytest.mark.parametrize("text", ["", "0", "65536", "-1", "80a", "8000.0", " 80", "٨٠"])
def test_a_port_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HEADRACE_PORT must be a port"):
        parse_port(text, "HEADRACE_PORT")


def test_an_unknown_field_names_its_path_and_the_nearest_known_name(tmp_path: Path) -> None:
    content = document()
    content["applications"][1]["args"]["engine"]["max_num_seq"] = 3
    assert problems(tmp_path, content) == [
        "applications[1].args.engine.max_num_seq: unknown field; did you mean max_num_seqs?"
    ]


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("args.limts", {}, "applications[2].args.limts: unknown field; did you mean limits?"),
        (
            "args.limits",
            {"max_body_byte": 1},
            "applications[2].args.limits.max_body_byte: unknown field; "
            "did you mean max_body_bytes?",
        ),
        (
            "args.max_in_flight",
            "many",
            "applications[2].args.max_in_flight: must be a valid integer, unable to parse string "
            "as an integer; got 'many' (Requests one router holds at once, queued ones included)",
        ),
        (
            "args.replicas",
            {"num_replicas": -1},
            "applications[2].args.replicas.num_replicas: must be greater than or equal to 1; "
            "got -1",
        ),
        (
            "args.limits",
            [],
            "applications[2].args.limits: must be a valid dictionary or instance of "
            "LimitSettings; got a list",
        ),
        (
            "route_prefx",
            "/",
            "applications[2].route_prefx: unknown field; did you mean route_prefix?",
        ),
        ("args", [], "applications[2].args: must be a mapping"),
        (
            "import_path",
            "serve_app.app:gatway",
            "applications[2].import_path: there is no builder 'serve_app.app:gatway'; ours are "
            "serve_app.app:gateway, serve_app.app:pool, serve_app.app:control",
        ),
    ],
)
def test_a_wrong_field_of_an_application_is_one_line(
    tmp_path: Path, path: str, value: object, line: str
) -> None:
    content = document()
    target: Any = content["applications"][2]
    *parents, last = path.split(".")
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    assert problems(tmp_path, content) == [line]


@pytest.mark.parametrize(
    ("user_config", "line"),
    [
        (
            {"pools": {"sim": {"queue_capasity": 3}}},
            "pools.sim.queue_capasity: unknown field; did you mean queue_capacity?",
        ),
        ({"pools": {"sim": {"queue_timeout_s": 0}}}, "pools.sim.queue_timeout_s: must be greater"),
        (
            {"pools": {"sim": {"queue_timeout_s": float("nan")}}},
            "pools.sim.queue_timeout_s: must be",
        ),
        ({"pools": {"sim": {}}, "aliases": {"m": "big"}}, "aliases.m: there is no pool 'big'"),
        ({"pools": {"sim": {}, "big": {}}}, "pools.big: there is no application pool-big"),
    ],
)
def test_a_wrong_user_config_is_one_line(
    tmp_path: Path, user_config: dict[str, Any], line: str
) -> None:
    content = document()
    content["applications"][2]["deployments"][0]["user_config"] = user_config
    (only,) = problems(tmp_path, content)
    assert (
        only.removeprefix("applications[2].deployments[0].user_config")
        .lstrip(".: ")
        .startswith(line)
    )


def test_an_unknown_kind_of_engine_lists_the_known_ones(tmp_path: Path) -> None:
    content = document()
    content["applications"][1]["args"]["engine"]["kind"] = "vlm"
    (line,) = problems(tmp_path, content)
    assert line.startswith("applications[1].args.engine.kind: must be one of")
    assert "did you mean vllm?" in line
    del content["applications"][1]["args"]["engine"]["kind"]
    (line,) = problems(tmp_path, content)
    assert line == "applications[1].args.engine.kind: required; must be vllm or sim"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    content = document()
    content["http_option"] = {}
    content["http_options"]["port"] = 70000
    content["applications"][0]["args"] = {"databse": "x"}
    del content["applications"][1]["args"]["engine"]
    content["applications"][2]["args"] = {"max_in_flight": 0}
    found = problems(tmp_path, content)
    starts = [
        "http_option: unknown field; did you mean http_options?",
        "http_options.port: must be a port from 1 to 65535; got 70000",
        "applications[0].args.databse: unknown field; did you mean database?",
        "applications[1].args.engine: required",
        "applications[2].args.max_in_flight: must be greater than or equal to 1; got 0",
    ]
    for start in starts:
        assert any(line.startswith(start) for line in found), start
    assert len(found) == len(starts)


def test_names_must_differ(tmp_path: Path) -> None:
    content = document()
    content["applications"].append(dict(content["applications"][1]))
    found = problems(tmp_path, content)
    assert (
        "applications[3].name: another application is named 'pool-sim' too; names must differ"
        in found
    )


def test_a_pool_no_router_uses_is_a_mistake(tmp_path: Path) -> None:
    content = document()
    more = {**content["applications"][1], "name": "pool-big"}
    more["args"] = {**more["args"], "name": "big"}
    content["applications"].append(more)
    assert problems(tmp_path, content) == [
        "applications[3]: no router uses the pool 'big'; add it under "
        "applications[2].deployments[0].user_config.pools"
    ]


def test_the_application_of_a_pool_is_named_after_it(tmp_path: Path) -> None:
    content = document()
    content["applications"][1]["name"] = "simulated"
    assert problems(tmp_path, content) == [
        "applications[1].name: must be pool-sim, after applications[1].args.name; got simulated"
    ]


@pytest.mark.parametrize("missing", ["control", "gateway"])
def test_a_gateway_and_a_control_belong_to_every_file(tmp_path: Path, missing: str) -> None:
    content = document()
    content["applications"] = [a for a in content["applications"] if a["name"] != missing]
    (line,) = problems(tmp_path, content)
    assert line.startswith(f"applications: there must be exactly one {missing}")


def test_processes_must_name_the_control_there_is(tmp_path: Path) -> None:
    content = document()
    content["applications"][0]["name"] = "kontrol"
    found = problems(tmp_path, content)
    assert [line.split(":")[0] for line in found] == [
        "applications[2].args.control.app",
        "applications[1].args.control.app",
    ]
    assert all("it is named 'kontrol'" in line for line in found)


@pytest.mark.parametrize("name", ["control", "pool-sim"])
def test_only_the_gateway_takes_http(tmp_path: Path, name: str) -> None:
    content = document()
    application = next(a for a in content["applications"] if a["name"] == name)
    del application["route_prefix"]  # Serve's default is "/"
    (line,) = problems(tmp_path, content)
    assert "route_prefix: must be null; only the gateway takes HTTP" in line


def test_an_override_of_a_deployment_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    content = document()
    content["applications"][2]["deployments"][0]["name"] = "Ruter"
    found = problems(tmp_path, content)
    assert "applications[2].deployments[0].name: the deployments are Router" in found[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("applications: [", "line 1, column 16: not YAML"),
        ("a: 1\nb: [2\nc: 3\n", "line 3, column 2: not YAML"),
        ("a: 1\nb:\n  x: 1\n  x: 2\n", "line 4, column 3: not YAML: the key 'x' stands twice"),
        ("a: &x {b: 1}\nc: *y\n", "line 2, column 4: not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4: not YAML"),
        ("- a\n- b\n", "must be a mapping with `applications:`"),
        ("", "must be a mapping with `applications:`"),
        ("applications: []", "applications: required"),
        ("applications: {a: 1}", "applications: required"),
        ("applications: [3]", "applications[0]: must be a mapping"),
        ("applications:\n- {}\n", "applications[0].name: required"),
        ("\x00", "not YAML"),
        ("a: " + "x" * 2**20, "larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_configuration_says_where_and_why(
    tmp_path: Path, text: str, words: str
) -> None:
    assert words in problems(tmp_path, text)[0]


def test_a_missing_file_and_a_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read: No such file"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="not YAML") as caught:
        load(file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_stream_longer_than_the_grace_of_its_replicas_is_warned_about(tmp_path: Path) -> None:
    content = document()
    content["applications"][2]["args"] = {"replicas": {"graceful_shutdown_timeout_s": 20}}
    (warning,) = loaded(tmp_path, content).warnings
    assert warning.startswith("applications[2].args.replicas.graceful_shutdown_timeout_s: 20 s")


def test_applications_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    content = document()
    content["applications"].append(
        {
            "name": "other",
            "route_prefix": "/other",
            "import_path": "other.app:build",
            "args": {"x": 1},
        }
    )
    file = loaded(tmp_path, content)
    assert file.resolved()["applications"][3] == content["applications"][3]


def test_secrets_are_masked_and_nothing_else(tmp_path: Path) -> None:
    content = document()
    content["applications"][0]["args"] = {"database": "postgresql://ann:swordfish@db/x"}
    content["applications"][1]["args"]["env"] = {
        "HF_TOKEN": "hf_swordfish",
        "SOME_API_KEY": "swordfish",
        "TOKENIZERS_PARALLELISM": "false",
    }
    file = loaded(tmp_path, content)
    text = file.to_yaml()
    assert "swordfish" not in text
    assert "postgresql://ann:********@db/x" in text
    assert "HF_TOKEN: '********'" in text
    assert "TOKENIZERS_PARALLELISM: 'false'" in text
    assert re.search(r"token_budget: 8192", text)
    assert "swordfish" in file.to_yaml(mask_secrets=False)


@pytest.mark.ray
def test_the_fields_of_ray_are_those_of_the_installed_ray() -> None:
    from ray.serve import schema

    models = {
        schema.ServeDeploySchema: config_ray.FILE_FIELDS,
        schema.HTTPOptionsSchema: config_ray.HTTP_FIELDS,
        schema.ServeApplicationSchema: config_ray.APPLICATION_FIELDS,
        schema.DeploymentSchema: config_ray.DEPLOYMENT_FIELDS,
    }
    for model, known in models.items():
        assert set(model.model_fields) == known


@pytest.mark.ray
@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda file: file.name)
def test_ray_accepts_every_shipped_configuration(file: Path) -> None:
    ask_ray(load(file))


@pytest.mark.ray
def test_what_ray_itself_refuses_is_told_by_its_path(tmp_path: Path) -> None:
    content = document()
    content["applications"][2]["deployments"][0]["max_ongoing_requests"] = "many"
    file = loaded(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        ask_ray(file)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{file.path}: applications[2].deployments[0].max_ongoing_requests: ")
    assert "'many'" in line


def test_an_adapter_on_an_engine_that_serves_none_is_refused(tmp_path: Path) -> None:
    content = document()
    content["applications"][1]["args"]["engine"] = {"kind": "vllm", "model": "/models/m"}
    config = content["applications"][2]["deployments"][0]["user_config"]
    config["aliases"]["law"] = {"pool": "sim", "adapter": "law"}
    [line] = problems(tmp_path, content)
    assert line.startswith("applications[2].deployments[0].user_config.aliases.law.adapter: ")
    content["applications"][1]["args"]["engine"] = {"kind": "sim"}
    assert loaded(tmp_path, content).router.aliases["law"].adapter == "law"


def test_what_the_router_is_told_of_an_engine_is_compared_with_it(tmp_path: Path) -> None:
    content = document()
    long = {**content["applications"][1], "name": "pool-long"}
    long["args"] = {"name": "long", "engine": {"kind": "sim", "model": "another"}}
    content["applications"].insert(1, long)
    config = content["applications"][3]["deployments"][0]["user_config"]
    config["pools"] = {
        "sim": {
            "prompt": {"context_tokens": 100},
            "heavy": {"pool": "long", "threshold_tokens": 50},
        },
        "long": {},
    }
    context, heavy = loaded(tmp_path, content).warnings
    assert "pools.sim.prompt.context_tokens: 100, but the pool's engine has" in context
    assert "pools.sim.heavy.pool: 'long' serves 'another'" in heavy


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"tenants": {"a": {"weight": 0}}},
            "tenants.a.weight: must be greater than 0; got 0 (Share of a busy pool relative to "
            "other tenants')",
        ),
        (
            {"tenants": {"a": {"limits": {"request_per_min": 1}}}},
            "tenants.a.limits.request_per_min: unknown field; did you mean requests_per_min?",
        ),
        (
            {"aliases": {"m": {"pool": "sim", "limits": {"concurrent": -1}}}},
            "aliases.m.limits.concurrent: must be greater than or equal to 0; got -1 (Requests "
            "open at once)",
        ),
        (
            {"keys": {"k": {"max_output_token": 1}}},
            "keys.k.max_output_token: unknown field; did you mean max_output_tokens?",
        ),
    ],
)
def test_a_wrong_limit_is_named_with_its_path(
    tmp_path: Path, change: dict[str, Any], line: str
) -> None:
    content = document()
    content["applications"][2]["deployments"][0]["user_config"].update(change)
    assert problems(tmp_path, content) == [f"applications[2].deployments[0].user_config.{line}"]


def test_sqlite_is_refused_where_the_cluster_has_several_nodes(tmp_path: Path) -> None:
    several = document()
    several["applications"][0]["args"] = {"nodes": 2}
    [line] = problems(tmp_path, several)
    assert line.startswith("applications[0].args.database: SQLite is a file of one node")
    assert "postgresql+psycopg://" in line
    several["applications"][0]["args"]["database"] = "postgresql+psycopg://ann@db/headrace"
    assert loaded(tmp_path, several).control.nodes == 2


def test_the_processes_of_a_node_share_a_folder_of_journals(tmp_path: Path) -> None:
    """Named after the database: two services of one folder are two."""
    shared = document()
    shared["applications"][0]["args"] = {"database": "sqlite:////srv/books.db"}
    file = loaded(tmp_path, shared)
    assert file.journal_folder == "/srv/books.journal"
    assert journals(file.resolved()) == ["/srv/books.journal"] * 3
    shared["applications"][0]["args"] = {"database": "postgresql+psycopg://db/headrace"}
    shared["applications"][2]["args"] = {"journal": {"folder": "/var/own", "segments": 9}}
    file = loaded(tmp_path, shared)
    assert journals(file.resolved()) == ["/var/own"] * 3
    assert file.resolved()["applications"][2]["args"]["journal"]["segments"] == 9


def test_serve_gets_the_applications_as_the_file_has_them(tmp_path: Path) -> None:
    """`serve deploy` of the same file must change nothing, so that nothing is filled in."""
    written = document()
    assert loaded(tmp_path, written).document == written


def journals(resolved: Mapping[str, Any]) -> list[str]:
    return [entry["args"]["journal"]["folder"] for entry in resolved["applications"]]


def test_journals_in_different_folders_are_refused(tmp_path: Path) -> None:
    apart = document()
    apart["applications"][0]["args"] = {"journal": {"folder": "/a"}}
    apart["applications"][1]["args"]["journal"] = {"folder": "/b"}
    [line] = problems(tmp_path, apart)
    assert line.startswith("applications[1].args.journal.folder: '/b', but '/a' elsewhere")


def scaled(autoscale: dict[str, int], scaling: dict[str, Any], num_replicas: int = 1) -> Any:
    sized = document()
    sized["applications"][1]["args"]["replicas"] = {
        "num_replicas": num_replicas,
        "autoscale": autoscale,
    }
    pools = sized["applications"][2]["deployments"][0]["user_config"]["pools"]
    pools["sim"] = {**(pools["sim"] or {}), "scaling": scaling}
    return sized


def test_a_pool_sleeps_only_if_both_its_parts_say_so(tmp_path: Path) -> None:
    [line] = problems(tmp_path, scaled({"min_replicas": 0, "max_replicas": 2}, {}))
    assert line.endswith("user_config.pools.sim.scaling.to_zero: true")
    [line] = problems(tmp_path, scaled({"min_replicas": 1, "max_replicas": 2}, {"to_zero": True}))
    assert line.endswith("args.replicas.autoscale.min_replicas must be 0 for it")
    sleeping = scaled({"min_replicas": 0, "max_replicas": 2}, {"to_zero": True})
    warned = loaded(tmp_path, sleeping).warnings
    assert [line.split(":")[0].rpartition(".")[2] for line in warned] == [
        "hold_without_replica_s",
        "queue_timeout_s",
    ]


def test_a_pool_begins_between_its_bounds(tmp_path: Path) -> None:
    [line] = problems(tmp_path, scaled({"min_replicas": 2, "max_replicas": 4}, {}))
    assert (
        "num_replicas (1) must be between autoscale.min_replicas (2) and max_replicas (4)" in line
    )
    [line] = problems(tmp_path, scaled({"min_replicas": 4, "max_replicas": 2}, {}))
    assert "min_replicas must be at most max_replicas" in line
    assert loaded(tmp_path, scaled({"min_replicas": 1, "max_replicas": 4}, {})).pools["sim"]


def test_a_pool_of_a_fixed_size_is_not_empty(tmp_path: Path) -> None:
    """Ray Serve refuses it when it is deployed, after the others are running."""
    content = document()
    content["applications"][1]["args"]["replicas"] = {"num_replicas": 0}
    [line] = problems(tmp_path, content)
    assert "applications[1].args.replicas" in line
    assert "autoscale: {min_replicas: 0, max_replicas: N}" in line


def test_what_runs_on_spot_nodes_ends_within_their_notice(tmp_path: Path) -> None:
    def spotted(pool: Any, policy: Any) -> Any:
        written = document()
        written["applications"][1]["args"]["spot"] = pool
        pools = written["applications"][2]["deployments"][0]["user_config"]["pools"]
        pools["sim"] = {**(pools["sim"] or {}), "spot": policy}
        return written

    bounds = {"max_output_tokens": 1024, "max_stream_s": 115}
    assert loaded(tmp_path, spotted({"notice_s": 120}, bounds)).warnings == ()
    [line] = problems(tmp_path, spotted({"notice_s": 30}, bounds))
    assert "user_config.pools.sim.spot.max_stream_s: 115 s does not end within" in line
    assert line.endswith("at most 27 s")
    [line] = problems(tmp_path, spotted(None, bounds))
    assert line.endswith("Set applications[1].args.spot.notice_s as well")
    [warned] = loaded(tmp_path, spotted({"notice_s": 30}, None)).warnings
    assert "pools.sim.spot: not set" in warned
    [line] = problems(tmp_path, spotted({"source": "file"}, None))
    assert "file goes with `source: file`, and that needs it" in line
