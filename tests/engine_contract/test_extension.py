"""Answers that are extended while they run, in vLLM's own schedulers with no model behind them."""

from __future__ import annotations

import pytest

from serve_app.engine.vllm_extension import extension
from tests.engine_contract.test_recording_scheduler import Core, vllm_config

pytestmark = pytest.mark.model


@pytest.mark.parametrize("asynchronous", [False, True], ids=["synchronous", "asynchronous"])
def test_vllm_goes_on_to_what_it_was_told_last_and_not_a_token_further(asynchronous: bool) -> None:
    from vllm.v1.request import RequestStatus

    core = Core(vllm_config(asynchronous=asynchronous), kv_blocks=40)
    made: dict[str, int] = {}
    left = core.scheduler._free_request

    def count(request: object, *args: object, **options: object) -> object:
        made[request.request_id] = request.num_output_tokens  # type: ignore[attr-defined]
        return left(request, *args, **options)

    core.scheduler._free_request = count
    for name in ("extended", "late", "as it was"):
        core.add(name, list(range(20)), 10)
    turns = 0
    while core.turn():
        turns += 1
        if turns == 5:
            told = [extension("extended", 30), extension("extended", 25)]
            core.scheduler.finish_requests(told, RequestStatus.FINISHED_ABORTED)
        if "late" in made:
            core.scheduler.finish_requests([extension("late", 30)], RequestStatus.FINISHED_ABORTED)
    assert made == {"extended": 30, "late": 10, "as it was": 10}
    assert set(core.ended.values()) == {"completed"}
