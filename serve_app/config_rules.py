"""What must hold between the applications of one configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from serve_app.config import ControlArgs, GatewayArgs, PoolArgs, RouterConfig

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
    return problems


def _control_problems(control: Application, reporting: list[Application]) -> list[str]:
    return [
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
    return lines
