"""What must hold between the applications of one configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from serve_app.config import (
    ControlArgs,
    GatewayArgs,
    PoolArgs,
    RouterConfig,
    VllmSettings,
    working_s,
)
from serve_app.config_policy import PoolPolicy
from serve_app.usage_log import DEFAULT_FOLDER

GATEWAY: Final = "serve_app.app:gateway"
POOL: Final = "serve_app.app:pool"
CONTROL: Final = "serve_app.app:control"
POOL_PREFIX: Final = "pool-"


@dataclass(frozen=True, slots=True)
class Application:
    """One application of a file. ``args`` is None when it is not one of ours."""

    name: str
    import_path: str
    where: str
    args: GatewayArgs | PoolArgs | ControlArgs | None
    router: RouterConfig | None = None


def cross_problems(applications: list[Application]) -> list[str]:
    """Return what is wrong between applications that are each right by themselves."""
    problems: list[str] = []
    by_kind = {
        kind: [a for a in applications if a.import_path == kind]
        for kind in (GATEWAY, POOL, CONTROL)
    }
    for kind, what in ((GATEWAY, "gateway"), (CONTROL, "control")):
        if len(by_kind[kind]) != 1:
            problems.append(
                f"applications: there must be exactly one {what} "
                f"(import_path: {kind}); found {len(by_kind[kind])}"
            )
    for pool in by_kind[POOL]:
        assert isinstance(pool.args, PoolArgs)
        if pool.name != POOL_PREFIX + pool.args.name:
            problems.append(
                f"{pool.where}.name: must be {POOL_PREFIX + pool.args.name}, after "
                f"{pool.where}.args.name; got {pool.name}"
            )
    for gateway in by_kind[GATEWAY]:
        problems += _pool_problems(gateway, by_kind[POOL])
    for control in by_kind[CONTROL]:
        problems += _control_problems(control, by_kind[GATEWAY] + by_kind[POOL])
    return problems


def _pool_problems(gateway: Application, pools: list[Application]) -> list[str]:
    router = gateway.router or RouterConfig()
    config = f"{gateway.where}.deployments[0].user_config"
    served = {a.args.name: a for a in pools if isinstance(a.args, PoolArgs)}
    problems = [
        f"{config}.pools.{name}: there is no application {POOL_PREFIX}{name}; "
        f"add one with import_path: {POOL}"
        for name in router.pools
        if name not in served
    ]
    problems += [
        f"{application.where}: no router uses the pool {name!r}; add it under {config}.pools"
        for name, application in served.items()
        if name not in router.pools
    ]
    for name, policy in router.pools.items():
        pool = served.get(name)
        if pool is not None and isinstance(pool.args, PoolArgs):
            problems += _scaling_problems(f"{config}.pools.{name}", policy, pool, pool.args)
            problems += _spot_problems(f"{config}.pools.{name}.spot", policy, pool, pool.args)
    for alias, route in router.aliases.items():
        pool = served.get(route.pool)
        if route.adapter is None or pool is None or not isinstance(pool.args, PoolArgs):
            continue
        if isinstance(pool.args.engine, VllmSettings):
            problems.append(
                f"{config}.aliases.{alias}.adapter: the vLLM engine of {POOL_PREFIX}{route.pool} "
                "serves no adapters; point the alias at the pool itself"
            )
    return problems


def _scaling_problems(
    where: str, policy: PoolPolicy, pool: Application, args: PoolArgs
) -> list[str]:
    """Return where a pool's two parts disagree on whether it may sleep."""
    sleeps = args.replicas.bounds is not None and args.replicas.bounds[0] == 0
    if policy.scaling.to_zero and not sleeps:
        return [
            f"{where}.scaling.to_zero: {pool.where}.args.replicas.autoscale.min_replicas must be 0 "
            "for it"
        ]
    if sleeps and not policy.scaling.to_zero:
        return [
            f"{pool.where}.args.replicas.autoscale.min_replicas: 0 lets the pool sleep; then write "
            f"{where}.scaling.to_zero: true"
        ]
    return []


def _spot_problems(where: str, policy: PoolPolicy, pool: Application, args: PoolArgs) -> list[str]:
    """Return where what routers let run does not end within the notice that nodes get."""
    if policy.spot is None:
        return []
    if args.spot is None:
        return [f"{where}: how long is the notice? Set {pool.where}.args.spot.notice_s as well"]
    most_s = working_s(args.spot.notice_s)
    if policy.spot.max_stream_s <= most_s:
        return []
    return [
        f"{where}.max_stream_s: {policy.spot.max_stream_s:g} s does not end within a notice of "
        f"{args.spot.notice_s:g} s ({pool.where}.args.spot.notice_s); at most {most_s:g} s"
    ]


