"""The stack that most tests of several routers share: three of them before four pools.

A stack takes most of a minute of two cores to start. Tests that kill or fill something use
a pool with the properties they need; `settle` has everything as it was before the next one.
"""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from serve_app.ledger.database import Database
from serve_app.ledger.grants import GrantStore
from tests.e2e import sim
from tests.e2e.keys import ASKED_IN_A_ROW, EACH_ITS_OWN
from tests.e2e.waiting import is_idle, until
from tests.stack import ROOT, Stack, running_stack

ROUTERS = 3
ENGINES = 2
FORGET_S = 10.0
# small: few places, a token every 20 ms.
SLOTS = 8
STEP_S = 0.02
# elastic: nought to three replicas that take two seconds to start.
MOST = 3
# Limits of tenants, small enough to reach.
A_MINUTE = 400
TOKENS_A_MINUTE = 20_000
CONCURRENT = 12

PATIENT: dict[str, Any] = {**sim.PATIENT, "queue_capacity": 1024, "stale_after_s": 5.0}
POOLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": (
        {"weights_s": STEP_S, "max_num_seqs": SLOTS},
        {**PATIENT, "max_concurrency_per_replica": SLOTS, "stale_after_s": 1.0},
    ),
    # Of 96 places each keeps 28 for Critical, so that a hundred Standard streams find room.
    "wide": (
        {"weights_s": STEP_S, "max_num_seqs": 96},
        {**PATIENT, "max_concurrency_per_replica": 128},
    ),
    "quick": (
        {"weights_s": 0.005, "max_num_seqs": 64},
        {**PATIENT, "max_concurrency_per_replica": 128},
    ),
    "elastic": (
        {"start_delay_s": 2.0},
        {
            "max_concurrency_per_replica": 8,
            "stale_after_s": 1.0,
            "hold_without_replica_s": 60,
            "queue_timeout_s": 120,
            "early_rejection": False,
            "scaling": {
                "to_zero": True,
                "cold_start_s": 2,
                "fast_s": 2,
                "slow_s": 4,
                "down_after_s": 5,
                "idle_s": 8,
            },
        },
    ),
}


def document() -> dict[str, Any]:
    """Return the fleet's configuration, made from configs/sim.yaml."""
    found: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "sim.yaml").read_text())
    control, template, gateway = found["applications"]
    # What is waited for after every kill. Thirty seconds are more than a busy machine needs.
    control["args"]["forget_after_s"] = FORGET_S
    pools = []
    for name, (engine, _) in POOLS.items():
        pool = copy.deepcopy(template)
        pool["name"] = f"pool-{name}"
        pool["args"]["name"] = name
        pool["args"]["engine"] |= engine
        pool["args"]["replicas"] |= {"num_replicas": ENGINES, "health_check_period_s": 1}
        pools.append(pool)
    pools[-1]["args"]["replicas"] |= {
        "num_replicas": 0,
        "autoscale": {"min_replicas": 0, "max_replicas": MOST},
    }
    gateway["args"]["replicas"] |= {"num_replicas": ROUTERS, "health_check_period_s": 1}
    for application in (*pools, gateway):
        application["args"]["control"] = {"metrics_period_s": 0.5}
    gateway["deployments"][0]["user_config"] = {
        "pools": {name: policy for name, (_, policy) in POOLS.items()},
        "aliases": {name: name for name in POOLS},
        "tenants": {
            "counted": {"each_key": {"requests_per_min": A_MINUTE}},
            "metered": {"limits": {"tokens_per_min": TOKENS_A_MINUTE}},
            "slotted": {"limits": {"concurrent": CONCURRENT}},
            "quiet": {"limits": {"concurrent": 5000}},
        },
    }
    found["applications"] = [control, *pools, gateway]
    return found


@contextmanager
def running() -> Iterator[Stack]:
    """Start the fleet. Its database knows a router that ended with the machine it ran on."""
    with running_stack(document(), prepare=_remember_a_router_of_yesterday) as stack:
        settle(stack)
        yield stack


def _remember_a_router_of_yesterday(folder: Path) -> None:
    (folder / ".headrace").mkdir()
    database = Database(f"sqlite:///{folder}/.headrace/sim.db")
    grants = GrantStore(database, lambda: time.time() - 3600)
    grants.add("of-yesterday", grants.begin().epoch)
    database.close()


@contextmanager
def stood_still(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Stop processes for the block; they go on after it if they are still there."""
    stopped = list(processes)
    for process in stopped:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def settle(stack: Stack) -> None:
    """Wait until nothing runs any more and everything is there that there was."""
    until(lambda: they_know_each_other(stack), "the routers know each other")
    until(lambda: is_idle(stack), "no slot held")
    until(lambda: all_there(stack), "every engine there, for every router")


def they_know_each_other(stack: Stack) -> bool:
    """Tell whether Control knows all routers, and each of them the others."""
    try:
        routers = stack.metric("headrace_control_processes", role="router")
        peers = stack.metric("headrace_router_peers")
    except httpx.HTTPError:
        return False
    return routers == ROUTERS and peers == ROUTERS * (ROUTERS - 1)


def all_there(stack: Stack) -> bool:
    """Tell whether every router sends to every engine of the pools that have a fixed number."""
    with stack.http(key=None, limits=EACH_ITS_OWN) as client:
        for _ in range(ASKED_IN_A_ROW):
            pools = client.get("/ready").raise_for_status().json()["pools"]
            if any(pools[name]["replicas"] != ENGINES for name in ("small", "wide", "quick")):
                return False
    return True
