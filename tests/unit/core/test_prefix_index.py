"""The prefix index against a naive model, its bounds, and forgetting."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.prefix_index import PrefixIndex
from serve_app.core.types import ReplicaId
from tests.properties import examples

REPLICAS = [ReplicaId(name) for name in ("a", "b", "c")]
CAPACITY_BLOCKS = 8


def chain(blocks: list[int]) -> tuple[int, ...]:
    """Hash blocks so that each hash covers all before it."""
    hashes: list[int] = []
    previous = 0
    for block in blocks:
        previous = hash((previous, block))
        hashes.append(previous)
    return tuple(hashes)


class NaiveIndex:
    """One LRU set per replica and a linear walk: slow and obviously right."""

    def __init__(self) -> None:
        self.recent: dict[ReplicaId, OrderedDict[int, None]] = {}

    def record(self, replica: ReplicaId, hashes: tuple[int, ...]) -> None:
        recent = self.recent.setdefault(replica, OrderedDict())
        for block in reversed(hashes[:CAPACITY_BLOCKS]):
            recent.pop(block, None)
            recent[block] = None
        while len(recent) > CAPACITY_BLOCKS:
            recent.popitem(last=False)

    def match(self, hashes: tuple[int, ...]) -> dict[ReplicaId, int]:
        matches = {}
        for replica, recent in self.recent.items():
            depth = 0
            while depth < len(hashes) and hashes[depth] in recent:
                depth += 1
            if depth:
                matches[replica] = depth
        return matches


prompts = st.lists(st.integers(0, 2), max_size=12).map(chain)
events = st.one_of(
    st.tuples(st.just("record"), st.sampled_from(REPLICAS), prompts),
    st.tuples(st.just("forget"), st.sampled_from(REPLICAS), st.just(())),
    st.tuples(st.just("match"), st.just(REPLICAS[0]), prompts),
)


@given(st.lists(events, max_size=60))
@examples(300)
def test_agrees_with_a_naive_index_after_any_history(history: list) -> None:
    index, naive = PrefixIndex(CAPACITY_BLOCKS), NaiveIndex()
    for kind, replica, hashes in history:
        if kind == "record":
            index.record(replica, hashes)
            naive.record(replica, hashes)
        elif kind == "forget":
            index.forget(replica)
            naive.recent.pop(replica, None)
        else:
            assert index.match(hashes) == naive.match(hashes)
        for each in REPLICAS:
            assert index.blocks(each) == len(naive.recent.get(each, ())) <= CAPACITY_BLOCKS
        held = {block for recent in naive.recent.values() for block in recent}
        assert len(index) == len(held)


def test_a_returning_conversation_matches_all_it_sent_before() -> None:
    index = PrefixIndex(100)
    index.record(REPLICAS[0], chain([1, 2, 3]))
    assert index.match(chain([1, 2, 3, 4])) == {REPLICAS[0]: 3}
    assert index.match(chain([2, 2, 3])) == {}
    assert index.match(()) == {}


def test_the_shared_beginning_outlives_the_ends_of_old_prompts() -> None:
    index = PrefixIndex(4)
    for end in range(20):
        index.record(REPLICAS[0], chain([7, 8, end]))
    assert index.match(chain([7, 8, 999])) == {REPLICAS[0]: 2}
    assert index.blocks(REPLICAS[0]) == 4


def test_a_forgotten_replica_leaves_nothing_and_its_place_is_reused() -> None:
    index = PrefixIndex(100)
    for number in range(1000):
        replica = ReplicaId(f"replica-{number}")
        index.record(replica, chain([1, 2, number]))
        assert index.match(chain([1, 2])) == {replica: 2}
        index.forget(replica)
    index.forget(ReplicaId("never seen"))
    assert len(index) == 0
    assert index.replicas() == frozenset()


def test_a_capacity_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_blocks"):
        PrefixIndex(0)
