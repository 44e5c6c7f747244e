"""What the engine model speaks of: its parameters, sequences, events and recorded steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum


class EventKind(IntEnum):
    """What happened to a sequence at the end of a step (preemption: at its start)."""

    FIRST_TOKEN = 0
    FINISHED = 1
    PREEMPTED = 2


class Phase(IntEnum):
    """Where a sequence is in its life."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2
    STALLED = 3  # running, but without a part in the step in flight
    ENDED = 4


@dataclass(frozen=True, slots=True)
class EngineParams:
    """Size and speed of an engine; the defaults are an 8B model on one H100, BF16.

    ``blocks_per_hash`` is how many KV blocks one prefix hash stands for (a trace that
    hashes 512 tokens at a time has 32 blocks of 16).

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    max_num_seqs: int = 256
    token_budget: int = 8192
    kv_blocks: int = 26_313
    block_tokens: int = 16
    blocks_per_hash: int = 1
    prefix_caching: bool = True
    overhead_s: float = 0.00115
    weights_s: float = 0.0057
    prefill_s_per_token: float = 30e-6
    context_s_per_token: float = 7.6e-8
    batch_s_per_request: float = 4.4e-6

    def __post_init__(self) -> None:
        for field in ("max_num_seqs", "kv_blocks", "block_tokens", "blocks_per_hash"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.token_budget < self.max_num_seqs:
            raise ValueError(
                f"token_budget ({self.token_budget}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running sequence decodes one token a step"
            )
        for field in (
            "overhead_s",
            "weights_s",
            "prefill_s_per_token",
            "context_s_per_token",
            "batch_s_per_request",
        ):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} must be finite and not negative")


class Sequence:
    """One generation inside the model. Read only for callers; made by ``EngineModel.add``.

    ``cached_tokens`` is the prefix hit of its first admission and ``started_s`` when
    that was; ``first_token_s`` and ``finished_s`` are None until they happen.
    ``computed_tokens`` is meaningful while the prompt is being processed; below
    ``lost_tokens`` it repeats what a preemption threw away.
    """

    __slots__ = (
        "_base_step",
        "_examined",
        "_finish_step",
        "_generated",
        "_named",
        "cached_tokens",
        "computed_tokens",
        "finished_s",
        "first_token_s",
        "hashes",
        "lost_tokens",
        "name",
        "order",
        "output_tokens",
        "phase",
        "preemptions",
        "priority",
        "prompt_tokens",
        "started_s",
    )

    def __init__(
        self,
        name: object,
        order: int,
        prompt_tokens: int,
        output_tokens: int,
        priority: int,
        hashes: tuple[int, ...],
    ) -> None:
        self.name = name
        self.order = order
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.priority = priority
        self.hashes = hashes
        self.phase = Phase.WAITING
        self.preemptions = 0
        self.cached_tokens = 0
        self.computed_tokens = 0
        self.lost_tokens = 0
        self.started_s: float | None = None
        self.first_token_s: float | None = None
        self.finished_s: float | None = None
        self._generated = 0
        self._base_step = 0
        self._finish_step = 0
        self._examined = 0
        self._named: list[int] = []


Event = tuple[float, EventKind, Sequence]


@dataclass(frozen=True, slots=True)
class StepRun:
    """Consecutive steps of one composition, for splitting their time over requests.

    ``decodes`` holds each decoding sequence with its context ``passed`` steps before the
    run's first one; it grows by one token a step. Runs of one composition share it, follow
    one another without a gap and say 0, 1, 2 and so on of steps ``passed``. ``prefills``
    holds chunk sizes; such a run is one step. Where one run ends and the next starts is
    the same float. The first step lasts ``first_ps``, each further one ``growth_ps`` more.

    Who keeps KV blocks beside those with a part in the step is in ``waiting``, and who gave
    them back before its end in ``freed``, each with the tokens in them; such a run is one
    step, too.
    """

    start_s: float
    end_s: float
    steps: int
    decodes: tuple[tuple[Sequence, int], ...]
    prefills: tuple[tuple[Sequence, int], ...]
    passed: int = 0
    first_ps: int = 1
    growth_ps: int = 0
    waiting: tuple[tuple[Sequence, int], ...] = ()
    freed: tuple[tuple[Sequence, int], ...] = ()

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s
