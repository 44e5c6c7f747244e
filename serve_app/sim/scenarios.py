"""The six scenarios the policies are judged by: 8 simulated H100 replicas of an 8B model.

C is the knee of the scenario's own mix: TTFT p95 <= 1 s and TPOT p95 <= 50 ms, first come,
first served, by the least loaded replica (prefix-heavy: by the sticky one). ``KNEES`` holds
offered and good requests/s at the knee of the default fleet, as printed by
``headrace simulate --scenario NAME --find-knee``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from serve_app.core.policy import PoolPolicy
from serve_app.core.types import PriorityClass
from serve_app.sim.scalers import OngoingRequestsScaler
from serve_app.sim.setup import CHAT_POOL, Clients, Fault, FaultKind, PoolSetup, Setup
from serve_app.sim.workload import (
    Lengths,
    Prefixes,
    Traffic,
    day_shape,
)

CRITICAL, STANDARD, SHEDDABLE = PriorityClass
TENANTS = tuple(f"tenant-{number}" for number in range(20))
BURST_PROMPTS = Lengths(4_000, 0.1, 3_000, 5_000)
FLOOD_PROMPTS = Lengths(60_000, 0.4, 30_000, 120_000)
OWN_PROMPTS = Lengths(200, 0.8, 16, 2_000)
PREFIX_GROUPS, PREFIX_TOKENS, SEGMENT_TOKENS = 150, 6_144, 256
PREFIX_TENANTS = 10
DAY_S = 4_320.0
DURATION_S = 180.0
COOLDOWN_S = 40.0
KNEE_CONCURRENCY = 110
PREFILL_KNEE_TOKENS = 3_500
QUEUE_CAPACITY = 1_000
QUEUE_WAIT_SLOS = 0.9

KNEES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"chat": (118.0, 112.0), "burst": (65.0, 63.0), "prefix": (54.0, 54.0)}
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A system and its traffic.

    ``undisturbed`` is the traffic without the disturbance, None where there is none: the
    latencies of ``victims``, a kind of traffic, are compared between the two.
    """

    name: str
    summary: str
    mix: str
    setup: Setup
    streams: tuple[Traffic, ...]
    undisturbed: tuple[Traffic, ...] | None = None
    victims: str | None = None


def default_setup() -> Setup:
    """Return eight replicas of an 8B model, each on one H100, under the product's policies.

    Beside the sizes that follow from the knee only the longest wait differs from the
    policies' defaults: 0.9 of the TTFT target. Whoever waits longer is answered too late.
    """
    defaults = PoolPolicy()
    policy = PoolPolicy(
        max_concurrency_per_replica=KNEE_CONCURRENCY,
        prefill_knee_tokens=PREFILL_KNEE_TOKENS,
        queue_capacity=QUEUE_CAPACITY,
        routing="prefix_affinity",
        critical=replace(defaults.critical, queue_wait_slos=QUEUE_WAIT_SLOS),
        standard=replace(defaults.standard, queue_wait_slos=QUEUE_WAIT_SLOS),
        sheddable=replace(defaults.sheddable, queue_wait_slos=QUEUE_WAIT_SLOS),
    )
    pools = (PoolSetup(CHAT_POOL, policy),)
    return Setup(pools, duration_s=DURATION_S, cooldown_s=COOLDOWN_S)


def chat_mix(rate_per_s: float) -> tuple[Traffic, ...]:
    """Return chat of 20 equal tenants at a total rate."""
    return (Traffic("chat", rate_per_s, TENANTS),)


def burst_mix(rate_per_s: float) -> tuple[Traffic, ...]:
    """Return 20 tenants' chat and one at ten times a tenant's rate with 4k prompts."""
    each_per_s = rate_per_s / (len(TENANTS) + 10)
    return (
        Traffic("chat", each_per_s * len(TENANTS), TENANTS),
        Traffic("burst", each_per_s * 10, ("noisy",), prompts=BURST_PROMPTS),
    )


