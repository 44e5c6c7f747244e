"""Arrivals repeat for a seed, keep their rates, and streams don't disturb each other."""

from __future__ import annotations

from collections import Counter
from statistics import fmean, median

import pytest

from serve_app.core.types import PriorityClass
from serve_app.sim.workload import (
    CHAT_OUTPUTS,
    CHAT_PROMPTS,
    Prefixes,
    Traffic,
    arrivals,
    day_shape,
)

CHAT = Traffic("chat", 50.0, ("a", "b"))
BURST = Traffic("burst", 30.0, ("noisy",), start_s=10.0, end_s=20.0)


def test_a_seed_repeats_and_another_differs() -> None:
    assert list(arrivals([CHAT], 20.0, 1)) == list(arrivals([CHAT], 20.0, 1))
    assert list(arrivals([CHAT], 20.0, 1)) != list(arrivals([CHAT], 20.0, 2))


def test_adding_a_stream_leaves_the_others_arrivals_untouched() -> None:
    mixed = list(arrivals([CHAT, BURST], 30.0, 3))
    assert [each for each in mixed if each.kind == "chat"] == list(arrivals([CHAT], 30.0, 3))
    times = [each.arrival_s for each in mixed]
    assert times == sorted(times)
    assert {10.0 <= each.arrival_s < 20.0 for each in mixed if each.kind == "burst"} == {True}


def test_rates_lengths_and_tenants_are_as_asked() -> None:
    drawn = list(arrivals([CHAT], 400.0, 4))
    assert len(drawn) == pytest.approx(20_000, rel=0.03)
    assert median(each.prompt_tokens for each in drawn) == pytest.approx(757, rel=0.05)
    # The published trace's means: 1,155 context and 211 generated tokens.
    assert fmean(each.prompt_tokens for each in drawn) == pytest.approx(1155, rel=0.05)
    assert fmean(each.output_tokens for each in drawn) == pytest.approx(211, rel=0.05)
    assert Counter(each.tenant for each in drawn)["a"] == pytest.approx(10_000, rel=0.05)
    for each in drawn:
        assert CHAT_PROMPTS.least_tokens <= each.prompt_tokens <= CHAT_PROMPTS.most_tokens
        assert CHAT_OUTPUTS.least_tokens <= each.output_tokens <= each.max_tokens


def test_classes_are_drawn_by_share() -> None:
    shares = {PriorityClass.CRITICAL: 0.2, PriorityClass.SHEDDABLE: 0.8}
    drawn = list(arrivals([Traffic("mixed", 100.0, classes=shares)], 100.0, 5))
    critical = sum(each.priority_class is PriorityClass.CRITICAL for each in drawn)
    assert critical / len(drawn) == pytest.approx(0.2, abs=0.02)


def test_a_group_shares_its_prefix_and_nothing_else() -> None:
    traffic = Traffic("grouped", 100.0, prefixes=Prefixes(3, 1024, 256))
    drawn = list(arrivals([traffic], 20.0, 6))
    heads = Counter(each.prefix_hashes[:4] for each in drawn)
    assert len(heads) == 3
    tails = [each.prefix_hashes[4:] for each in drawn if len(each.prefix_hashes) > 4]
    assert len(set(tails)) == len(tails)
    for each in drawn:
        assert each.prompt_tokens >= 1024
        assert len(each.prefix_hashes) * 256 <= each.prompt_tokens


def test_a_day_has_its_trough_at_four_and_its_peak_at_sixteen() -> None:
    shape = day_shape(2400.0, 0.2, 1.3)
    assert shape(400.0) == pytest.approx(0.2 / 1.3)
    assert shape(1600.0) == pytest.approx(1.0)
    shaped = Traffic("day", 100.0, shape=shape)
    drawn = list(arrivals([shaped], 2400.0, 7))
    night = sum(350 <= each.arrival_s < 450 for each in drawn)
    noon = sum(1550 <= each.arrival_s < 1650 for each in drawn)
    assert night / noon == pytest.approx(0.2 / 1.3, rel=0.1)


def test_a_stream_without_a_rate_is_silent() -> None:
    assert list(arrivals([Traffic("none", 0.0)], 10.0, 0)) == []
