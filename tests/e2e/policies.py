"""The stack of the policies: one router, pools of every kind, books in PostgreSQL.

Made from configs/policies.yaml with limits small enough to reach.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import yaml

from tests.e2e.waiting import patiently, until
from tests.postgres import fresh_database, running_postgres
from tests.stack import ROOT, Stack, running_stack

HEAVY_TOKENS = 2048
SLOW = {
    "max_num_seqs": 16,
    "token_budget": 2048,
    "kv_blocks": 4096,
    "overhead_s": 0.02,
    "weights_s": 0.04,
    "prefill_s_per_token": 2e-4,
}
SLOW_POLICY = {
    "max_concurrency_per_replica": 16,
    "stale_after_s": 1.0,
    "critical": {"ttft_slo_s": 2.0},
    "standard": {"ttft_slo_s": 4.0},
    "sheddable": {"ttft_slo_s": 8.0},
}
# The ladder climbs as soon as anything is in the KV cache.
AT_ONCE, NEVER = 1e-6, 2.0
BROWNOUT = {
    "shed_sheddable": False,
    "queue_ratios": [NEVER] * 4,
    "stable_s": 1.0,
    "hysteresis_ratio": 0.0,
    "output_cap_tokens": 8,
}


def document() -> dict[str, Any]:
    """Return configs/policies.yaml with the pools and limits that the tests need.

    Beside those for the policies: a pool with one slot and one place to wait, and a pool
    whose replica takes an hour to start.
    """
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "policies.yaml").read_text())
    *others, gateway = found["applications"]
    template = next(each for each in others if each["name"] == "pool-chat")
    for name, replicas, engine in (
        ("tight", 1, {}),
        ("empty", 0, {"start_delay_s": 3600}),
        ("capped", 1, {"speed": 0.3}),
        ("full", 1, {"speed": 0.3}),
        ("slow", 2, {"max_model_len": 32_768, **SLOW}),
    ):
        pool = copy.deepcopy(template)
        pool["name"] = f"pool-{name}"
        pool["args"]["name"] = name
        pool["args"]["replicas"]["num_replicas"] = replicas
        pool["args"]["engine"].update(engine)
        others.append(pool)
        if not replicas:
            pool["args"]["replicas"]["autoscale"] = {"min_replicas": 0, "max_replicas": 1}
    gateway["args"]["control"] = {"metrics_period_s": 0.5}
    config = gateway["deployments"][0]["user_config"]
    pools = config["pools"]
    for name in ("chat", "chat-long", "chat-small"):
        pools[name]["hold_without_replica_s"] = 60
    pools["chat"]["heavy"]["threshold_tokens"] = HEAVY_TOKENS
    capped = {**BROWNOUT, "kv_ratios": [AT_ONCE, AT_ONCE, NEVER, NEVER]}
    full = {**BROWNOUT, "kv_ratios": [AT_ONCE] * 3 + [NEVER], "fallback_pool": "chat-small"}
    pools["capped"] = {"stale_after_s": 5.0, "brownout": capped}
    pools["full"] = {"stale_after_s": 5.0, "brownout": full}
    pools["slow"] = SLOW_POLICY
    pools["tight"] = {
        "max_concurrency_per_replica": 1,
        "queue_capacity": 1,
        "stale_after_s": 10.0,
    }
    pools["empty"] = {
        "hold_without_replica_s": 0.2,
        "stale_after_s": 10.0,
        "scaling": {"to_zero": True},
    }
    config["aliases"] = {
        **{name: name for name in pools},
        "scarce": {"pool": "chat", "limits": {"requests_per_min": 2}},
        "brief": {"pool": "chat", "max_prompt_tokens": 100, "max_output_tokens": 6},
    }
    config["tenants"].update(
        {
            "few-per-key": {"each_key": {"requests_per_min": 2}},
            "few-per-user": {"each_user": {"requests_per_min": 2}},
            "few": {"limits": {"requests_per_min": 2, "tokens_per_min": 100_000}},
            "short": {"limits": {"tokens_per_min": 1000}},
            "single": {"limits": {"concurrent": 1}},
            "nobody": {"limits": {"requests_per_min": 0}},
        }
    )
    found["applications"] = [*others, gateway]
    return found


@contextmanager
def running() -> Iterator[Stack]:
    """Start it, and wait for every pool's replicas, and until the router has our limit."""
    found = document()
    with running_postgres() as cluster, fresh_database(cluster) as url:
        found["applications"][0]["args"]["database"] = url
        with running_stack(found) as stack:
            until(lambda: is_whole(stack), "every pool's replicas")
            with stack.http() as client:
                body = {"model": "chat", "prompt": "hello", "max_tokens": 1}
                patiently(lambda: client.post("/v1/completions", json=body)).raise_for_status()
            yield stack


def is_whole(stack: Stack) -> bool:
    """Tell whether every pool has all its replicas."""
    try:
        pools = stack.http(key=None).get("/ready").json()["pools"]
    except (httpx.HTTPError, KeyError, ValueError):
        return False
    wanted = {"chat": 2, "slow": 2, "empty": 0}
    return all(state["replicas"] >= wanted.get(name, 1) for name, state in pools.items())
