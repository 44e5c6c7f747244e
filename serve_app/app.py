"""The application builders: the only place where deployments are wired.

configs/*.yaml name these as ``import_path``; Ray Serve calls each with its ``args``.
This module must not postpone the evaluation of annotations: Serve reads the builders'
argument types to validate ``args``, and a string there turns validation off silently.

Serve calls each builder in a process of its own, so each imports its own deployment only.
"""

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from serve_app.config import (
    SPARE_CALLS,
    ControlArgs,
    EngineReplicaSettings,
    GatewayArgs,
    PoolArgs,
    ReplicaSettings,
)

# Requests have a line of our own. Serve's would log every heartbeat and scrape beside them.
LOGGING = LoggingConfig(enable_access_log=False)


def control(args: ControlArgs) -> serve.Application:
    """Build the control application: one replica on a CPU node."""
    from serve_app.control import Control

    deployment = serve.deployment(
        Control,
        name="Control",
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": args.num_cpus, "resources": args.resources},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        logging_config=LOGGING,
    )
    return deployment.bind(args.model_dump())


def pool(args: PoolArgs) -> serve.Application:
    """Build one model pool: engine replicas behind an ingress that serves nothing."""
    from serve_app.engine.replica import EngineReplica, Pool

    engine = serve.deployment(
        EngineReplica,
        name="Engine",
        max_ongoing_requests=args.calls_max,
        request_router_config=RequestRouterConfig(
            request_router_class="serve_app.engine.placement.PlacementRouter"
        ),
        **_replica_options(args.replicas, args.env),
        **_size_options(args.replicas),
    )
    ingress = serve.deployment(
        Pool,
        name="Pool",
        autoscaling_config={"min_replicas": 0, "initial_replicas": 0, "max_replicas": 1},
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(engine.bind(args.model_dump()))


def gateway(args: GatewayArgs) -> serve.Application:
    """Build the gateway: the routers."""
    from serve_app.router import Router

    router = serve.deployment(
        serve.ingress()(Router),
        name="Router",
        max_ongoing_requests=args.max_in_flight + SPARE_CALLS,
        num_replicas=args.replicas.num_replicas,
        **_replica_options(args.replicas, {}),
    )
    return router.bind(args.model_dump())


def _size_options(replicas: EngineReplicaSettings) -> dict[str, Any]:
    """Return how many engine replicas there are: a number, or what Control decides."""
    if replicas.bounds is None:
        return {"num_replicas": replicas.num_replicas}
    least, most = replicas.bounds
    scaled = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        initial_replicas=replicas.num_replicas,
        metrics_interval_s=1.0,
        # What waited for a first replica half a minute ago must not wake the pool again.
        look_back_period_s=3.0,
        # Serve delays even what a policy of one's own decides: ours has windows already.
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function="serve_app.autoscaling:replicas"),
    )
    return {"autoscaling_config": scaled}


def _replica_options(replicas: ReplicaSettings, env: dict[str, str]) -> dict[str, Any]:
    """Return the deployment options that follow from the replicas' settings."""
    actor: dict[str, Any] = {
        "num_cpus": replicas.num_cpus,
        "num_gpus": replicas.num_gpus,
        "resources": replicas.resources,
    }
    if env:
        actor["runtime_env"] = {"env_vars": env}
    return {
        "ray_actor_options": actor,
        "graceful_shutdown_timeout_s": replicas.graceful_shutdown_timeout_s,
        "health_check_period_s": replicas.health_check_period_s,
        "health_check_timeout_s": replicas.health_check_timeout_s,
        "logging_config": LOGGING,
    }
