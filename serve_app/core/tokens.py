"""Token estimates: a prompt's length from its bytes, an answer's from its tenant's past.

An estimate admits, the engine's count reconciles. Both estimators learn online from
bounded, least-recently-used tables and know their own error.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve_app.core.types import TenantId

K = TypeVar("K", bound=Hashable)

LEARNING_RATE_MIN = 0.05
POOL_LEARNING_RATE_MIN = 0.01
TENANT_TRUST_AFTER = 8.0
POOL_EVIDENCE = 16
RATIO_EVIDENCE = 2
BYTES_PER_TOKEN_PRIOR = 4.0
BYTES_PER_TOKEN_SPREAD_PRIOR = 1.0
UPPER_SPREADS = 3.0


@dataclass(frozen=True, slots=True)
class TokenEstimate:
    """Prompt tokens: most likely, and a bound rarely exceeded (never below the former)."""

    expected_tokens: int
    upper_tokens: int

    def decides(self, limit_tokens: int) -> bool:
        """Whether only an exact count can tell on which side of a limit the prompt lies."""
        return self.expected_tokens // 2 <= limit_tokens < self.upper_tokens


class _Mean:
    """A mean and mean absolute deviation that start as plain averages and then forget.

    The prior counts as ``evidence`` observations: answers that end first are the short ones.
    """

    __slots__ = ("_evidence", "count", "deviation", "error_sum", "mean", "value_sum")

    def __init__(self, prior: float, spread: float = 0.0, evidence: int = 0) -> None:
        self._evidence = evidence
        self.mean = prior
        self.deviation = spread
        self.count = 0
        self.error_sum = 0.0
        self.value_sum = 0.0

    def learn(self, value: float, rate_min: float) -> None:
        self.count += 1
        rate = max(rate_min, 1.0 / (self.count + self._evidence))
        self.deviation += rate * (abs(value - self.mean) - self.deviation)
        self.mean += rate * (value - self.mean)

    def missed(self, value: float, predicted: float, rate: float) -> None:
        keep = 1.0 - rate
        self.error_sum = self.error_sum * keep + abs(value - predicted)
        self.value_sum = self.value_sum * keep + abs(value)

    @property
    def error_ratio(self) -> float:
        return self.error_sum / self.value_sum if self.value_sum > 0 else 0.0


class _Table(Generic[K]):
    """Means by key; the least recently used goes when the table is full."""

    __slots__ = ("_capacity", "_means")

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1
        self._capacity = capacity
        self._means: OrderedDict[K, _Mean] = OrderedDict()

    def find(self, key: K) -> _Mean | None:
        return self._means.get(key)

    def claim(self, key: K, prior: float, spread: float = 0.0, evidence: int = 0) -> _Mean:
        mean = self._means.get(key)
        if mean is None:
            if len(self._means) >= self._capacity:
                self._means.popitem(last=False)
            mean = self._means[key] = _Mean(prior, spread, evidence)
        else:
            self._means.move_to_end(key)
        return mean

    def __len__(self) -> int:
        return len(self._means)


class PromptTokenEstimator:
    """Prompt tokens from UTF-8 bytes, by a bytes-per-token ratio learned per model.

    The upper bound divides by a ratio ``UPPER_SPREADS`` mean deviations lower, and never
    by less than one: no byte-level tokeniser makes more tokens than bytes.
    ``overhead_tokens`` covers the chat template.
    """

    def __init__(self, models_max: int = 256, overhead_tokens: int = 16) -> None:
        self._ratios: _Table[str] = _Table(models_max)
        self._overhead_tokens = overhead_tokens

    def estimate(self, model: str, prompt_bytes: int) -> TokenEstimate:
        """Return the estimate for a prompt of ``prompt_bytes`` >= 0 bytes."""
        known = self._ratios.find(model)
        ratio = known.mean if known else BYTES_PER_TOKEN_PRIOR
        spread = known.deviation if known else BYTES_PER_TOKEN_SPREAD_PRIOR
        lowest = max(1.0, ratio - UPPER_SPREADS * spread)
        overhead = self._overhead_tokens
        expected = overhead + int(prompt_bytes / max(1.0, ratio))
        return TokenEstimate(expected, max(expected, overhead + int(prompt_bytes / lowest)))

    def observe(self, model: str, prompt_bytes: int, prompt_tokens: int) -> None:
        """Learn from the engine's count; prompts too short to say anything are ignored."""
        content_tokens = prompt_tokens - self._overhead_tokens
        if prompt_bytes < 64 or content_tokens < 8:
            return
        known = self._ratios.claim(
            model, BYTES_PER_TOKEN_PRIOR, BYTES_PER_TOKEN_SPREAD_PRIOR, RATIO_EVIDENCE
        )
        predicted = prompt_bytes / max(1.0, known.mean)
        known.missed(content_tokens, predicted, LEARNING_RATE_MIN)
        known.learn(prompt_bytes / content_tokens, LEARNING_RATE_MIN)

    def error_ratio(self, model: str) -> float:
        """Return recent absolute error over tokens counted; 0 before the first count."""
        known = self._ratios.find(model)
        return known.error_ratio if known else 0.0


class OutputPredictor:
    """Expected output tokens of one pool's requests, by tenant.

    A tenant's mean counts as much as it has evidence: n / (n + 8) of the prediction
    comes from its own n answers, the rest from the pool's mean. Never above the
    request's own ``max_tokens``.
    """

    def __init__(self, prior_tokens: float, tenants_max: int) -> None:
        self._pool = _Mean(prior_tokens, evidence=POOL_EVIDENCE)
        self._tenants: _Table[TenantId] = _Table(tenants_max)

    def predict(self, tenant: TenantId, max_tokens: int) -> int:
        """Return the expected output of a request, in [1, max(1, max_tokens)]."""
        expected = self._pool.mean
        known = self._tenants.find(tenant)
        if known is not None:
            trust = known.count / (known.count + TENANT_TRUST_AFTER)
            expected += trust * (known.mean - expected)
        return max(1, min(max_tokens, int(expected + 0.5)))

    def observe(self, tenant: TenantId, completion_tokens: int, predicted_tokens: int) -> None:
        """Learn from an answer that ended by itself; a cut one says nothing of its length."""
        known = self._tenants.claim(tenant, self._pool.mean)
        known.missed(completion_tokens, predicted_tokens, LEARNING_RATE_MIN)
        known.learn(completion_tokens, LEARNING_RATE_MIN)
        self._pool.missed(completion_tokens, predicted_tokens, POOL_LEARNING_RATE_MIN)
        self._pool.learn(completion_tokens, POOL_LEARNING_RATE_MIN)

    def error_ratio(self, tenant: TenantId | None = None) -> float:
        """Return recent absolute error over tokens produced, of a tenant or of the pool."""
        known = self._pool if tenant is None else self._tenants.find(tenant)
        return known.error_ratio if known else 0.0

    def __len__(self) -> int:
        return len(self._tenants)
