"""The routing policies by name: what stands under ``routing`` in a pool's configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from serve_app.core.routing.affinity import AdapterLocality, SessionAffinity
from serve_app.core.routing.lengths import LengthGroups
from serve_app.core.routing.loads import KvQueueScore, LeastLoaded, PowerOfTwo, RoundRobin
from serve_app.core.routing.pools import HeavyPool, choose_pool
from serve_app.core.routing.prefixes import (
    AbandonAffinity,
    CacheAware,
    PrefixAffinity,
    PrefixAware,
    WeightedScore,
)
from serve_app.core.routing.settings import RandomSource, RoutingSettings

if TYPE_CHECKING:
    from serve_app.core.controller import RoutingPolicy
    from serve_app.core.policy import PoolPolicy

__all__ = [
    "ROUTINGS",
    "HeavyPool",
    "RandomSource",
    "RoutingSettings",
    "choose_pool",
    "make_routing",
    "routing_by_policy",
    "uses_prefixes",
]

ROUTINGS: Mapping[str, Callable[[RoutingSettings, RandomSource], RoutingPolicy]] = MappingProxyType(
    {
        "round_robin": lambda settings, random: RoundRobin(),
        "least_loaded": lambda settings, random: LeastLoaded(),
        "power_of_two": lambda settings, random: PowerOfTwo(random),
        "kv_queue": lambda settings, random: KvQueueScore(settings),
        "prefix_affinity": lambda settings, random: PrefixAffinity(settings),
        "session_affinity": lambda settings, random: SessionAffinity(settings),
        "adapter_locality": lambda settings, random: AdapterLocality(settings),
        "length_groups": lambda settings, random: LengthGroups(settings),
        "cache_aware": lambda settings, random: CacheAware(settings),
        "abandon_affinity": lambda settings, random: AbandonAffinity(settings),
        "weighted_score": WeightedScore,
    }
)


def make_routing(name: str, settings: RoutingSettings, random: RandomSource) -> RoutingPolicy:
    """Build the routing policy of one pool; ``random`` is drawn from by the policies that toss.

    Raises:
        ValueError: no policy has this name; the message lists those there are.
    """
    build = ROUTINGS.get(name)
    if build is None:
        raise ValueError(f"routing {name!r:.60} is none of: {', '.join(sorted(ROUTINGS))}")
    return build(settings, random)


def routing_by_policy(
    settings: RoutingSettings, random: RandomSource
) -> Callable[[PoolPolicy], RoutingPolicy]:
    """Return what a Controller builds its pools' routing with: the policy's own, by name.

    ``settings`` are those of pools that set none.
    """

    def build(policy: PoolPolicy) -> RoutingPolicy:
        return make_routing(policy.routing, policy.routing_settings or settings, random)

    return build


def uses_prefixes(routing: RoutingPolicy) -> bool:
    """Return whether a routing policy reads ``Ticket.prefix_hashes``."""
    return isinstance(routing, PrefixAware)
