"""Who is compared: the product's policies, and what its users run today.

A baseline has no admission and no queue of its own: every request goes to an engine at
once, whose queue is first come, first served; only the choice of the replica differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from serve_app.core.policy import PoolPolicy, arrival_order
from serve_app.core.routing import ROUTINGS
from serve_app.sim.setup import Setup

PRODUCT = "headrace"
THREE_ROUTERS = "headrace-3-routers"
UNLIMITED_REQUESTS = 1_000_000
UNLIMITED_S = 3600.0
STALE_SNAPSHOT_PERIOD_S = 0.05


@dataclass(frozen=True, slots=True)
class Contender:
    """A name and what stands behind it; ``routing`` None keeps the pool's own."""

    name: str
    routing: str | None = None
    admission: bool = False
    snapshot_period_s: float | None = None
    routers: int | None = None


def _contenders() -> Mapping[str, Contender]:
    known = [
        Contender(PRODUCT, admission=True),
        Contender(THREE_ROUTERS, admission=True, routers=3),
        Contender("round-robin", "round_robin"),
        Contender("least-loaded", "least_loaded"),
        Contender("power-of-two", "power_of_two"),
        Contender("gie-scorer", "weighted_score", snapshot_period_s=STALE_SNAPSHOT_PERIOD_S),
        Contender("sticky", "prefix_affinity"),
        Contender("cache-aware", "cache_aware"),
        Contender("abandon-affinity", "abandon_affinity"),
        Contender("kv-queue", "kv_queue"),
    ]
    return MappingProxyType({each.name: each for each in known})


CONTENDERS = _contenders()
BASELINES = tuple(name for name, each in CONTENDERS.items() if not each.admission)


def contend(setup: Setup, name: str) -> Setup:
    """Return the setup as the named contender runs it.

    ``headrace+ROUTING`` is the product's admission with another routing policy.

    Raises:
        ValueError: there is no such contender; the message lists them.
    """
    product, plus, routing = name.partition("+")
    if plus and product == PRODUCT:
        if routing not in ROUTINGS:
            raise ValueError(f"routing {routing!r:.60} is none of: {', '.join(sorted(ROUTINGS))}")
        contender = Contender(name, routing, admission=True)
    elif name in CONTENDERS:
        contender = CONTENDERS[name]
    else:
        raise ValueError(
            f"policy {name!r:.60} is none of: {', '.join(CONTENDERS)}, {PRODUCT}+ROUTING"
        )
    pools = []
    for pool in setup.pools:
        policy = pool.policy
        if not contender.admission:
            policy = unlimited(policy)
        if contender.routing is not None:
            policy = replace(policy, routing=contender.routing)
        pools.append(replace(pool, policy=policy))
    changed = replace(setup, pools=tuple(pools), target=setup.slo)
    if not contender.admission:
        changed = replace(
            changed, heavy=None, engine_priority=False, reported_slots=UNLIMITED_REQUESTS
        )
    if contender.routers is not None:
        changed = replace(changed, routers=contender.routers)
    if contender.snapshot_period_s is not None:
        changed = replace(changed, snapshot_period_s=contender.snapshot_period_s)
    return changed


def unlimited(policy: PoolPolicy) -> PoolPolicy:
    """Return the policy with everything sent to an engine at once, in order of arrival."""
    return arrival_order(
        replace(
            policy,
            max_concurrency_per_replica=UNLIMITED_REQUESTS,
            queue_capacity=UNLIMITED_REQUESTS,
            queue_timeout_s=UNLIMITED_S,
        )
    )
