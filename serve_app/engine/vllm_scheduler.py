"""vLLM's schedulers, writing down what each step contains.

They run in vLLM's engine process. Which requests are in a step is known only there. One
mixin stands over both of vLLM's: a subclass of the wrong one would switch asynchronous
scheduling off.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from serve_app.engine.step_log import StepLog
from serve_app.engine.step_records import SOCKET_VARIABLE, StepSender
from serve_app.engine.vllm_extension import ExtendsAnswers

_log = logging.getLogger("headrace.engine")


class RecordsSteps:
    """Over a scheduler of vLLM's: calls it, and says to a StepLog what it did.

    A fault in the log ends the recording and not the engine: ``steps`` is None from then on,
    and the replica is told.
    """

    steps: StepLog | None

    def __init__(self, *args: Any, **options: Any) -> None:
        self.steps = StepLog(StepSender(os.environ.get(SOCKET_VARIABLE)))
        super().__init__(*args, **options)

    def schedule(self, *args: Any, **options: Any) -> Any:
        """Compose the next step."""
        began_s = 0.0 if self.steps is None else self.steps.clock()
        output = super().schedule(*args, **options)  # type: ignore[misc]  # vLLM's, untyped here
        requests = self.requests  # type: ignore[attr-defined]  # vLLM's
        self._note("scheduled", output.num_scheduled_tokens, requests, began_s)
        return output

    def update_from_output(self, *args: Any, **options: Any) -> Any:
        """Take in the output of the oldest step under way."""
        outputs = super().update_from_output(*args, **options)  # type: ignore[misc]  # vLLM's
        self._note("completed", busy=self._busy())
        return outputs

    def add_request(self, request: Any) -> None:
        """Take in a request."""
        self._note("joined", request.request_id)
        super().add_request(request)  # type: ignore[misc]  # vLLM's

    def finish_requests(self, *args: Any, **options: Any) -> Any:
        """End requests from outside a step."""
        ended = super().finish_requests(*args, **options)  # type: ignore[misc]  # vLLM's
        self._note("looked", busy=self._busy())
        return ended

    def _preempt_request(self, request: Any, *args: Any, **options: Any) -> None:
        self._note("preempted", request.request_id, request.num_computed_tokens)
        super()._preempt_request(request, *args, **options)  # type: ignore[misc]  # vLLM's

    def _free_request(self, request: Any, *args: Any, **options: Any) -> Any:
        self._note("left", request.request_id)
        return super()._free_request(request, *args, **options)  # type: ignore[misc]  # vLLM's

    def _note(self, what: str, *args: Any, **options: Any) -> None:
        if self.steps is None:
            return
        try:
            getattr(self.steps, what)(*args, **options)
        except Exception:  # noqa: BLE001 - see below
            # What is measured must not stop what is served.
            _log.exception("steps are no longer recorded")
            self._stop()

    def _stop(self) -> None:
        steps, self.steps = self.steps, None
        assert steps is not None
        try:
            steps.stopped()
        except Exception:  # noqa: BLE001 - as above
            _log.exception("the replica does not know that steps are no longer recorded")

    def _busy(self) -> bool:
        # Not get_num_unfinished_requests: that is 0 while the scheduler is paused.
        return any(self.get_request_counts())  # type: ignore[attr-defined]  # vLLM's


class RecordingScheduler(ExtendsAnswers, RecordsSteps, Scheduler):  # type: ignore[misc]  # vLLM is untyped here
    """vLLM's synchronous scheduler."""


class RecordingAsyncScheduler(ExtendsAnswers, RecordsSteps, AsyncScheduler):  # type: ignore[misc]  # as above
    """vLLM's asynchronous scheduler."""


def recording_scheduler(vllm_config: Any) -> type[Any] | None:
    """Return the scheduler vLLM chose for ``vllm_config`` as one that records its steps.

    None where that is not possible: a scheduler that is neither of vLLM's two, or several
    engines behind one replica.
    """
    if vllm_config.parallel_config.data_parallel_size > 1:
        return None
    chosen: type[Any] = vllm_config.scheduler_config.get_scheduler_cls()
    if issubclass(chosen, RecordsSteps):
        return chosen
    recording: dict[type[Any], type[Any]] = {
        Scheduler: RecordingScheduler,
        AsyncScheduler: RecordingAsyncScheduler,
    }
    return recording.get(chosen)
