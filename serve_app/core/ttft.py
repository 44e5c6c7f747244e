"""Predicted time to first token, once a request is at a replica.

TTFT = a + b x prompt tokens to compute there first + c x requests in flight: a ridge
regression over exponentially forgotten sums, solved anew every ``SOLVE_EVERY`` first
tokens. It starts from a prior and knows its own error. The wait in the router's queue is
predicted from the queue's measured service rate instead (admission.py), since its
coefficient would change with every change of load.
"""

from __future__ import annotations

KEEP = 0.998
SOLVE_EVERY = 16
RIDGE = 2.0
TRUSTED_AFTER = 32
PRIOR = (0.02, 0.03, 0.05)
TOKENS_UNIT = 1000.0
REQUESTS_UNIT = 100.0


class TtftPredictor:
    """Online regression of one pool's TTFT at the engine."""

    __slots__ = ("_a", "_b", "_c", "_error_s", "_moments", "_observed", "_targets")

    def __init__(self) -> None:
        self._a, self._b, self._c = PRIOR
        self._moments = [0.0] * 5
        self._targets = [0.0] * 4
        self._observed = 0
        self._error_s = 0.0

    @property
    def trusted(self) -> bool:
        """Whether enough first tokens have been seen to refuse anyone on the prediction."""
        return self._observed >= TRUSTED_AFTER

    @property
    def error_s(self) -> float:
        """Recent mean absolute error of the predictions, seconds."""
        return self._error_s

    def predict_s(self, prefill_tokens: float, in_flight: float) -> float:
        """Return the expected seconds from dispatch to first token.

        ``prefill_tokens`` counts the prompt tokens the replica must compute first, this
        request's included; ``in_flight`` the requests it already has.
        """
        return (
            self._a + self._b * prefill_tokens / TOKENS_UNIT + self._c * in_flight / REQUESTS_UNIT
        )

    def observe(self, prefill_tokens: float, in_flight: float, ttft_s: float) -> None:
        """Learn from one first token, with the figures as they were at dispatch."""
        miss_s = abs(ttft_s - self.predict_s(prefill_tokens, in_flight))
        self._observed += 1
        self._error_s += max(0.02, 1.0 / self._observed) * (miss_s - self._error_s)
        x, z = prefill_tokens / TOKENS_UNIT, in_flight / REQUESTS_UNIT
        m, t = self._moments, self._targets
        m[0] = m[0] * KEEP + x
        m[1] = m[1] * KEEP + z
        m[2] = m[2] * KEEP + x * x
        m[3] = m[3] * KEEP + x * z
        m[4] = m[4] * KEEP + z * z
        t[0] = t[0] * KEEP + ttft_s
        t[1] = t[1] * KEEP + x * ttft_s
        t[2] = t[2] * KEEP + z * ttft_s
        t[3] = t[3] * KEEP + 1.0
        if self._observed % SOLVE_EVERY == 0:
            self._solve()

    def _solve(self) -> None:
        """Solve the 3x3 normal equations, pulled towards the prior by ``RIDGE``.

        More work never makes a first token come sooner: a slope that comes out negative
        is set to zero and the rest solved again.
        """
        fitted = self._fit(True, True)
        if fitted[1] < 0 or fitted[2] < 0:
            fitted = self._fit(fitted[1] >= 0, fitted[2] >= 0)
        self._a, self._b, self._c = (max(0.0, value) for value in fitted)

    def _fit(self, with_prefill: bool, with_load: bool) -> tuple[float, float, float]:
        sx, sz, sxx, sxz, szz = self._moments
        sy, sxy, szy, n = self._targets
        if not with_prefill:
            sx = sxz = sxy = sxx = 0.0
        if not with_load:
            sz = sxz = szy = szz = 0.0
        a0, b0 = PRIOR[0], PRIOR[1] if with_prefill else 0.0
        c0 = PRIOR[2] if with_load else 0.0
        rows = [
            [n + RIDGE, sx, sz, sy + RIDGE * a0],
            [sx, sxx + RIDGE, sxz, sxy + RIDGE * b0],
            [sz, sxz, szz + RIDGE, szy + RIDGE * c0],
        ]
        for pivot in range(3):
            scale = 1.0 / rows[pivot][pivot]
            for row in range(pivot + 1, 3):
                factor = rows[row][pivot] * scale
                for column in range(pivot, 4):
                    rows[row][column] -= factor * rows[pivot][column]
        c = rows[2][3] / rows[2][2]
        b = (rows[1][3] - rows[1][2] * c) / rows[1][1]
        a = (rows[0][3] - rows[0][1] * b - rows[0][2] * c) / rows[0][0]
        return a, b, c
