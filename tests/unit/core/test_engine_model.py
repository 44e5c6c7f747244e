"""The engine model: its physics by hand, its jumps against a step-by-step twin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.core.engine_model import EngineModel, EngineParams, EventKind, StepRun
from serve_app.core.types import PriorityClass
from tests.properties import examples
from tests.unit.core.reference_engine import ReferenceEngine

FIRST, FINISHED, PREEMPTED = EventKind.FIRST_TOKEN, EventKind.FINISHED, EventKind.PREEMPTED

# Round costs: a step is 10 ms plus 1 ms per prompt token beyond ten.
ROUND = EngineParams(
    max_num_seqs=4,
    token_budget=100,
    kv_blocks=64,
    block_tokens=4,
    overhead_s=0.0,
    weights_s=0.010,
    prefill_s_per_token=0.001,
    context_s_per_token=0.0,
    batch_s_per_request=0.0,
)


def drain(model: EngineModel) -> list[tuple[float, EventKind, object]]:
    events = []
    while (next_s := model.next_event_s()) < math.inf:
        events += [(round(t, 9), kind, seq.name) for t, kind, seq in model.advance(next_s)]
    return events


# ---- physics ---------------------------------------------------------------------


def test_a_step_lasts_what_the_formula_says() -> None:
    params = EngineParams()
    model = EngineModel(params)
    model.add("a", 0.0, prompt_tokens=1000, output_tokens=3)
    first_s = 0.00115 + 1000 * 30e-6 + 4.4e-6
    second_s = 0.00115 + 0.0057 + 1001 * 7.6e-8 + 4.4e-6
    third_s = 0.00115 + 0.0057 + 1002 * 7.6e-8 + 4.4e-6
    (first, last) = drain(model)
    assert first == (pytest.approx(first_s), FIRST, "a")
    assert last == (pytest.approx(first_s + second_s + third_s), FINISHED, "a")


def test_a_long_prompt_is_chunked_and_the_decodes_beside_it_go_on() -> None:
    model = EngineModel(ROUND)
    short = model.add("short", 0.0, prompt_tokens=1, output_tokens=5)
    model.advance(0.010)
    model.add("long", 0.010, prompt_tokens=150, output_tokens=1)
    # Two steps of a whole budget each: 99 prompt tokens beside one decode, then 51.
    model.advance(0.110)
    assert model.generated(short) == 2
    events = drain(model)
    assert (0.162, FINISHED, "long") in events
    assert events[-1] == (0.182, FINISHED, "short")


def test_waiting_sequences_start_by_class_then_arrival_and_the_head_blocks_the_rest() -> None:
    model = EngineModel(replace(ROUND, max_num_seqs=1))
    for name, priority in [("s1", 1), ("b", 2), ("s2", 1), ("c", 0)]:
        model.add(name, 0.0, prompt_tokens=1, output_tokens=1, priority=priority)
    order = [name for _, kind, name in drain(model) if kind is FINISHED]
    assert order == ["c", "s1", "s2", "b"]


def test_additions_of_one_instant_share_a_step_and_later_ones_wait_for_its_end() -> None:
    model = EngineModel(ROUND)
    model.advance(1.0)
    model.add("a", 1.0, prompt_tokens=1, output_tokens=2)
    model.add("b", 1.0, prompt_tokens=1, output_tokens=2)
    assert model.next_event_s() == pytest.approx(1.010)
    late = model.add("late", 1.005, prompt_tokens=1, output_tokens=1)
    assert drain(model) == [
        (1.010, FIRST, "a"),
        (1.010, FIRST, "b"),
        (1.020, FINISHED, "a"),
        (1.020, FINISHED, "b"),
        (1.020, FIRST, "late"),
        (1.020, FINISHED, "late"),
    ]
    assert late.started_s == pytest.approx(1.010)


def test_an_addition_at_the_end_of_a_step_joins_the_next_one_within_a_run_too() -> None:
    model = EngineModel(ROUND)
    model.add("runs", 0.0, prompt_tokens=1, output_tokens=50)
    model.advance(model.next_step_s())
    for _ in range(3):
        boundary_s = model.next_step_s()
        model.advance(boundary_s)
    joins = model.add("joins", boundary_s, prompt_tokens=1, output_tokens=1)
    drain(model)
    assert joins.started_s == boundary_s
    assert joins.first_token_s == pytest.approx(boundary_s + 0.010)


# ---- KV cache --------------------------------------------------------------------


def test_a_shared_prefix_is_computed_once_and_the_last_token_always() -> None:
    model = EngineModel(ROUND)
    hashes = (11, 12, 13, 14)
    model.add("a", 0.0, prompt_tokens=16, output_tokens=1, hashes=hashes)
    drain(model)
    again = model.add("again", 1.0, prompt_tokens=16, output_tokens=1, hashes=hashes)
    other = model.add("other", 1.0, prompt_tokens=16, output_tokens=1, hashes=(11, 99, 13, 14))
    drain(model)
    assert again.cached_tokens == 12
    assert other.cached_tokens == 4
    assert model.prefix_hit_tokens == 16
    assert model.prefix_query_tokens == 48


def test_an_answer_is_cached_for_the_next_turn() -> None:
    model = EngineModel(ROUND)
    model.add("turn 1", 0.0, prompt_tokens=6, output_tokens=7, hashes=(1, 2, 3))
    drain(model)
    turn_2 = model.add("turn 2", 1.0, prompt_tokens=20, output_tokens=1, hashes=(1, 2, 3, 4, 5))
    drain(model)
    assert turn_2.cached_tokens == 12


def test_the_least_recently_released_prefix_is_evicted_first() -> None:
    model = EngineModel(replace(ROUND, kv_blocks=4))
    for number, name in enumerate((1, 2, 3)):
        model.add(name, float(number), prompt_tokens=4, output_tokens=1, hashes=(name,))
        drain(model)
    model.add("refresh", 4.0, prompt_tokens=5, output_tokens=1, hashes=(1,))
    drain(model)
    model.add("big", 5.0, prompt_tokens=8, output_tokens=1)
    drain(model)
    hits = []
    for name in (1, 2, 3):
        hits.append(model.kv.match((name,), 1)[0])
    assert hits == [1, 0, 1]


def test_the_lowest_class_that_came_last_is_preempted_and_recomputes() -> None:
    model = EngineModel(replace(ROUND, kv_blocks=6))
    model.add("sheddable", 0.0, prompt_tokens=4, output_tokens=8, priority=2)
    model.add("critical", 0.0, prompt_tokens=4, output_tokens=8, priority=0)
    model.add("later", 0.0, prompt_tokens=4, output_tokens=8, priority=2)
    events = drain(model)
    preempted = [name for _, kind, name in events if kind is PREEMPTED]
    assert preempted[0] == "later"
    assert "critical" not in preempted
    assert next(name for _, kind, name in events if kind is FINISHED) == "critical"
    assert model.preemptions_total == len(preempted)
    assert sum(kind is FIRST for _, kind, _ in events) == 3


def test_a_prompt_whose_blocks_do_not_fit_waits_and_holds_back_smaller_ones() -> None:
    model = EngineModel(replace(ROUND, kv_blocks=4))
    model.add("runs", 0.0, prompt_tokens=8, output_tokens=4)
    model.advance(0.010)
    big = model.add("big", 0.010, prompt_tokens=12, output_tokens=1)
    small = model.add("small", 0.010, prompt_tokens=1, output_tokens=1)
    model.advance(0.025)
    assert (big.started_s, small.started_s, model.waiting) == (None, None, 2)
    assert [name for _, kind, name in drain(model) if kind is FINISHED] == ["runs", "big", "small"]


def test_a_victim_gives_back_the_block_it_took_in_the_same_step() -> None:
    model = EngineModel(replace(ROUND, kv_blocks=5, max_num_seqs=2))
    model.add("early", 0.0, prompt_tokens=3, output_tokens=10, priority=2)
    model.advance(0.005)
    model.add("late", 0.005, prompt_tokens=12, output_tokens=2, priority=0)
    # Both need a block at the third step: the one that runs longer is asked first and
    # takes the last free one, then loses it to the higher class.
    assert [name for _, kind, name in drain(model) if kind is PREEMPTED] == ["early"]
    assert model.kv.free() == 5


def test_an_abort_frees_slot_and_blocks_at_once() -> None:
    model = EngineModel(ROUND)
    doomed = model.add("doomed", 0.0, prompt_tokens=40, output_tokens=100)
    stays = model.add("stays", 0.0, prompt_tokens=4, output_tokens=3)
    queued = model.add("queued", 0.0, prompt_tokens=4, output_tokens=3)
    model.advance(0.060)
    model.abort(doomed, 0.060)
    model.abort(queued, 0.060)
    model.abort(queued, 0.060)
    assert model.generated(doomed) == 2
    assert model.running == 1
    assert model.kv.free() == 64 - 2
    assert [name for _, _, name in drain(model)] == ["stays"]
    assert model.generated(stays) == 3
    assert model.kv.free() == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_budget": 3}, "token_budget"),
        ({"kv_blocks": 0}, "kv_blocks"),
        ({"overhead_s": math.nan}, "overhead_s"),
        ({"weights_s": -1.0}, "weights_s"),
    ],
)
def test_impossible_parameters_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ROUND, **change)


def test_a_sequence_that_could_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="KV cache of 256 tokens"):
        EngineModel(ROUND).add("a", 0.0, prompt_tokens=250, output_tokens=7)


# ---- jumps against single steps ----------------------------------------------------

COSTS = st.sampled_from([0.000_37, 0.001, 0.003_21, 0.0])


@st.composite
def small_params(draw: st.DrawFn) -> EngineParams:
    slots = draw(st.integers(1, 4))
    return EngineParams(
        max_num_seqs=slots,
        token_budget=draw(st.integers(slots, 20)),
        kv_blocks=draw(st.integers(4, 40)),
        block_tokens=draw(st.integers(1, 4)),
        blocks_per_hash=draw(st.integers(1, 2)),
        overhead_s=draw(COSTS),
        weights_s=draw(COSTS),
        prefill_s_per_token=draw(COSTS),
        context_s_per_token=draw(COSTS),
        batch_s_per_request=draw(COSTS),
    )


ADDITIONS = st.tuples(
    st.just("add"), st.integers(1, 16), st.integers(1, 60), st.integers(0, 2), st.integers(0, 3)
)
OPERATIONS = st.lists(
    st.one_of(
        ADDITIONS,
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.001, 0.003_7, 0.02, 0.15])),
        st.tuples(st.just("next")),
        st.tuples(st.just("step")),
        st.tuples(st.just("abort"), st.integers(0, 3)),
    ),
    min_size=4,
    max_size=40,
)


class Pair:
    """The model and its slow twin, driven alike and compared after every operation."""

    def __init__(self, params: EngineParams) -> None:
        self.model = EngineModel(params, on_run=self._on_run)
        self.twin = ReferenceEngine(params)
        self.members: list[tuple] = []
        self.now_s = 0.0
        self.steps = 0

    def _on_run(self, run: StepRun) -> None:
        self.steps += run.steps
        assert run.steps == 1 or not run.prefills

    def add(self, prompt: int, output: int, priority: int, group: int) -> None:
        if prompt + output > self.model.capacity_tokens:
            return
        name = len(self.members)
        # Three families of prompts share prefixes of different length; group 0 is alone.
        hashes = tuple((group - group % 2) * 100 + index for index in range(group * 3))
        if group % 2 and len(hashes) > 2:
            hashes = (*hashes[:2], *(1000 * group + index for index in range(len(hashes) - 2)))
        fast = self.model.add(
            name,
            self.now_s,
            prompt_tokens=prompt,
            output_tokens=output,
            priority=priority,
            hashes=hashes,
        )
        slow = self.twin.add(
            name, self.now_s, prompt=prompt, output=output, priority=priority, hashes=hashes
        )
        self.members.append((fast, slow))

    def abort(self, index: int) -> None:
        if index < len(self.members):
            fast, slow = self.members[-1 - index]
            self.model.abort(fast, self.now_s)
            self.twin.abort(slow, self.now_s)

    def advance(self, until_s: float) -> None:
        self.now_s = max(self.now_s, until_s)
        fast = [(t, kind, seq.name) for t, kind, seq in self.model.advance(self.now_s)]
        slow = self.twin.advance(self.now_s)
        assert sorted(fast) == sorted(slow)
        self.compare()

    def settle(self) -> None:
        """Compose the next step in both, as a caller that asks for its end does."""
        assert self.model.next_step_s() == self.twin.next_step_s()
        self.compare()

    def compare(self) -> None:
        model, twin = self.model, self.twin
        assert model.running == len(twin.running)
        assert model.waiting == len(twin.waiting)
        assert model.kv.free() == twin.free()
        assert model.kv.idle_blocks == twin.idle_blocks()
        assert model.preemptions_total == twin.preemptions
        tokens = [0, 0, 0]
        for fast, slow in self.members:
            assert model.generated(fast) == slow.generated
            assert fast.cached_tokens == (slow.cached or 0)
            if slow.state != "ended":
                tokens[slow.priority] += slow.tokens
        assert model.in_flight_tokens() == tuple(tokens)

    def next_event(self) -> bool:
        self.settle()
        next_s = self.model.next_event_s()
        if next_s < math.inf:
            self.advance(next_s)
        return next_s < math.inf


@examples(400)
@given(small_params(), OPERATIONS)
def test_jumping_over_steps_gives_the_same_bits_as_taking_them_one_by_one(
    params: EngineParams, operations: list[tuple]
) -> None:
    pair = Pair(params)
    for operation, *arguments in operations:
        if operation == "add":
            pair.add(*arguments)
        elif operation == "abort":
            pair.abort(*arguments)
        elif operation == "wait":
            pair.advance(pair.now_s + arguments[0])
        elif operation == "next":
            pair.next_event()
        elif (step_s := pair.model.next_step_s()) < math.inf:
            # One step within a run: what is added now comes before the following one.
            pair.settle()
            pair.advance(step_s)
    while pair.next_event():
        pass
    assert pair.model.kv.free() == params.kv_blocks
    assert pair.model.in_flight_tokens() == (0, 0, 0)
    assert not pair.model.busy
    assert pair.steps == pair.model.steps_total


def test_recorded_runs_cover_the_busy_time_and_every_token() -> None:
    runs: list[StepRun] = []
    model = EngineModel(replace(ROUND, kv_blocks=16), on_run=runs.append)
    tokens = {}
    for number in range(6):
        now_s = number * 0.033
        model.advance(now_s)
        sequence = model.add(
            number,
            now_s,
            prompt_tokens=5 + number,
            output_tokens=9,
            priority=PriorityClass(number % 3),
        )
        tokens[sequence] = 0
    drain(model)
    produced = dict.fromkeys(tokens, 0)
    for run in runs:
        for sequence, context in run.decodes:
            assert context + run.passed == sequence.prompt_tokens + produced[sequence]
            tokens[sequence] += run.steps
            produced[sequence] += run.steps
        for sequence, _ in run.prefills:
            produced[sequence] += 1
    assert sum(run.duration_s for run in runs) == pytest.approx(model.busy_ticks / 1e12)
    # Each prefill, also the repeated one of a preempted sequence, produced one token more.
    for sequence, decoded in tokens.items():
        assert decoded + 1 + sequence.preemptions == 9
