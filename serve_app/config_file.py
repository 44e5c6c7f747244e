"""Reads a whole configs/*.yaml: Ray Serve's multi-application format, our models inside.

load(path) -> ServeFile      every problem of the file in one ConfigError
with_port(file, port)        the same file on another HTTP port
file.to_yaml()               the resolved file, defaults filled in, secrets masked
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError

from serve_app import config_rules
from serve_app.config import ControlArgs, GatewayArgs, PoolArgs, RouterConfig
from serve_app.config_masking import masked
from serve_app.config_problems import from_validation, path, unknown
from serve_app.config_ray import (
    APPLICATION_FIELDS,
    DEPLOYMENT_FIELDS,
    FILE_FIELDS,
    HTTP_FIELDS,
    ray_problems,
)
from serve_app.config_rules import (
    CONTROL,
    GATEWAY,
    POOL,
    Application,
    cross_problems,
    warnings,
)
from serve_app.errors import ConfigError

DEFAULT_PORT: Final = 8000

_BUILDERS: Final[Mapping[str, type[BaseModel]]] = {
    GATEWAY: GatewayArgs,
    POOL: PoolArgs,
    CONTROL: ControlArgs,
}
_DEPLOYMENTS: Final[Mapping[str, tuple[str, ...]]] = {
    GATEWAY: ("Router",),
    POOL: ("Engine", "Pool"),
    CONTROL: ("Control",),
}
_MAX_FILE_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class ServeFile:
    """A configuration that holds together.

    ``document`` is the file as Ray Serve takes it. ``warnings`` are lines about what is
    served but was hardly meant.
    """

    path: Path
    document: Mapping[str, Any]
    applications: tuple[Application, ...]
    warnings: tuple[str, ...] = ()

    @property
    def gateway(self) -> GatewayArgs:
        """The routers' arguments."""
        args = self._only(GATEWAY).args
        assert isinstance(args, GatewayArgs)
        return args

    @property
    def control(self) -> ControlArgs:
        """Control's arguments."""
        args = self._only(CONTROL).args
        assert isinstance(args, ControlArgs)
        return args

    @property
    def router(self) -> RouterConfig:
        """Pools and aliases: the Router's user_config."""
        return self._only(GATEWAY).router or RouterConfig()

    @property
    def pools(self) -> dict[str, PoolArgs]:
        """The pools by name."""
        return {a.args.name: a.args for a in self.applications if isinstance(a.args, PoolArgs)}

    @property
    def port(self) -> int:
        """The HTTP port."""
        return int((self.document.get("http_options") or {}).get("port", DEFAULT_PORT))

    @property
    def journal_folder(self) -> str:
        """The folder of a node's journals."""
        return config_rules.journal_folder(self.applications)

    def resolved(self) -> dict[str, Any]:
        """Return the document with every default of ours filled in."""
        document = dict(self.document)
        folder = self.journal_folder
        pairs = zip(document["applications"], self.applications, strict=True)
        document["applications"] = [_resolved(raw, each, folder) for raw, each in pairs]
        return document

    def to_yaml(self, *, mask_secrets: bool = True) -> str:
        """Return the resolved document as YAML, secrets replaced unless told otherwise."""
        document = self.resolved()
        shown = masked(document) if mask_secrets else document
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)

    def _only(self, import_path: str) -> Application:
        return next(a for a in self.applications if a.import_path == import_path)


def load(file: Path | str) -> ServeFile:
    """Read and check a configuration, without importing Ray.

    Raises:
        ConfigError: every problem found, one per line, each with its field and the fix.
    """
    location = Path(file)
    document = read_document(location, "applications:")
    problems = _unknown_fields(document)
    applications, more = _applications(document)
    problems += more
    problems += _port_problems(document)
    if not problems:
        problems = cross_problems(applications)
    _raise_if_any(location, problems)
    return ServeFile(location, document, tuple(applications), tuple(warnings(applications)))


def ask_ray(file: ServeFile) -> None:
    """Check a file with Ray Serve's own models; does nothing where Ray is not installed.

    Apart from ``load`` because Ray reads its flags from the environment when imported:
    whoever starts Ray must set them first.

    Raises:
        ConfigError: what Ray refuses, one problem per line.
    """
    _raise_if_any(file.path, ray_problems(file.document))


def with_port(file: ServeFile, port: int) -> ServeFile:
    """Return the file with its HTTP port replaced."""
    options = {**(file.document.get("http_options") or {}), "port": port}
    return replace(file, document={**file.document, "http_options": options})


def parse_port(text: str, where: str) -> int:
    """Return a TCP port; ``where`` is what the user set, such as HEADRACE_PORT.

    Raises:
        ConfigError: it is not a number from 1 to 65535.
    """
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise ConfigError(f"{where} must be a port from 1 to 65535; got {text!r:.40}")
    return int(text)


def _raise_if_any(location: Path, problems: list[str]) -> None:
    if problems:
        raise ConfigError("\n".join(f"{location}: {line}" for line in dict.fromkeys(problems)))


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without repeated keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE_TAG:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} stands twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_MERGE_TAG: Final = "tag:yaml.org,2002:merge"