def prefix_mix(rate_per_s: float) -> tuple[Traffic, ...]:
    """Return 150 groups of prompts with 6k shared tokens, 15 groups to each of 10 tenants.

    The first tenant asks five times as much as any other.
    """
    parts = PREFIX_TENANTS + 4
    shared = Prefixes(PREFIX_GROUPS // PREFIX_TENANTS, PREFIX_TOKENS, SEGMENT_TOKENS)
    return tuple(
        Traffic(
            f"prefix-{place}",
            rate_per_s * (5 if place == 0 else 1) / parts,
            (f"tenant-{place}",),
            prompts=OWN_PROMPTS,
            prefixes=shared,
        )
        for place in range(PREFIX_TENANTS)
    )


MIXES: Mapping[str, Callable[[float], tuple[Traffic, ...]]] = MappingProxyType(
    {"chat": chat_mix, "burst": burst_mix, "prefix": prefix_mix}
)


def tenant_burst(setup: Setup, knee_per_s: float) -> Scenario:
    """1.5 C in all; from the warm-up on one tenant sends ten times the others' rate."""
    chat, burst = burst_mix(1.5 * knee_per_s)
    return Scenario(
        "tenant-burst",
        "20 tenants' chat, and one at 10x a tenant's rate with 4k prompts; 1.5 C in all",
        "burst",
        setup,
        (chat, replace(burst, start_s=setup.warmup_s / 2)),
        undisturbed=(chat,),
        victims="chat",
    )


def long_context_flood(setup: Setup, knee_per_s: float) -> Scenario:
    """0.7 C of chat, then 5 % of the requests with 30k to 120k tokens of context."""
    chat = chat_mix(0.7 * knee_per_s)
    rate_per_s = 0.7 * knee_per_s * 0.05 / 0.95
    flood = Traffic(
        "flood",
        rate_per_s,
        ("researcher",),
        prompts=FLOOD_PROMPTS,
        classes={SHEDDABLE: 1.0},
        start_s=setup.warmup_s / 2,
    )
    return Scenario(
        "long-context-flood",
        "0.7 C of chat, then 5 % of requests at 30k-120k tokens, Sheddable",
        "chat",
        setup,
        (*chat, flood),
        undisturbed=chat,
        victims="chat",
    )


def prefix_heavy(setup: Setup, knee_per_s: float) -> Scenario:
    """1.2 C of prompts with 6k shared tokens in 150 groups; one tenant asks 5x."""
    pools = tuple(
        replace(pool, engine=replace(pool.engine, blocks_per_hash=_blocks_per_hash(pool.engine)))
        for pool in setup.pools
    )
    return Scenario(
        "prefix-heavy",
        "1.2 C of prompts with 6k shared tokens in 150 groups; one of ten tenants asks 5x",
        "prefix",
        replace(setup, pools=pools),
        prefix_mix(1.2 * knee_per_s),
    )


def _blocks_per_hash(engine: object) -> int:
    return max(1, SEGMENT_TOKENS // int(getattr(engine, "block_tokens", 16)))


def diurnal(setup: Setup, knee_per_s: float) -> Scenario:
    """A day's shape from 0.2 to 1.3 C in 72 minutes; replicas start in an unscaled 120 s."""
    chat = chat_mix(1.3 * knee_per_s)
    shaped = tuple(replace(each, shape=day_shape(DAY_S, 0.2, 1.3)) for each in chat)
    pool = setup.pools[0]
    scaler = partial(
        OngoingRequestsScaler,
        target_ongoing=64.0,
        least=2,
        most=2 * pool.replicas,
        # The day is 20 times as fast: so are the delays, but not the cold start.
        period_s=5.0,
        upscale_delay_s=5.0,
        downscale_delay_s=30.0,
    )
    return Scenario(
        "diurnal",
        "a day's shape from 0.2 to 1.3 C, 20 times as fast, cold start 120 s",
        "chat",
        replace(setup, duration_s=DAY_S, scaler=scaler),
        shaped,
    )


def overload(setup: Setup, knee_per_s: float) -> Scenario:
    """2 C at 20/30/50 % Critical/Standard/Sheddable; clients retry three times."""
    classes = {CRITICAL: 0.2, STANDARD: 0.3, SHEDDABLE: 0.5}
    return _overload("overload", setup, knee_per_s, classes)


def overload_standard(setup: Setup, knee_per_s: float) -> Scenario:
    """2 C at 20/50/30 %: Critical and Standard alone exceed the knee by 40 %."""
    classes = {CRITICAL: 0.2, STANDARD: 0.5, SHEDDABLE: 0.3}
    return _overload("overload-standard", setup, knee_per_s, classes)


def _overload(
    name: str, setup: Setup, knee_per_s: float, classes: Mapping[PriorityClass, float]
) -> Scenario:
    shares = "/".join(f"{100 * share:.0f}" for share in classes.values())
    return Scenario(
        name,
        f"2 C at {shares} % Critical/Standard/Sheddable; clients retry 3x, patience 10 s",
        "chat",
        replace(setup, clients=Clients(retries_max=3, patience_s=10.0, obedient_ratio=0.5)),
        (Traffic("chat", 2.0 * knee_per_s, TENANTS, classes=classes),),
    )


def engine_faults(setup: Setup, knee_per_s: float) -> Scenario:
    """0.75 C while engines are killed, drained, hung, and lose their prefill."""
    faults = (
        Fault(40.0, FaultKind.KILL, replica=0),
        Fault(70.0, FaultKind.PREFILL, replica=1, duration_s=20.0),
        Fault(180.0, FaultKind.DRAIN, replica=2, duration_s=120.0),
        Fault(330.0, FaultKind.HANG, replica=3, duration_s=15.0),
    )
    classes = {CRITICAL: 0.2, STANDARD: 0.5, SHEDDABLE: 0.3}
    return Scenario(
        "engine-faults",
        "0.75 C; a kill, a broken prefill, a 120 s drain, a hang with live metrics",
        "chat",
        replace(
            setup,
            duration_s=480.0,
            faults=faults,
            clients=Clients(retries_max=3, patience_s=10.0, obedient_ratio=1.0),
        ),
        (Traffic("chat", 0.75 * knee_per_s, TENANTS, classes=classes),),
    )


SCENARIOS: Mapping[str, Callable[[Setup, float], Scenario]] = MappingProxyType(
    {
        "tenant-burst": tenant_burst,
        "long-context-flood": long_context_flood,
        "prefix-heavy": prefix_heavy,
        "overload": overload,
        "overload-standard": overload_standard,
        "engine-faults": engine_faults,
        "diurnal": diurnal,
    }
)
MIX_OF: Mapping[str, str] = MappingProxyType({"tenant-burst": "burst", "prefix-heavy": "prefix"})


def build_scenario(
    name: str, setup: Setup, knee_per_s: float | None = None, duration_s: float | None = None
) -> Scenario:
    """Return a scenario on a system, at the knee given or that of the default fleet.

    ``duration_s`` shortens or lengthens it; faults beyond the end do not happen.

    Raises:
        ValueError: there is no such scenario; the message lists them.
    """
    build = SCENARIOS.get(name)
    if build is None:
        raise ValueError(f"scenario {name!r:.60} is none of: {', '.join(SCENARIOS)}")
    if knee_per_s is None:
        knee_per_s = KNEES[MIX_OF.get(name, "chat")][0]
    scenario = build(setup, knee_per_s)
    if duration_s is None:
        return scenario
    return replace(scenario, setup=replace(scenario.setup, duration_s=duration_s))
