"""Who bears the time in which a replica had nothing to do: three policies, always one column.

    unallocated     nobody: idle time is shown and stays the platform's
    by_use          each tenant in proportion to what its requests truly cost
    by_reservation  each tenant in proportion to the capacity kept for it

Idle time is never folded into what requests cost: under every policy it is a column of its
own, and the column sums to what was idle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from serve_app.core.attribution import shares_ns
from serve_app.core.types import TenantId


class IdlePolicy(StrEnum):
    """Who bears a pool's idle time."""

    UNALLOCATED = "unallocated"
    BY_USE = "by_use"
    BY_RESERVATION = "by_reservation"


@dataclass(frozen=True, slots=True)
class IdleRule:
    """A pool's policy; ``reserved`` is the capacity kept for each tenant, in any whole unit."""

    policy: IdlePolicy = IdlePolicy.UNALLOCATED
    reserved: Mapping[TenantId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IdleShares:
    """An idle amount divided: ``tenants`` and ``unallocated`` sum to it."""

    tenants: Mapping[TenantId, int]
    unallocated: int


def share_idle(
    amount: int,
    policy: IdlePolicy,
    *,
    used: Mapping[TenantId, int],
    reserved: Mapping[TenantId, int],
) -> IdleShares:
    """Divide an idle ``amount``, nanoseconds or nano-dollars, over tenants by ``policy``.

    ``used`` is what each tenant's requests cost, ``reserved`` the capacity kept for it, each
    in any unit of its own, whole and not negative. Every share is within one of its exact
    value and a tenant of no weight bears nothing. Where nobody has a weight, an hour without
    a request or a pool without reservations, the amount stays unallocated.
    """
    assert amount >= 0
    if policy is IdlePolicy.UNALLOCATED:
        return IdleShares({}, amount)
    weights = used if policy is IdlePolicy.BY_USE else reserved
    bearing = {tenant: weights[tenant] for tenant in sorted(weights) if weights[tenant]}
    if not bearing:
        return IdleShares({}, amount)
    shares = shares_ns(amount, list(bearing.values()), 0)
    return IdleShares(dict(zip(bearing, shares, strict=True)), 0)
