"""Idle replica time over tenants, pool by pool, as each pool's rule has it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Connection

from serve_app.core.idle import IdleRule, share_idle
from serve_app.core.true_cost import InstancePrice, Overhead, split
from serve_app.core.types import TenantId
from serve_app.ledger.costs import split_hours
from serve_app.usage_report import UsageQuery

UNALLOCATED: Final = IdleRule()


@dataclass(slots=True)
class IdleCosts:
    """Idle nano-dollars by who bears them; ``tenants`` and ``unallocated`` sum to all of it.

    ``rows`` is what tenants bear by the columns that were asked for, and sums to ``tenants``.
    """

    tenants: dict[TenantId, int] = field(default_factory=lambda: defaultdict(int))
    rows: dict[tuple[Any, ...], int] = field(default_factory=lambda: defaultdict(int))
    unallocated: int = 0


def read_idle(
    connection: Connection,
    query: UsageQuery,
    instances: Mapping[str, InstancePrice],
    rules: Mapping[str, IdleRule],
    idle: Mapping[tuple[str, int], int],
) -> IdleCosts:
    """Return who bears what the idle time of the hours of ``query`` cost, in nano-dollars.

    ``idle`` is that cost by pool and hour. A pool's idle time is divided over all the hours
    at once: what an hour without a request cost is borne by those who use the pool in
    others. A tenant's part is then by hour what the hours' idle time is of the whole, and
    by model what the tenant's use of the pool is; without any use it is no model's.
    """
    used = _used(connection, query, instances) if rules else {}
    found = IdleCosts()
    for pool in sorted({pool for pool, _ in idle}):
        hours = {hour: cost for (name, hour), cost in sorted(idle.items()) if name == pool}
        models = used.get(pool, {})
        rule = rules.get(pool, UNALLOCATED)
        shares = share_idle(
            sum(hours.values()),
            rule.policy,
            used={tenant: sum(costs.values()) for tenant, costs in models.items()},
            reserved=rule.reserved,
        )
        found.unallocated += shares.unallocated
        for tenant, share in shares.tenants.items():
            found.tenants[tenant] += share
            costs = models.get(tenant, {})
            cells = _cells(query.by, tenant, hours, costs if any(costs.values()) else {"": 1})
            parts = split(share, list(cells.values()))
            for key, part in zip(cells, parts, strict=True):
                found.rows[key] += part
    return found


def _used(
    connection: Connection, query: UsageQuery, instances: Mapping[str, InstancePrice]
) -> dict[str, dict[TenantId, dict[str, int]]]:
    """Return what requests cost by pool, tenant and model."""
    used: dict[str, dict[TenantId, dict[str, int]]] = {}
    for each in split_hours(connection, query, ("tenant", "model"), instances):
        tenants = used.setdefault(each.cost.hour.pool, {})
        for part in each.cost.parts:
            if not isinstance(part.key, Overhead):
                tenant, model = map(str, part.key)
                models = tenants.setdefault(TenantId(tenant), {})
                models[model] = models.get(model, 0) + (part.cost_nanousd or 0)
    return used


def _cells(
    by: Sequence[str], tenant: str, hours: Mapping[int, int], models: Mapping[str, int]
) -> dict[tuple[Any, ...], int]:
    """Return a report's rows that a tenant's part falls into, with their weights."""
    cells: dict[tuple[Any, ...], int] = {}
    for hour, idle in hours.items() if "hour" in by else ((0, 1),):
        for model, cost in sorted(models.items()) if "model" in by else (("", 1),):
            names: dict[str, Any] = {"tenant": tenant, "model": model, "hour": hour}
            cells[tuple(names.get(name) for name in by)] = idle * cost
    return cells
