"""What Ray Serve's own format allows around our models.

Ray lets unknown fields pass for the sake of older versions, so a misspelt one would be
silently without effect. The names are listed here, so that a file can be checked in
milliseconds and where Ray is not installed; a test compares them with Ray's models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from serve_app.config_problems import from_validation

FILE_FIELDS: Final = frozenset(
    [
        "proxy_location",
        "http_options",
        "grpc_options",
        "controller_options",
        "logging_config",
        "tracing_config",
        "applications",
        "target_capacity",
    ]
)
HTTP_FIELDS: Final = frozenset(
    [
        "host",
        "port",
        "root_path",
        "request_timeout_s",
        "keep_alive_timeout_s",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_keyfile_password",
        "ssl_ca_certs",
    ]
)
APPLICATION_FIELDS: Final = frozenset(
    [
        "name",
        "route_prefix",
        "import_path",
        "runtime_env",
        "host",
        "port",
        "deployments",
        "autoscaling_policy",
        "args",
        "logging_config",
        "external_scaler_enabled",
    ]
)
DEPLOYMENT_FIELDS: Final = frozenset(
    [
        "name",
        "num_replicas",
        "max_ongoing_requests",
        "max_queued_requests",
        "backpressure_config",
        "user_config",
        "autoscaling_config",
        "graceful_shutdown_wait_loop_s",
        "graceful_shutdown_timeout_s",
        "health_check_period_s",
        "health_check_timeout_s",
        "ray_actor_options",
        "placement_group_bundles",
        "placement_group_strategy",
        "placement_group_bundle_label_selector",
        "max_replicas_per_node",
        "logging_config",
        "request_router_config",
        "gang_scheduling_config",
        "deployment_actors",
        "rolling_update_percentage",
        "max_surge_percent",
    ]
)


def ray_problems(document: Mapping[str, Any]) -> list[str]:
    """Return what Ray Serve itself would refuse; nothing where Ray is not installed."""
    try:
        from ray.serve.schema import ServeDeploySchema
    except ImportError:
        return []
    try:
        ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        return from_validation(error, ServeDeploySchema, document, "")
    return []
