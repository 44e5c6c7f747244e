"""The yardstick of the cost methods is exact, and ours stays close to it where others do not."""

from __future__ import annotations

from itertools import permutations
from math import factorial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.cost_methods import METHODS, exact_shares_s, figures, simulate, table
from serve_app.core.engine_model import EngineParams
from tests.properties import examples

PARAMS = EngineParams(weights_s=0.006, prefill_s_per_token=0.001, context_s_per_token=1e-5)


def step_s(contexts: list[int], chunks: list[int]) -> float:
    if not contexts and not chunks:
        return 0.0
    tokens = len(contexts) + sum(chunks)
    return (
        PARAMS.overhead_s
        + max(PARAMS.weights_s, PARAMS.prefill_s_per_token * tokens)
        + PARAMS.context_s_per_token * sum(contexts)
        + PARAMS.batch_s_per_request * (len(contexts) + len(chunks))
    )


@examples(25)
@given(
    st.lists(st.integers(1, 500), max_size=4),
    st.lists(st.integers(1, 12), max_size=3),
)
def test_the_exact_shares_are_the_average_over_every_order_of_arrival(
    contexts: list[int], chunks: list[int]
) -> None:
    players = [(context, None) for context in contexts] + [(None, chunk) for chunk in chunks]
    if not players:
        return
    values = [0.0] * len(players)
    for order in permutations(range(len(players))):
        inside: list[tuple[int | None, int | None]] = []
        before_s = 0.0
        for player in order:
            inside.append(players[player])
            after_s = step_s(
                [context for context, _ in inside if context is not None],
                [chunk for _, chunk in inside if chunk is not None],
            )
            values[player] += after_s - before_s
            before_s = after_s
    decodes, prefills = exact_shares_s(PARAMS, contexts, chunks)
    expected = [value / factorial(len(players)) for value in values]
    assert decodes + prefills == pytest.approx(expected)
    assert sum(decodes + prefills) == pytest.approx(step_s(contexts, chunks))


def test_a_day_is_given_out_completely_and_ours_is_nearest_to_the_exact_values() -> None:
    day = simulate(8.0, 60.0, seed=1)
    found = figures(day)
    errors = found["errors"]
    assert isinstance(errors, dict)
    assert day.costs is not None
    busy_s = day.costs.use.lifetime_ns / 1e9 * (1 - float(str(found["idle_ratio"])))
    assert day.steps_s == pytest.approx(busy_s, rel=1e-6)
    assert all(errors[method]["sum_ratio"] == pytest.approx(1.0) for method in METHODS)
    assert errors["ours"]["misplaced_ratio"] < 0.02
    assert min(errors[each]["misplaced_ratio"] for each in ("opencost", "average")) > 0.2
    assert table(found).count("\n| ") > 6
