"""The stack of the simulated engines, configs/sim.yaml: one router before two replicas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import yaml

from tests.e2e.waiting import until
from tests.stack import ROOT, Stack, running_stack

REPLICAS = 2
# Nobody is turned away because a busy machine would serve late: that is not what is tested.
PATIENT: dict[str, Any] = {
    "queue_timeout_s": 60,
    "hold_without_replica_s": 60,
    **{name: {"ttft_slo_s": 60} for name in ("critical", "standard", "sheddable")},
}


@contextmanager
def running() -> Iterator[Stack]:
    """Start it, and wait for both replicas: one is enough to be ready."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    *_, gateway = document["applications"]
    gateway["deployments"][0]["user_config"]["pools"]["sim"] |= PATIENT
    with running_stack(document) as stack:
        until(lambda: replicas_ready(stack, "sim") == REPLICAS, "both replicas")
        yield stack


def replicas_ready(stack: Stack, pool: str) -> int:
    """Return how many of a pool's replicas the router that is asked sends to."""
    try:
        with stack.http(key=None) as client:
            found: int = client.get("/ready").json()["pools"][pool]["replicas"]
    except (httpx.HTTPError, KeyError, ValueError):
        return 0
    return found