def journal_folder(applications: Sequence[Application]) -> str:
    """Return the folder of journals: the one that is set, or one beside the SQLite file.

    Two services in one folder must not find each other's journals, so that it goes by the
    name of the database.
    """
    given = [a.args.journal.folder for a in applications if a.args is not None]
    for folder in given:
        if folder is not None:
            return folder
    for application in applications:
        if isinstance(application.args, ControlArgs):
            path = application.args.database.removeprefix("sqlite:///")
            if path != application.args.database:
                return str(PurePath(path).with_suffix(".journal"))
    return str(DEFAULT_FOLDER)


def _control_problems(control: Application, reporting: list[Application]) -> list[str]:
    args = control.args
    assert isinstance(args, ControlArgs)
    problems = []
    if args.nodes > 1 and args.database.startswith("sqlite"):
        problems.append(
            f"{control.where}.args.database: SQLite is a file of one node and the cluster may "
            f"have {args.nodes} (args.nodes); write postgresql+psycopg://user@host/name"
        )
    folder = journal_folder([control, *reporting])
    problems += [
        f"{application.where}.args.journal.folder: {application.args.journal.folder!r}, but "
        f"{folder!r} elsewhere; the processes of a node must share one to find what another left"
        for application in (control, *reporting)
        if application.args is not None and application.args.journal.folder not in (None, folder)
    ]
    return problems + [
        f"{application.where}.args.control.app: there is no control application "
        f"{application.args.control.app!r}; it is named {control.name!r}"
        for application in reporting
        if isinstance(application.args, GatewayArgs | PoolArgs)
        and application.args.control.app != control.name
    ]


def warnings(applications: list[Application]) -> list[str]:
    """Return lines about what can be served but was hardly meant."""
    longest_s = max(
        (a.args.limits.max_stream_s for a in applications if isinstance(a.args, GatewayArgs)),
        default=0.0,
    )
    lines: list[str] = []
    for application in applications:
        args = application.args
        if isinstance(args, GatewayArgs | PoolArgs):
            grace_s = args.replicas.graceful_shutdown_timeout_s
            if grace_s < longest_s:
                lines.append(
                    f"{application.where}.args.replicas.graceful_shutdown_timeout_s: {grace_s:g} s "
                    f"is below the longest stream ({longest_s:g} s, limits.max_stream_s): an "
                    "update cuts streams"
                )
        if isinstance(args, GatewayArgs) and not (application.router or RouterConfig()).aliases:
            lines.append(f"{application.where}: no aliases, so no model can be called")
        if isinstance(args, GatewayArgs):
            lines += _prompt_warnings(application, applications)
            lines += _sleep_warnings(application)
            lines += _spot_warnings(application, applications)
    return lines


def _sleep_warnings(gateway: Application) -> list[str]:
    """Return the pools that sleep whose requests would not be held until they are awake."""
    where = f"{gateway.where}.deployments[0].user_config.pools"
    return [
        f"{where}.{name}.{field}: {held_s:g} s is below scaling.cold_start_s "
        f"({pool.scaling.cold_start_s:g} s): a sleeping pool refuses before it wakes"
        for name, pool in (gateway.router or RouterConfig()).pools.items()
        if pool.scaling.to_zero
        for field, held_s in (
            ("hold_without_replica_s", pool.hold_without_replica_s),
            ("queue_timeout_s", pool.queue_timeout_s),
        )
        if held_s < pool.scaling.cold_start_s
    ]


def _spot_warnings(gateway: Application, applications: list[Application]) -> list[str]:
    """Return the pools on spot nodes on which answers may last longer than their notice."""
    where = f"{gateway.where}.deployments[0].user_config.pools"
    pools = (gateway.router or RouterConfig()).pools
    return [
        f"{where}.{each.args.name}.spot: not set, and its nodes are spot nodes: what does not "
        f"end within {each.args.spot.notice_s:g} s is cut off or continued elsewhere"
        for each in applications
        if isinstance(each.args, PoolArgs)
        and each.args.spot is not None
        and pools[each.args.name].spot is None
    ]


def _prompt_warnings(gateway: Application, applications: list[Application]) -> list[str]:
    """Return what a pool's engine knows better than its routers were told."""
    lines: list[str] = []
    engines = {a.args.name: a.args.engine for a in applications if isinstance(a.args, PoolArgs)}
    where = f"{gateway.where}.deployments[0].user_config.pools"
    for name, pool in (gateway.router or RouterConfig()).pools.items():
        told, engine = pool.prompt.context_tokens, engines[name]
        if told is not None and engine.max_model_len not in (None, told):
            lines.append(
                f"{where}.{name}.prompt.context_tokens: {told}, but the pool's engine has "
                f"max_model_len {engine.max_model_len}"
            )
        if pool.heavy is not None and engines[pool.heavy.pool].model != engine.model:
            lines.append(
                f"{where}.{name}.heavy.pool: {pool.heavy.pool!r} serves "
                f"{engines[pool.heavy.pool].model!r}, not {engine.model!r}: long prompts get "
                "another model's answers"
            )
    return lines
