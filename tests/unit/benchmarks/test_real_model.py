"""The paired comparison with bare `vllm serve`: what its rounds say, and how surely."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.real_model.__main__ import BARE, HEADRACE, half_width, paired


def entry(server: str, number: int, tokens_per_s: float, first_s: float) -> dict[str, Any]:
    level = {
        "concurrency": 8,
        "tokens_per_s": tokens_per_s,
        "time_to_first_token_p50_s": first_s,
    }
    return {"server": server, "round": number, "levels": [level]}


def test_each_round_is_a_pair_and_half_a_pair_is_none() -> None:
    rounds = [
        entry(HEADRACE, 0, 90.0, 0.11),
        entry(BARE, 0, 100.0, 0.10),
        entry(BARE, 1, 50.0, 0.20),
        entry(HEADRACE, 1, 50.0, 0.23),
        entry(HEADRACE, 2, 1000.0, 9.0),
    ]
    [found] = paired(rounds)
    assert (found["concurrency"], found["rounds"]) == (8, 2)
    assert found["tokens_ratio"] == pytest.approx(0.95)
    # Two values 0.1 apart: t(1) = 12.706, s = 0.1 / sqrt 2, over sqrt 2.
    assert found["tokens_ratio_half_width"] == pytest.approx(12.706 * 0.05)
    assert found["first_token_added_s"] == pytest.approx(0.02)


def test_one_round_has_no_interval_and_none_no_figures() -> None:
    assert half_width([1.0]) is None
    [found] = paired([entry(HEADRACE, 0, 90.0, 0.1), entry(BARE, 0, 100.0, 0.1)])
    assert found["tokens_ratio_half_width"] is None
    assert paired([entry(BARE, 0, 100.0, 0.1)]) == []
