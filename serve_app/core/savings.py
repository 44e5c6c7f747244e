"""What could be saved, and why one may believe it: suggestions from what was measured.

Nothing is suggested that the ledger does not show: a smaller pool only where the busiest
hour of all fits into it as it ran, without any more batching; a cheaper model only if it
has served requests as long and is idle enough. What a model's answers are worth, nobody
knows here: that is for an evaluation.

Only what has a price is counted, so that no more is promised than is paid: hours that no
bill has priced yet save nothing, what a token costs is of the hours that have a price, and
how much of a pool's time has none is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Final

from serve_app.core.attribution import Use
from serve_app.core.calendar import HOUR_NS
from serve_app.core.pricing import NANOUSD
from serve_app.core.unit_economics import PoolUse

MONTH_HOURS: Final = 730
# A pool is left with so much room above its busiest hour.
BUSY_TARGET: Final = Fraction(7, 10)
# Less a month is not worth reading about, nano-dollars.
SAVING_MIN: Final = NANOUSD
_CHEAPER_RATIO: Final = Fraction(7, 10)
_REPEATS_MIN: Final = 20
_REPEATED_TOKENS_MIN: Final = 256


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What to do about ``subject`` and what it would save in a month, by these hours."""

    kind: str
    subject: str
    saving_nanousd: int
    why: str


@dataclass(frozen=True, slots=True)
class ModelUse:
    """A model over some hours: engine time and its cost, tokens, its longest request.

    ``cost_nanousd`` and ``priced_tokens`` are of the hours that have a price.
    """

    model: str
    pool: str
    engine_ns: int
    cost_nanousd: int
    tokens: int
    longest_tokens: int
    priced_tokens: int


@dataclass(frozen=True, slots=True)
class Repetition:
    """Prompts of one tenant and model with the same number of tokens, and how many cached."""

    tenant: str
    model: str
    prompt_tokens: int
    requests: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Engine nanoseconds of an uncached prompt token and of an output token, by a fit."""

    prompt_ns: float
    output_ns: float


def smaller_pools(pools: Iterable[PoolUse], hours: int) -> list[Suggestion]:
    """Suggest pools of fewer replicas, whose busiest hour would still leave room."""
    found: list[Suggestion] = []
    for pool in pools:
        replicas = Fraction(pool.total_ns, HOUR_NS * max(1, pool.hours))
        needed = max(1, ceil(pool.peak_busy / BUSY_TARGET))
        if needed >= replicas:
            continue
        spared = pool.total_nanousd * (replicas - needed) / replicas
        found += _worth(
            "smaller_pool",
            pool.pool,
            _monthly(spared, hours),
            f"{float(replicas):.1f} replicas were busy {pool.busy_ratio:.0%} of the time, the "
            f"busiest hour with {float(pool.peak_busy):.1f}; {needed} would do" + _unsaid(pool),
        )
    return found


def cheaper_models(
    models: Sequence[ModelUse], pools: Iterable[PoolUse], hours: int
) -> list[Suggestion]:
    """Suggest for each model the one that would save most, if there is any.

    A model without any hour that has a price is left out: nobody knows what it costs.
    """
    by_name = {pool.pool: pool for pool in pools}
    known = [each for each in models if each.priced_tokens]
    found: list[Suggestion] = []
    for model in known:
        best: tuple[Fraction, ModelUse] | None = None
        for other in known:
            if other.pool == model.pool or not model.cost_nanousd:
                continue
            ours, theirs = _unit(model), _unit(other)
            if model.longest_tokens > other.longest_tokens or theirs > ours * _CHEAPER_RATIO:
                continue
            needed_ns = Fraction(other.engine_ns * model.tokens, other.tokens)
            if needed_ns > by_name[other.pool].time_ns[Use.IDLE]:
                continue
            saving = (ours - theirs) * model.priced_tokens
            if best is None or saving > best[0]:
                best = saving, other
        if best is not None:
            saving, other = best
            found += _worth(
                "cheaper_model",
                model.model,
                _monthly(saving, hours),
                f"{other.model} has served requests as long, is idle enough, and a token costs "
                f"{float(1 - _unit(other) / _unit(model)):.0%} "
                "less there; compare their answers first"
                + _unsaid(*(by_name[each.pool] for each in (model, other))),
            )
    return found


def repeated_prompts(
    repetitions: Iterable[Repetition],
    costs: dict[str, TokenCost],
    nanousd_per_ns: dict[str, Fraction],
    hours: int,
) -> list[Suggestion]:
    """Suggest tenants whose prompts look alike, length for length, and are computed anew.

    ``costs`` and ``nanousd_per_ns`` are by model: what a token takes, what time costs.
    """
    saved: dict[tuple[str, str], tuple[Fraction, int]] = {}
    for each in repetitions:
        if each.requests < _REPEATS_MIN or each.prompt_tokens < _REPEATED_TOKENS_MIN:
            continue
        if each.model not in costs or each.model not in nanousd_per_ns:
            continue
        # The first has to be computed.
        again = (each.requests - 1) * each.prompt_tokens - each.cached_tokens
        time_ns = Fraction(max(0, again)) * Fraction(costs[each.model].prompt_ns)
        amount, tokens = saved.get((each.tenant, each.model), (Fraction(), 0))
        amount += time_ns * nanousd_per_ns[each.model]
        saved[each.tenant, each.model] = amount, tokens + max(0, again)
    found: list[Suggestion] = []
    for (tenant, model), (amount, tokens) in sorted(saved.items()):
        found += _worth(
            "uncached_prompts",
            f"{tenant} on {model}",
            _monthly(amount, hours),
            f"{tokens} prompt tokens of prompts that agree in length with many others were "
            "computed anew: put what repeats first, and check prefix caching and affinity",
        )
    return found


def fit_token_cost(rows: Iterable[tuple[int, int, int]]) -> TokenCost | None:
    """Fit engine time by uncached prompt tokens and output tokens; None if they do not tell.

    ``rows`` are ``(uncached prompt tokens, output tokens, engine nanoseconds)`` of many
    hours. Least squares through nothing, neither coefficient below zero.
    """
    pp = po = oo = pt = ot = 0
    for prompt, output, time_ns in rows:
        pp, po, oo = pp + prompt * prompt, po + prompt * output, oo + output * output
        pt, ot = pt + prompt * time_ns, ot + output * time_ns
    det = pp * oo - po * po
    # Where the two always grow together, nobody can tell one's part from the other's.
    if not pp or not oo or det * 10**6 <= pp * oo:
        return None
    prompt_ns, output_ns = (pt * oo - ot * po) / det, (ot * pp - pt * po) / det
    if prompt_ns < 0:
        return TokenCost(0.0, ot / oo)
    return TokenCost(prompt_ns, output_ns) if output_ns >= 0 else TokenCost(pt / pp, 0.0)


def _unit(model: ModelUse) -> Fraction:
    return Fraction(model.cost_nanousd, model.priced_tokens)


def _unsaid(*pools: PoolUse) -> str:
    """Return what a suggestion has to add where pools' time has no price, in part."""
    parts = [
        f"{pool.unpriced_ratio:.1%} of {pool.pool}'s time" for pool in pools if pool.unpriced_ns
    ]
    return f"; without {' and '.join(parts)}, which has no price" if parts else ""


def _monthly(amount: Fraction, hours: int) -> int:
    return int(amount * MONTH_HOURS / max(1, hours))


def _worth(kind: str, subject: str, saving: int, why: str) -> list[Suggestion]:
    return [Suggestion(kind, subject, saving, why)] if saving >= SAVING_MIN else []
