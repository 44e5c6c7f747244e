"""A drill waits with an end, notes what was and was not so, and fails when it breaks off."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest

from serve_app.drills.frame import (
    DRILLS,
    DrillImpossible,
    NotMeasured,
    Stage,
    load,
    perform,
    summary,
)


class Clock:
    """Seconds that pass while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def drill(run: Any) -> ModuleType:
    module: Any = SimpleNamespace(run=run)
    return module


async def performed(run: Any, said: list[str] | None = None) -> Any:
    clock = Clock()

    async def on_clock(stage: Stage) -> None:
        stage.sleep = clock.sleep
        await run(stage)

    target: Any = None
    say = [].append if said is None else said.append
    return await perform("engine-kill", target, say, clock, drill(on_clock))


async def test_a_drill_passes_when_everything_it_checked_was_so() -> None:
    said: list[str] = []

    async def run(stage: Stage) -> None:
        stage.inject("a fault")
        stage.check(True, "it was so")
        stage.figure(seconds=1.23456, count=3)

    verdict = await performed(run, said)
    assert verdict.passed
    assert verdict.as_json() == {
        "drill": "engine-kill",
        "passed": True,
        "took_s": 0.0,
        "why": None,
        "checks": [{"what": "it was so", "passed": True}],
        "figures": {"seconds": 1.23, "count": 3},
    }
    assert said == ["engine-kill: inject: a fault", "engine-kill: ok: it was so"]


async def test_one_failed_check_fails_it_and_the_others_are_still_made() -> None:
    async def run(stage: Stage) -> None:
        stage.check(False, "first")
        stage.check(True, "second")

    verdict = await performed(run)
    assert not verdict.passed
    assert [each.passed for each in verdict.checks] == [False, True]


async def test_a_drill_that_checked_nothing_has_not_passed() -> None:
    async def run(stage: Stage) -> None:
        return None

    assert not (await performed(run)).passed


async def test_waiting_ends_and_says_for_what() -> None:
    async def never() -> bool:
        return False

    async def run(stage: Stage) -> None:
        stage.check(True, "so far")
        await stage.until(never, "the sky to fall", 30)

    verdict = await performed(run)
    assert not verdict.passed
    assert verdict.why == "not within 30 s: the sky to fall"
    assert 30 < verdict.took_s < 31


async def test_what_is_waited_for_is_timed_and_a_stack_that_stumbles_is_asked_again() -> None:
    asked = 0

    async def third_time() -> bool:
        nonlocal asked
        asked += 1
        if asked < 3:
            raise httpx.ConnectError("refused")
        return True

    async def run(stage: Stage) -> None:
        stage.figure(took_s=await stage.check_until(third_time, "it is back", 30))

    verdict = await performed(run)
    assert verdict.passed
    assert verdict.figures == {"took_s": 0.4}
    assert verdict.checks[0].what == "it is back after 0.4 s"


async def test_a_check_that_never_comes_true_is_a_failed_check() -> None:
    async def never() -> bool:
        return False

    async def run(stage: Stage) -> None:
        await stage.check_until(never, "it is back", 5)

    verdict = await performed(run)
    assert [(each.what, each.passed) for each in verdict.checks] == [
        ("it is back within 5 s", False)
    ]


async def test_a_stack_that_does_not_answer_fails_the_drill() -> None:
    async def run(stage: Stage) -> None:
        stage.check(True, "so far")
        raise httpx.ConnectError("refused")

    assert (await performed(run)).why == "the stack did not answer: refused"


@pytest.mark.parametrize("error", [TimeoutError(), KeyError("pools"), ValueError("no JSON")])
async def test_whatever_else_ends_a_drill_is_a_failed_verdict(error: Exception) -> None:
    async def run(stage: Stage) -> None:
        stage.check(True, "so far")
        raise error

    verdict = await performed(run)
    assert not verdict.passed
    assert verdict.why == f"broke off: {type(error).__name__}: {error}"


async def test_what_is_not_measured_is_waited_for_and_named() -> None:
    async def mute() -> bool:
        raise NotMeasured("no headrace_queue_depth")

    async def run(stage: Stage) -> None:
        await stage.until(mute, "an idle stack", 30)

    why = (await performed(run)).why
    assert why == "not within 30 s: an idle stack (no headrace_queue_depth)"


async def test_what_cannot_be_run_is_no_verdict() -> None:
    async def run(stage: Stage) -> None:
        raise DrillImpossible("two routers")

    with pytest.raises(DrillImpossible, match="two routers"):
        await performed(run)


@pytest.mark.parametrize("name", DRILLS)
def test_every_drill_says_what_it_shows(name: str) -> None:
    assert callable(load(name).run)
    assert 20 < len(summary(name)) < 100
