"""How many cases the property tests try.

The short form tries the same cases each time, so that a red run means that something
changed. ``make test-fast`` tries a part of them, ``make proof`` new ones, many times as many:
HEADRACE_EXAMPLES_TIMES.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, settings

TIMES = float(os.environ.get("HEADRACE_EXAMPLES_TIMES", "1"))


def examples(
    count: int, suppress_health_check: Sequence[HealthCheck] = (), **more: Any
) -> settings:
    """Return settings for ``count`` cases, however long one takes: other work runs beside."""
    return settings(
        max_examples=max(1, round(count * TIMES)),
        derandomize=TIMES <= 1,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, *suppress_health_check],
        print_blob=True,
        **more,
    )
