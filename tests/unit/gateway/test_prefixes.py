"""Hashes of prompt beginnings: what they share, what they cost at most."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.gateway.prefixes import BLOCK_BYTES, BLOCKS_MAX, prefix_hashes


@given(st.binary(max_size=400), st.binary(max_size=400), st.binary(max_size=400))
def test_two_prompts_share_the_hashes_of_their_common_full_blocks_only(
    common: bytes, one: bytes, other: bytes
) -> None:
    first, second = prefix_hashes(common + one, "salt"), prefix_hashes(common + other, "salt")
    pairs = zip(common + one, common + other, strict=False)
    shared = next((n for n, (a, b) in enumerate(pairs) if a != b), len(common))
    shared = max(shared, min(len(common + one), len(common + other)) if one == other else shared)
    matching = sum(a == b for a, b in zip(first, second, strict=False))

    assert len(first) == len(common + one) // BLOCK_BYTES
    assert matching >= len(common) // BLOCK_BYTES
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        end = (place + 1) * BLOCK_BYTES
        assert (a == b) == ((common + one)[:end] == (common + other)[:end])


def test_tenants_have_no_hash_in_common() -> None:
    text = b"the same system prompt for everybody " * 50

    assert not set(prefix_hashes(text, "one")) & set(prefix_hashes(text, "two"))


def test_equal_blocks_at_different_places_differ() -> None:
    hashes = prefix_hashes(b"x" * (20 * BLOCK_BYTES), "salt")

    assert len(set(hashes)) == 20


def test_a_huge_prompt_costs_no_more_than_the_bound() -> None:
    assert len(prefix_hashes(bytes(2**20), "salt")) == BLOCKS_MAX
    assert prefix_hashes(b"short", "salt") == ()
