"""Cancels that no engine has answered yet."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import EngineReplicaSettings
from serve_app.engine.address import Address
from serve_app.engine.channel_cancels import AGAIN_S, CANCELS_MAX, KEEP_S, Cancels
from tests.properties import examples

ENGINES = [Address(f"tcp://127.0.0.1:{number}", b"k" * 40) for number in range(3)]


def test_a_cancel_is_due_again_until_its_stream_has_ended() -> None:
    cancels = Cancels()
    cancels.sent(7, ENGINES[0], 0.0)
    assert cancels.due(AGAIN_S / 2) == {}
    assert cancels.due(AGAIN_S) == {ENGINES[0]: [7]}
    assert cancels.due(AGAIN_S) == {}, "it has just been sent"
    assert cancels.due(2 * AGAIN_S) == {ENGINES[0]: [7]}
    cancels.answered(7)
    assert cancels.due(3 * AGAIN_S) == {}
    assert not cancels


def test_an_engine_that_never_answers_is_not_asked_for_ever() -> None:
    cancels = Cancels()
    cancels.sent(7, ENGINES[0], 0.0)
    assert cancels.due(KEEP_S) == {ENGINES[0]: [7]}
    assert cancels.due(KEEP_S + AGAIN_S) == {}
    assert not cancels


def test_only_so_many_are_kept() -> None:
    cancels = Cancels()
    for stream in range(CANCELS_MAX + 10):
        cancels.sent(stream, ENGINES[0], 0.0)
    assert len(cancels) == CANCELS_MAX
    assert cancels.due(AGAIN_S)[ENGINES[0]][0] == 10, "the newest"


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("sent"), st.integers(0, 40)),
        st.tuples(st.just("answered"), st.integers(0, 40)),
        st.tuples(st.just("wait"), st.floats(0.0, KEEP_S / 2)),
    ),
    max_size=60,
)


@examples(200)
@given(EVENTS)
def test_every_cancel_is_told_again_to_its_engine_until_its_end(
    events: list[tuple[str, float]],
) -> None:
    cancels, now_s = Cancels(), 0.0
    left: dict[int, float] = {}
    for kind, value in events:
        stream = int(value)
        if kind == "sent" and stream not in left:
            cancels.sent(stream, ENGINES[stream % 3], now_s)
            left[stream] = now_s
        elif kind == "answered":
            cancels.answered(stream)
            left.pop(stream, None)
        elif kind == "wait":
            now_s += AGAIN_S + value
            left = {each: since_s for each, since_s in left.items() if now_s - since_s <= KEEP_S}
            due = cancels.due(now_s)
            assert {each: engine for engine, told in due.items() for each in told} == {
                each: ENGINES[each % 3] for each in left
            }
            assert len(cancels) == len(left)


def test_what_is_kept_outlives_the_longest_stall_of_an_engine_that_is_not_replaced() -> None:
    """Three health checks fail, then Serve ends it: each takes its period and its time-out."""
    replicas = EngineReplicaSettings()
    longest_s = 3 * (replicas.health_check_period_s + replicas.health_check_timeout_s)
    assert 2 * longest_s <= KEEP_S
