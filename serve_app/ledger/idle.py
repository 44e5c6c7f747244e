"""Idle replica time over tenants, pool by pool, as each pool's rule has it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from sqlalchemy import Connection

from serve_app.core.idle import IdleRule, IdleShares, share_idle
from serve_app.core.true_cost import InstancePrice, Overhead
from serve_app.core.types import TenantId
from serve_app.ledger.costs import split_hours
from serve_app.usage_report import UsageQuery

UNALLOCATED: Final = IdleRule()


def read_idle(
    connection: Connection,
    query: UsageQuery,
    instances: Mapping[str, InstancePrice],
    rules: Mapping[str, IdleRule],
) -> IdleShares:
    """Return who bears what the idle time of the hours of ``query`` cost, in nano-dollars.

    Shares and what is unallocated sum to the idle cost of every pool together. A pool's
    idle time is divided over all the hours at once: what an hour without a request cost is
    borne by those who use the pool in others.
    """
    idle: dict[str, int] = defaultdict(int)
    used: dict[str, dict[TenantId, int]] = defaultdict(lambda: defaultdict(int))
    for each in split_hours(connection, query, ("tenant",), instances):
        pool = each.cost.hour.pool
        for part in each.cost.parts:
            if part.key is Overhead.IDLE:
                idle[pool] += part.cost_nanousd or 0
            elif not isinstance(part.key, Overhead):
                used[pool][TenantId(str(part.key[0]))] += part.cost_nanousd or 0
    tenants: dict[TenantId, int] = defaultdict(int)
    unallocated = 0
    for pool, amount in idle.items():
        rule = rules.get(pool, UNALLOCATED)
        shares = share_idle(amount, rule.policy, used=used[pool], reserved=rule.reserved)
        unallocated += shares.unallocated
        for tenant, share in shares.tenants.items():
            tenants[tenant] += share
    return IdleShares(tenants, unallocated)
