"""Extensions among the ids of requests to end: taken out, applied once, and never backwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from serve_app.engine.vllm_extension import ExtendsAnswers, extension


class Scheduler:
    """What the mixin needs of vLLM's."""

    def __init__(self) -> None:
        self.requests = {"cmpl-a-1": SimpleNamespace(max_tokens=24)}
        self.ended: list[Any] = []

    def finish_requests(self, request_ids: Any, status: str) -> None:
        self.ended.append((request_ids, status))


class Extending(ExtendsAnswers, Scheduler):
    pass


def test_a_limit_is_raised_and_only_what_is_to_end_ends() -> None:
    scheduler = Extending()
    scheduler.finish_requests([extension("cmpl-a-1", 40), "cmpl-b-2"], "aborted")
    assert scheduler.requests["cmpl-a-1"].max_tokens == 40
    assert scheduler.ended == [(["cmpl-b-2"], "aborted")]


def test_twice_and_late_change_nothing_and_nobody_is_missed() -> None:
    scheduler = Extending()
    for tokens in (40, 40, 30):
        scheduler.finish_requests([extension("cmpl-a-1", tokens)], "aborted")
    scheduler.finish_requests([extension("gone:with:colons", 99)], "aborted")
    assert scheduler.requests["cmpl-a-1"].max_tokens == 40
    assert all(ids == [] for ids, _ in scheduler.ended)


def test_other_ways_to_end_requests_are_as_they_were() -> None:
    scheduler = Extending()
    scheduler.finish_requests(None, "aborted")
    scheduler.finish_requests("cmpl-a-1", "aborted")
    assert scheduler.ended == [(None, "aborted"), ("cmpl-a-1", "aborted")]
