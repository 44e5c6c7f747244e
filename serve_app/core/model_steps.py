"""The engine model's steps, as the cost meter takes them."""

from __future__ import annotations

from collections.abc import Callable

from serve_app.core.attribution import Account
from serve_app.core.cost_meter import Chunk, CostMeter, Steps
from serve_app.core.engine_parts import Sequence, StepRun


class ModelSteps:
    """Passes a model's runs on to a meter.

    ``wall_s`` turns the model's time into the replica's, ``account_of`` tells a sequence's
    account, always the same.
    """

    def __init__(
        self,
        meter: CostMeter,
        wall_s: Callable[[float], float],
        account_of: Callable[[Sequence], Account],
    ) -> None:
        self._meter = meter
        self._wall_s = wall_s
        self._account_of = account_of
        self._known: tuple[tuple[Sequence, int], ...] = ()
        self._decodes: tuple[tuple[Account, int], ...] = ()

    def stepped(self, run: StepRun) -> None:
        """Account for steps of the model that are over."""
        account_of = self._account_of
        if run.decodes is not self._known:
            # Runs of one composition share the tuple, and so must what is made of it.
            self._known = run.decodes
            self._decodes = tuple([(account_of(each), context) for each, context in run.decodes])
        chunks = tuple([self._chunk(sequence, tokens) for sequence, tokens in run.prefills])
        self._meter.stepped(
            Steps(
                self._wall_s(run.start_s),
                self._wall_s(run.end_s),
                self._decodes,
                chunks,
                run.passed,
                run.steps,
                run.first_ps,
                run.growth_ps,
                tuple([(account_of(each), tokens) for each, tokens in run.waiting]),
                tuple([(account_of(each), tokens) for each, tokens in run.freed]),
            )
        )

    def freed(self, sequence: Sequence, tokens: int, since_s: float, until_s: float) -> None:
        """Account for the KV blocks of a sequence that left in the middle of a step."""
        account, wall_s = self._account_of(sequence), self._wall_s
        self._meter.held(account, tokens, wall_s(since_s), wall_s(until_s))

    def _chunk(self, sequence: Sequence, tokens: int) -> Chunk:
        # How much of a prompt is computed is known now, and not once more is.
        computed = sequence.computed_tokens
        repeated = max(0, min(sequence.lost_tokens, computed) - (computed - tokens))
        return Chunk(self._account_of(sequence), tokens, computed, repeated)
