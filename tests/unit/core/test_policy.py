"""The configuration mirrors core's policies field by field, and refuses nonsense."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from serve_app import config_policy as config
from serve_app.config import RouterConfig
from serve_app.core import policy
from serve_app.core.policy import arrival_order
from serve_app.core.routing import RoutingSettings

MIRRORED = [
    (config.ClassPolicy, policy.ClassPolicy),
    (config.FairnessPolicy, policy.FairnessPolicy),
    (config.BrownoutPolicy, policy.BrownoutPolicy),
    (config.BreakerPolicy, policy.BreakerPolicy),
    (config.PoolPolicy, policy.PoolPolicy),
]


@pytest.mark.parametrize(("model", "core"), MIRRORED)
def test_configuration_has_every_field_of_core(model: type[BaseModel], core: type) -> None:
    of_the_router = {"heavy", "prompt", "scaling", "spot"} if core is policy.PoolPolicy else set()
    assert set(model.model_fields) - of_the_router == {field.name for field in fields(core)}


def test_defaults_of_the_configuration_are_cores() -> None:
    expected = policy.PoolPolicy(routing_settings=RoutingSettings())
    assert config.PoolPolicy().to_core() == expected


def test_nested_settings_reach_core() -> None:
    settings = config.PoolPolicy.model_validate(
        {
            "sheddable": {"ttft_slo_s": 3, "kv_limit_ratio": 0.5},
            "brownout": {"fallback_pool": "small", "cap_output": False},
            "fairness": {"output_weight": 3},
        }
    )
    core = settings.to_core()
    assert (core.sheddable.ttft_slo_s, core.sheddable.kv_limit_ratio) == (3, 0.5)
    assert core.brownout.fallback_pool == "small"
    assert not core.brownout.cap_output
    assert core.fairness.output_weight == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrency_per_replica": 0},
        {"critical_reserve_ratio": -0.1},
        {"critical_reserve_ratio": math.nan},
        {"sheddable_share_ratio": 1.1},
        {"queue_timeout_s": math.inf},
        {"standard": {"ttft_slo_s": 0}},
        {"standard": {"ttft_slo_s": 1, "minimum_share_ratio": 1}},
        {"fairness": {"input_weight": 0, "output_weight": 0, "request_cost": 0}},
        {"brownout": {"kv_ratios": [0.9, 0.8, 0.95, 0.97]}},
        {"brownout": {"kv_ratios": [0.0, 0.8, 0.95, 0.97]}},
        {"brownout": {"queue_ratios": [0.5]}},
        {"breaker": {"open_s": 10, "open_max_s": 5}},
        {"stale_after_s": 10, "lost_after_s": 5},
        {"retry_after_min_s": 10, "retry_after_max_s": 5},
        {"routing": "astrology"},
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config.PoolPolicy.model_validate(settings)


def test_fallback_must_be_another_known_pool() -> None:
    for fallback in ("chat", "nowhere"):
        with pytest.raises(ValidationError, match="must be another pool"):
            RouterConfig.model_validate(
                {"pools": {"chat": {"brownout": {"fallback_pool": fallback}}}}
            )


def test_baseline_has_no_policy_of_class_tenant_or_load() -> None:
    baseline = arrival_order(policy.PoolPolicy(max_concurrency_per_replica=7, routing="kv_queue"))
    assert (baseline.max_concurrency_per_replica, baseline.routing) == (7, "kv_queue")
    assert baseline.ordering == "arrival"
    assert not baseline.early_rejection
    assert baseline.critical == baseline.standard == baseline.sheddable
