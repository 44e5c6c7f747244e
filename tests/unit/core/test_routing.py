"""Each routing policy does what its docstring says, and all rank permutations."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.routing import ROUTINGS, HeavyPool, RoutingSettings, choose_pool, make_routing
from serve_app.core.saturation import Replica
from serve_app.core.types import (
    KeyId,
    PoolName,
    PriorityClass,
    ReplicaId,
    ReplicaView,
    RequestId,
    TenantId,
    Ticket,
)
from tests.properties import examples

POOL = PoolName("chat")
PROMPT_BLOCKS = 10


def ticket(
    number: int = 0,
    *,
    prefix: tuple[int, ...] = (),
    prompt_tokens: int = 1600,
    session: str | None = None,
    adapter: str | None = None,
) -> Ticket:
    return Ticket(
        RequestId(f"request-{number}"),
        POOL,
        TenantId("tenant"),
        KeyId("key"),
        PriorityClass.STANDARD,
        prompt_tokens,
        max_tokens=100,
        prefix_hashes=prefix,
        session=session,
        adapter=adapter,
    )


def replica(
    name: str,
    load: int = 0,
    *,
    waiting: int = 0,
    kv_ratio: float = 0.0,
    tokens: int = 0,
    adapters: tuple[str, ...] = (),
) -> Replica:
    view = ReplicaView(
        ReplicaId(name),
        POOL,
        sequence=1,
        slots=256,
        running=load,
        waiting=waiting,
        kv_usage_ratio=kv_ratio,
        kv_tokens_capacity=400_000,
        in_flight_tokens=(0, tokens, 0),
        adapters=adapters,
    )
    return Replica(view, 0.0)


def prompt(group: int, end: int = 0) -> tuple[int, ...]:
    """Chained hashes of a prompt: nine blocks shared by the group, one of its own."""
    shared = [group * 1000 + depth for depth in range(PROMPT_BLOCKS - 1)]
    return (*shared, group * 1000 + 100 + end)


def build(name: str, seed: int = 0, **changes: float) -> object:
    return make_routing(name, RoutingSettings(**changes), random.Random(seed))


def place(policy, request: Ticket, candidates: list[Replica]) -> ReplicaId:
    """Rank, take the first, and tell the policy, as the controller does."""
    chosen = policy.rank(request, candidates, 0.0)[0]
    policy.placed(request, chosen, 0.0)
    return chosen


loads = st.builds(
    replica,
    st.just(""),
    st.integers(0, 300),
    waiting=st.integers(0, 50),
    kv_ratio=st.floats(0, 1),
    tokens=st.integers(0, 2_000_000),
    adapters=st.lists(st.sampled_from("xyz"), max_size=3, unique=True).map(tuple),
)
fleets = st.lists(loads, min_size=1, max_size=9).map(
    lambda fleet: [renamed(each, f"r{place}") for place, each in enumerate(fleet)]
)
tickets = st.builds(
    lambda number, group, blocks, session, adapter: ticket(
        number, prefix=prompt(group, number)[:blocks], session=session, adapter=adapter
    ),
    st.integers(0, 50),
    st.integers(0, 3),
    st.integers(0, PROMPT_BLOCKS),
    st.none() | st.sampled_from(["alice", "bob"]),
    st.none() | st.sampled_from("xyz"),
)


def renamed(each: Replica, name: str) -> Replica:
    each.id = ReplicaId(name)
    return each


@pytest.mark.parametrize("name", sorted(ROUTINGS))
@given(st.lists(st.tuples(tickets, fleets, st.booleans()), min_size=1, max_size=8))
@examples(25)
def test_every_rank_is_a_permutation_of_the_candidates(name: str, history: list) -> None:
    policy = build(name)
    for request, fleet, lose in history:
        ranked = policy.rank(request, fleet, 0.0)
        assert sorted(ranked) == sorted(each.id for each in fleet)
        policy.placed(request, ranked[0], 0.0)
        for each in fleet:
            assert 0 <= policy.overlap_tokens(request, each.id) <= request.prompt_tokens
        if lose:
            policy.forgotten(ranked[0])
            assert policy.overlap_tokens(request, ranked[0]) == 0


@pytest.mark.parametrize("name", sorted(ROUTINGS))
def test_the_same_seed_gives_the_same_placements(name: str) -> None:
    def run() -> list[ReplicaId]:
        policy = build(name, seed=7)
        fleet = [replica(f"r{place}", load=place % 3) for place in range(8)]
        requests = [ticket(n, prefix=prompt(n % 5, n), session=f"s{n % 4}") for n in range(50)]
        return [place(policy, request, fleet) for request in requests]

    assert run() == run()


def test_an_unknown_policy_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fastest' is none of: .*least_loaded"):
        build("fastest")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefix_capacity_blocks", 0),
        ("prefill_tokens_per_s", 0.0),
        ("tokens_per_s", float("nan")),
        ("sticky_hit_ratio", 1.5),
        ("cache_hit_ratio", 0.0),
        ("sticky_gap_s", float("nan")),
        ("session_load_factor", 0.9),
        ("kv_weight", -1.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        RoutingSettings(**{field: value})


def test_round_robin_visits_all_and_a_full_replica_keeps_its_turn() -> None:
    policy = build("round_robin")
    fleet = [replica(name) for name in "abc"]
    assert [place(policy, ticket(), fleet) for _ in range(6)] == list("abcabc")
    assert [place(policy, ticket(), fleet[1:]) for _ in range(3)] == list("bcb")
    assert place(policy, ticket(), fleet) == "a"


def test_least_loaded_breaks_ties_by_tokens() -> None:
    policy = build("least_loaded")
    fleet = [replica("a", 3), replica("b", 2, tokens=500), replica("c", 2, tokens=100)]
    assert policy.rank(ticket(), fleet, 0.0) == ["c", "b", "a"]


def test_power_of_two_never_takes_the_most_loaded_and_spreads_the_rest() -> None:
    policy = build("power_of_two")
    fleet = [replica(f"r{load}", load) for load in range(8)]
    chosen = Counter(place(policy, ticket(), fleet) for _ in range(2000))
    assert chosen["r7"] == 0
    assert chosen["r0"] == pytest.approx(2000 * 2 / 8, rel=0.15)
    assert chosen["r6"] == pytest.approx(2000 * 2 / 56, rel=0.5)


def test_kv_barrier_outweighs_the_queue_only_near_a_full_cache() -> None:
    policy = build("kv_queue", tokens_per_s=10_000)
    half_full = [replica("busy", tokens=10_000), replica("half", tokens=0, kv_ratio=0.5)]
    nearly_full = [replica("busy", tokens=10_000), replica("full", tokens=0, kv_ratio=0.95)]
    assert policy.rank(ticket(), half_full, 0.0)[0] == "half"
    assert policy.rank(ticket(), nearly_full, 0.0)[0] == "busy"


@pytest.mark.parametrize("name", ["prefix_affinity", "cache_aware", "abandon_affinity"])
def test_a_group_returns_to_its_replica_while_loads_are_in_line(name: str) -> None:
    policy = build(name)
    fleet = [replica(place, 10) for place in "abcd"]
    homes = [place(policy, ticket(prefix=prompt(group)), [fleet[group]]) for group in range(4)]
    for number in range(1, 40):
        group = number % 4
        request = ticket(number, prefix=prompt(group, number))
        assert place(policy, request, fleet) == homes[group]


def test_affinity_ends_when_the_wait_exceeds_the_gap_and_returns_after() -> None:
    policy = build("prefix_affinity", sticky_gap_s=0.3, prefill_tokens_per_s=10_000)
    home, other = replica("home"), replica("other")
    place(policy, ticket(prefix=prompt(1)), [home])
    request = ticket(1, prefix=prompt(1, 1))
    home.own_uncached_prompt_tokens = 4_400  # 0.44 s of wait here against 0.16 s of prefill there
    assert policy.rank(request, [home, other], 0.0)[0] == "home"
    home.own_uncached_prompt_tokens = 4_700
    assert policy.rank(request, [home, other], 0.0)[0] == "other"
    home.own_uncached_prompt_tokens = 0
    assert policy.rank(request, [home, other], 0.0)[0] == "home"


def test_routers_that_share_nothing_agree_on_the_home_of_a_new_prompt_within_the_gap() -> None:
    fleet = [replica(name) for name in "abcdefgh"]
    for group in range(20):
        homes = {build("prefix_affinity").rank(ticket(prefix=prompt(group)), fleet, 0.0)[0]}
        homes.add(build("prefix_affinity").rank(ticket(prefix=prompt(group, 5)), fleet, 0.0)[0])
        assert len(homes) == 1
        (home,) = (each for each in fleet if each.id in homes)
        home.own_uncached_prompt_tokens = 33_000
        first = build("prefix_affinity").rank(ticket(prefix=prompt(group)), fleet, 0.0)[0]
        assert first != home.id
        home.own_uncached_prompt_tokens = 0


def test_affinity_picks_the_holder_with_the_least_uncached_work() -> None:
    policy = build("prefix_affinity")
    first, second, cold = replica("first"), replica("second"), replica("cold")
    for holder in (first, second):
        policy.placed(ticket(prefix=prompt(1)), holder.id, 0.0)
    first.own_uncached_prompt_tokens = 500
    request = ticket(1, prefix=prompt(1, 1))
    assert policy.rank(request, [first, second, cold], 0.0)[0] == "second"


def test_overlap_is_the_shared_share_of_the_prompt() -> None:
    policy = build("prefix_affinity")
    policy.placed(ticket(prefix=prompt(1)), ReplicaId("home"), 0.0)
    request = ticket(1, prefix=prompt(1, 1), prompt_tokens=1600)
    assert policy.overlap_tokens(request, ReplicaId("home")) == 1440
    assert policy.overlap_tokens(request, ReplicaId("other")) == 0
    policy.forgotten(ReplicaId("home"))
    assert policy.overlap_tokens(request, ReplicaId("home")) == 0


def test_cache_aware_goes_by_load_only_when_both_imbalance_rules_hold() -> None:
    policy = build("cache_aware", imbalance_requests=64, imbalance_factor=1.5)
    place(policy, ticket(prefix=prompt(1)), [replica("home")])
    request = ticket(1, prefix=prompt(1, 1))
    assert policy.rank(request, [replica("home", 64), replica("other", 0)], 0.0)[0] == "home"
    assert policy.rank(request, [replica("home", 65), replica("other", 0)], 0.0)[0] == "other"
    assert policy.rank(request, [replica("home", 265), replica("other", 200)], 0.0)[0] == "home"


def test_cache_aware_sends_misses_to_the_least_loaded() -> None:
    policy = build("cache_aware")
    place(policy, ticket(prefix=prompt(1)), [replica("home")])
    fleet = [replica("home", 5), replica("busy", 9), replica("idle", 1)]
    assert policy.rank(ticket(1, prefix=prompt(2)), fleet, 0.0)[0] == "idle"


def test_abandon_affinity_skips_a_match_beyond_two_sigma() -> None:
    policy = build("abandon_affinity", abandon_gap_requests=16)
    place(policy, ticket(prefix=prompt(1)), [replica("home")])
    request = ticket(1, prefix=prompt(1, 1))
    others = [replica(f"r{place}", 1) for place in range(8)]
    assert policy.rank(request, [replica("home", 1), *others], 0.0)[0] == "home"
    outlier = [replica("home", 12), *others]
    assert policy.rank(request, outlier, 0.0)[0] != "home"
    assert policy.rank(request, outlier, 0.0)[-1] == "home"
    assert policy.rank(request, [replica("home", 18), replica("r", 1)], 0.0)[0] == "r"


def test_weighted_score_trades_prefix_against_queue_and_kv() -> None:
    policy = build("weighted_score")
    policy.placed(ticket(prefix=prompt(1)), ReplicaId("home"), 0.0)
    request = ticket(1, prefix=prompt(1, 1))
    prefix_wins = [replica("home", waiting=5), replica("idle", waiting=0)]
    assert policy.rank(request, prefix_wins, 0.0)[0] == "home"
    both_lose = [replica("home", waiting=5, kv_ratio=0.9), replica("idle", waiting=0)]
    assert policy.rank(request, both_lose, 0.0)[0] == "idle"


def test_weighted_score_does_not_see_what_was_sent_since_the_snapshot() -> None:
    policy = build("weighted_score")
    flooded, busy = replica("flooded", waiting=0), replica("busy", waiting=1)
    flooded.own = 100
    assert policy.rank(ticket(), [flooded, busy], 0.0)[0] == "flooded"


def test_a_session_returns_until_its_replica_is_overloaded() -> None:
    policy = build("session_affinity")
    fleet = [replica(f"r{place}", 10) for place in range(6)]
    home, second = policy.rank(ticket(session="alice"), fleet, 0.0)[:2]
    for number in range(20):
        assert policy.rank(ticket(number, session="alice"), fleet, 0.0)[0] == home
    crowded = [replica(each.id, 40 if each.id == home else 10) for each in fleet]
    assert policy.rank(ticket(session="alice"), crowded, 0.0)[0] == second


def test_losing_a_replica_moves_only_its_own_sessions() -> None:
    policy = build("session_affinity")
    fleet = [replica(f"r{place}", 10) for place in range(6)]
    sessions = [f"session-{number}" for number in range(200)]
    before = {each: policy.rank(ticket(session=each), fleet, 0.0)[0] for each in sessions}
    after = {each: policy.rank(ticket(session=each), fleet[1:], 0.0)[0] for each in sessions}
    moved = {each for each in sessions if before[each] != after[each]}
    assert moved == {each for each in sessions if before[each] == "r0"}
    assert 15 <= len(moved) <= 60


def test_sessionless_requests_go_by_load() -> None:
    policy = build("session_affinity")
    assert policy.rank(ticket(), [replica("a", 4), replica("b", 2)], 0.0)[0] == "b"


def test_an_adapter_goes_where_it_is_resident_then_to_a_free_slot() -> None:
    policy = build("adapter_locality", adapter_slots=2)
    full = replica("full", 1, adapters=("p", "q"))
    free = replica("free", 3, adapters=("p",))
    resident = replica("resident", 9, adapters=("x", "q"))
    ranked = policy.rank(ticket(adapter="x"), [full, free, resident], 0.0)
    assert ranked == ["resident", "free", "full"]
    assert policy.rank(ticket(), [full, free, resident], 0.0)[0] == "full"


def test_an_adapter_being_loaded_is_not_loaded_again_elsewhere() -> None:
    policy = build("adapter_locality", adapter_slots=2)
    fleet = [replica("a"), replica("b")]
    home = place(policy, ticket(adapter="x"), fleet)
    for number in range(10):
        assert place(policy, ticket(number, adapter="x"), fleet) == home
    crowded = [replica(each.id, 17 if each.id == home else 0) for each in fleet]
    assert place(policy, ticket(adapter="x"), crowded) != home


def test_short_and_long_prompts_prefer_different_replicas_within_the_gap() -> None:
    policy = build("length_groups", long_prompt_tokens=1_000, length_gap_requests=10)
    fleet = [replica("a", 5), replica("b", 5), replica("c", 9), replica("d", 9)]
    assert policy.rank(ticket(prompt_tokens=100), fleet, 0.0) == ["a", "b", "c", "d"]
    assert policy.rank(ticket(prompt_tokens=5_000), fleet, 0.0) == ["c", "d", "a", "b"]
    for _ in range(3_000):
        policy.placed(ticket(prompt_tokens=5_000), ReplicaId("c"), 0.0)
    assert policy.rank(ticket(prompt_tokens=5_000), fleet, 0.0)[-1] == "a"
    crowded = [replica("a", 5), replica("b", 15), replica("c", 15), replica("d", 15)]
    assert policy.rank(ticket(prompt_tokens=5_000), crowded, 0.0)[0] == "a"


def test_long_contexts_go_to_the_heavy_pool_and_the_limit_itself_stays() -> None:
    heavy = HeavyPool(PoolName("heavy"), threshold_tokens=32_000)
    assert choose_pool(POOL, 32_000, heavy) == POOL
    assert choose_pool(POOL, 32_001, heavy) == "heavy"
    assert choose_pool(POOL, 32_001, None) == POOL
    with pytest.raises(ValueError, match="threshold_tokens"):
        HeavyPool(PoolName("heavy"), 0)
