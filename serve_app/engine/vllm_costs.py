"""What vLLM's steps cost: the records of its scheduler, read and split in the replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from serve_app.core.attribution import Account, StepCoefficients
from serve_app.core.cost_meter import CostMeter, EngineCosts
from serve_app.core.types import Outcome
from serve_app.engine.step_reader import StepReader
from serve_app.engine.step_records import StepInbox

if TYPE_CHECKING:
    from serve_app.engine.vllm_core import MeteredAsyncLLM


class VllmCosts:
    """The costs of one engine, from the replica's birth on; None wherever they are not known.

    ``clock`` gives the machine's monotonic seconds, as vLLM's processes read them too.
    Every method reads first what the engine has written, so that its word counts up to now.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        measure: bool,
        coefficients: StepCoefficients | None = None,
    ) -> None:
        """``coefficients`` are those of CostMeter."""
        self._clock = clock
        self._born_s = clock()
        self._measure = measure
        self._coefficients = coefficients
        self._meter: CostMeter | None = None
        self._reader: StepReader | None = None
        self.inbox: StepInbox | None = None

    def listen(self) -> StepInbox | None:
        """Return where an engine that is about to start shall send its records."""
        if self._measure and self.inbox is None:
            self.inbox = StepInbox()
        return self.inbox

    def attach(self, llm: MeteredAsyncLLM) -> None:
        """Begin to meter an engine that was started with the inbox, if it records its steps."""
        if self.inbox is None or not llm.records_steps:
            return
        block_tokens = llm.vllm_config.cache_config.block_size
        self._meter = CostMeter(self._born_s, block_tokens, self._coefficients)
        self._reader = StepReader(self.inbox, self._meter, self._clock)
        llm.read_steps_with(self._reader)

    def ready(self) -> None:
        """The engine takes requests from now on; what it did before was start-up."""
        meter = self._read()
        if meter is not None:
            meter.ready(self._clock())

    def drain(self) -> None:
        """The engine takes no more requests."""
        meter = self._read()
        if meter is not None:
            meter.drain(self._clock())

    def open(self, tenant: str) -> Account | None:
        """Return the account of a request that is about to be handed to the engine."""
        return None if self._meter is None else self._meter.open(tenant)

    def close(self, account: Account | None, outcome: Outcome) -> None:
        """Book the engine time of a request, with all steps that the engine has told of."""
        meter = self._read()
        if meter is not None and account is not None:
            meter.close(account, outcome)

    def figures(self) -> EngineCosts | None:
        """Return where the replica's time went."""
        meter = self._read()
        return None if meter is None else meter.read(self._clock())

    def shut(self) -> None:
        """Read what the engine wrote last, and listen no longer. Idempotent."""
        self._read()
        if self.inbox is not None:
            self.inbox.close()

    def _read(self) -> CostMeter | None:
        if self._reader is not None:
            self._reader.read()
        return self._meter
