"""The coefficients of a step's time, fitted while the engine runs.

Recursive least squares in information form: with every step the Gram matrix of the four
regressors (steps, prefill tokens, decoding sequences, KV tokens read) is kept for the most
part and the new row is added. A step's squared error is divided by its time, since long
steps scatter more. A weak pull towards the default keeps coefficients in place that the
load does not tell apart: an idle engine's steps all look alike.

No coefficient may be negative. The constrained optimum is found exactly: the best of the
optima over every subset of the regressors whose coefficients are all positive.

Source: Ljung, System Identification, 2nd ed., section 11.2 (exponential forgetting).
"""

from __future__ import annotations

from itertools import combinations
from typing import Final

from serve_app.core.attribution import StepCoefficients

KEEP: Final = 0.999
"""Of what is known, kept per step: the last thousand steps count."""
STEPS_MIN: Final = 200
REFIT_STEPS: Final = 64

# Regressors are brought near 1, so that the matrix can be solved in floats.
_SCALES: Final = (1.0, 1000.0, 100.0, 100_000.0)
_PULL: Final = 1e-8
_SIZE: Final = len(_SCALES)
_PS_PER_MS: Final = 10**9
_NS_PER_MS: Final = 10**6


class StepFit:
    """Learns how long steps take; ``coefficients`` are provisional before 200 of them."""

    def __init__(self, default: StepCoefficients | None = None) -> None:
        self.coefficients = default or StepCoefficients()
        self.steps = 0
        self._prior = _scaled(self.coefficients)
        self._solution = self._prior
        self._gram = [[0.0] * _SIZE for _ in range(_SIZE)]
        self._moment = [0.0] * _SIZE
        self._error_ms = 0.0
        self._seen_ms = 0.0
        self._unfitted = 0

    @property
    def error_ratio(self) -> float:
        """Mean error over mean time of the last steps, each predicted before it was learned."""
        return self._error_ms / self._seen_ms if self._seen_ms else 0.0

    def observe(
        self,
        duration_ns: int,
        *,
        prefill_tokens: int,
        decode_sequences: int,
        kv_tokens_read: int,
        steps: int = 1,
    ) -> None:
        """Learn from a step, or from several of one composition: sums over all of them."""
        if duration_ns <= 0:
            return
        took_ms = duration_ns / _NS_PER_MS
        sums = (steps, prefill_tokens, decode_sequences, kv_tokens_read)
        row = [each / scale for each, scale in zip(sums, _SCALES, strict=True)]
        predicted_ms = sum(x * y for x, y in zip(row, self._solution, strict=True))
        keep = KEEP**steps
        self._error_ms = self._error_ms * keep + abs(took_ms - predicted_ms)
        self._seen_ms = self._seen_ms * keep + took_ms
        moment = self._moment
        for index, each in enumerate(row):
            weighted = each / took_ms
            moment[index] = moment[index] * keep + each  # weighted times took_ms
            line = self._gram[index]
            for other, value in enumerate(row):
                line[other] = line[other] * keep + weighted * value
        self.steps += steps
        self._unfitted += steps
        if self._unfitted >= REFIT_STEPS:
            self._unfitted = 0
            self._refit()

    def _refit(self) -> None:
        gram = [list(line) for line in self._gram]
        moment = list(self._moment)
        for index in range(_SIZE):
            gram[index][index] += _PULL
            moment[index] += _PULL * self._prior[index]
        self._solution = _best_without_negatives(gram, moment)
        if self.steps >= STEPS_MIN:
            step, prefill, decode, kv = (
                round(each / scale * _PS_PER_MS)
                for each, scale in zip(self._solution, _SCALES, strict=True)
            )
            self.coefficients = StepCoefficients(step, prefill, decode, kv, provisional=False)


def _scaled(coefficients: StepCoefficients) -> tuple[float, ...]:
    """Return coefficients in milliseconds per scaled regressor."""
    whole = (
        coefficients.step_ps,
        coefficients.prefill_token_ps,
        coefficients.decode_sequence_ps,
        coefficients.kv_token_ps,
    )
    return tuple(each / _PS_PER_MS * scale for each, scale in zip(whole, _SCALES, strict=True))


def _best_without_negatives(gram: list[list[float]], moment: list[float]) -> tuple[float, ...]:
    """Return the x >= 0 that minimises ``x gram x - 2 moment x``; ``gram`` is definite."""
    best, best_value = (0.0,) * _SIZE, 0.0
    for size in range(_SIZE, 0, -1):
        for chosen in combinations(range(_SIZE), size):
            part = [[gram[i][j] for j in chosen] for i in chosen]
            found = _solve(part, [moment[i] for i in chosen])
            if min(found) < 0:
                continue
            # At an optimum the objective is minus moment times x.
            value = -sum(moment[i] * x for i, x in zip(chosen, found, strict=True))
            if value < best_value:
                best_value = value
                by_index = dict(zip(chosen, found, strict=True))
                best = tuple(by_index.get(i, 0.0) for i in range(_SIZE))
        if size == _SIZE and best_value < 0:
            return best  # without a constraint in force nothing is better
    return best


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a small definite system by elimination."""
    size = len(right)
    lines = [[*line, value] for line, value in zip(matrix, right, strict=True)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(lines[row][column]))
        lines[column], lines[pivot] = lines[pivot], lines[column]
        for row in range(column + 1, size):
            factor = lines[row][column] / lines[column][column]
            for index in range(column, size + 1):
                lines[row][index] -= factor * lines[column][index]
    solution = [0.0] * size
    for row in range(size - 1, -1, -1):
        known = sum(lines[row][index] * solution[index] for index in range(row + 1, size))
        solution[row] = (lines[row][size] - known) / lines[row][row]
    return solution