def read_document(location: Path, expected: str) -> dict[str, Any]:
    """Return a YAML file's mapping; no key stands twice in it.

    Raises:
        ConfigError: it cannot be read, is no YAML, or no mapping, such as ``expected``.
    """
    try:
        with location.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{location}: cannot be read: {error.strerror}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{location}: larger than 1 MiB; this is no configuration")
    try:
        document = yaml.load(content, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{location}: {_yaml_problem(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        raise ConfigError(f"{location}: not YAML: {first_line}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{location}: must be a mapping with `{expected}`")
    return document


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    context = f" ({error.context})" if error.context else ""
    return f"{where}not YAML: {error.problem}{context}"


def _unknown_fields(document: Mapping[str, Any]) -> list[str]:
    problems = [
        unknown(path(str(name)), str(name), FILE_FIELDS)
        for name in document
        if name not in FILE_FIELDS
    ]
    options = document.get("http_options")
    if isinstance(options, dict):
        names = [name for name in options if name not in HTTP_FIELDS]
        problems += [unknown(f"http_options.{n}", str(n), HTTP_FIELDS) for n in names]
    return problems


def _port_problems(document: Mapping[str, Any]) -> list[str]:
    options = document.get("http_options")
    if options is None:
        return []
    if not isinstance(options, dict):
        return ["http_options: must be a mapping such as {host: 127.0.0.1, port: 8000}"]
    port = options.get("port", DEFAULT_PORT)
    if type(port) is not int or not 1 <= port <= 65535:
        return [f"http_options.port: must be a port from 1 to 65535; got {port!r:.40}"]
    return []


def _applications(document: Mapping[str, Any]) -> tuple[list[Application], list[str]]:
    entries = document.get("applications")
    if not isinstance(entries, list) or not entries:
        return [], ["applications: required; a list with a gateway, a control and a pool"]
    applications: list[Application] = []
    problems: list[str] = []
    for index, entry in enumerate(entries):
        where = path("applications", index)
        if not isinstance(entry, dict):
            problems.append(f"{where}: must be a mapping with name and import_path")
            continue
        application, more = _application(entry, where)
        applications.append(application)
        problems += more
    counts = Counter(application.name for application in applications)
    problems += [
        f"{a.where}.name: another application is named {a.name!r} too; names must differ"
        for a in applications
        if a.name and counts[a.name] > 1
    ]
    return applications, problems


def _application(entry: dict[str, Any], where: str) -> tuple[Application, list[str]]:
    names = [name for name in entry if name not in APPLICATION_FIELDS]
    problems = [unknown(f"{where}.{n}", str(n), APPLICATION_FIELDS) for n in names]
    name, import_path = entry.get("name"), entry.get("import_path")
    for field, value in (("name", name), ("import_path", import_path)):
        if not isinstance(value, str) or not value:
            problems.append(f"{where}.{field}: required; a non-empty string")
    import_path = str(import_path)
    if import_path.startswith("serve_app.") and import_path not in _BUILDERS:
        problems.append(
            f"{where}.import_path: there is no builder {import_path!r}; "
            f"ours are {', '.join(_BUILDERS)}"
        )
    args: BaseModel | None = None
    router: RouterConfig | None = None
    if import_path in _BUILDERS:
        given = {} if entry.get("args") is None else entry["args"]
        args = _model(_BUILDERS[import_path], given, f"{where}.args", problems)
        router = _deployments(entry, import_path, where, problems)
        if import_path != GATEWAY and ("route_prefix" not in entry or entry["route_prefix"]):
            problems.append(f"{where}.route_prefix: must be null; only the gateway takes HTTP")
    assert args is None or isinstance(args, GatewayArgs | PoolArgs | ControlArgs)
    return Application(str(name), import_path, where, args, router), problems


def _deployments(
    entry: dict[str, Any], import_path: str, where: str, problems: list[str]
) -> RouterConfig | None:
    """Check the overrides of one of our applications; return the Router's user_config."""
    overrides = entry.get("deployments") or []
    if not isinstance(overrides, list):
        problems.append(f"{where}.deployments: must be a list")
        return None
    router: RouterConfig | None = None
    expected = _DEPLOYMENTS[import_path]
    for index, override in enumerate(overrides):
        here = f"{where}.deployments[{index}]"
        name = override.get("name") if isinstance(override, dict) else None
        if not isinstance(override, dict) or name not in expected:
            problems.append(f"{here}.name: the deployments are {', '.join(expected)}")
            continue
        names = [name for name in override if name not in DEPLOYMENT_FIELDS]
        problems += [unknown(f"{here}.{n}", str(n), DEPLOYMENT_FIELDS) for n in names]
        given = override.get("user_config")
        if given is None:
            continue
        if import_path != GATEWAY:
            problems.append(f"{here}.user_config: {name} takes none; use args")
            continue
        model = _model(RouterConfig, given, f"{here}.user_config", problems)
        router = model if isinstance(model, RouterConfig) else None
    return router


def _model(
    model: type[BaseModel], given: object, where: str, problems: list[str]
) -> BaseModel | None:
    if not isinstance(given, dict):
        problems.append(f"{where}: must be a mapping")
        return None
    try:
        return model.model_validate(given)
    except ValidationError as error:
        problems += from_validation(error, model, given, where)
        return None


def _resolved(raw: Mapping[str, Any], application: Application, folder: str) -> dict[str, Any]:
    entry = dict(raw)
    if application.args is not None:
        entry["args"] = application.args.model_dump(mode="json")
        entry["args"]["journal"]["folder"] = folder
    if application.router is not None:
        entry["deployments"] = [
            {**override, "user_config": application.router.model_dump(mode="json")}
            if override.get("user_config") is not None
            else override
            for override in raw["deployments"]
        ]
    return entry
