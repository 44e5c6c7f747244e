"""The engines that everything runs on, and Headrace's configuration around them."""

from __future__ import annotations

from typing import Any

STEP_S = 0.02

ENGINES: dict[str, dict[str, Any]] = {
    "sim": {"zero_latency": True, "max_num_seqs": 512},
    "paced": {
        "max_num_seqs": 512,
        "overhead_s": STEP_S,
        "weights_s": 0.0,
        "prefill_s_per_token": 0.0,
        "context_s_per_token": 0.0,
        "batch_s_per_request": 0.0,
    },
}
"""By model name. ``sim``: a step is one turn of the engine's loop. ``paced``: 20 ms."""

_POLICY: dict[str, Any] = {
    "max_concurrency_per_replica": 512,
    "prefill_knee_tokens": 131_072,
    "queue_capacity": 1024,
    # A saturated loop delivers snapshots late; the benchmark is of the cost, not of the limit.
    "stale_after_s": 5.0,
}
_POLICY_OFF: dict[str, Any] = {
    **_POLICY,
    "ordering": "arrival",
    "routing": "round_robin",
    "early_rejection": False,
    "client_throttle": False,
    "critical_reserve_ratio": 0.0,
    "sheddable_share_ratio": 1.0,
    "sparse_headroom_ratio": 0.0,
    "tenant_kv_ratio": 1.0,
    "brownout": {"kv_ratios": [2.0, 2.0, 2.0, 2.0], "queue_ratios": [2.0, 2.0, 2.0, 2.0]},
}
_NEVER_REACHED = {
    "requests_per_min": 10**9,
    "tokens_per_min": 10**12,
    "concurrent": 10**6,
}


def stack(
    *, governance: bool = True, transport: str = "channel", routers: int = 1
) -> dict[str, Any]:
    """Return the configuration: one engine of each kind; ``transport`` as in ChannelSettings.

    With ``governance``: keys, limits on key, tenant and model name, classes, fair queue,
    early rejection, brownout, metering, metrics. Without: first come, first served, nothing
    limited; keys, metering and metrics cannot be switched off and stay.
    """
    policy = _POLICY if governance else _POLICY_OFF
    aliases = {
        name: {"pool": name, **({"limits": _NEVER_REACHED} if governance else {})}
        for name in ENGINES
    }
    user_config: dict[str, Any] = {"pools": dict.fromkeys(ENGINES, policy), "aliases": aliases}
    if governance:
        user_config["default_tenant"] = {"limits": _NEVER_REACHED, "each_key": _NEVER_REACHED}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "control",
                "route_prefix": None,
                "import_path": "serve_app.app:control",
                "args": {"database": "sqlite:///bench.db"},
            },
            *(_pool(name, settings) for name, settings in ENGINES.items()),
            {
                "name": "gateway",
                "route_prefix": "/",
                "import_path": "serve_app.app:gateway",
                "args": {
                    "replicas": {"num_replicas": routers, "num_cpus": 0.1},
                    "channel": {"transport": transport},
                },
                "deployments": [{"name": "Router", "user_config": user_config}],
            },
        ],
    }


def _pool(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": f"pool-{name}",
        "route_prefix": None,
        "import_path": "serve_app.app:pool",
        "args": {
            "name": name,
            "engine": {"kind": "sim", **settings},
            "replicas": {"num_replicas": 1, "num_cpus": 0.1},
        },
    }
