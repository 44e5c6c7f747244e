"""How many cases the property tests try.

The short form tries the same cases each time, so that a red run means that something
changed. ``make test-fast`` tries a part of them, ``make proof`` new ones, many times as many:
HEADRACE_EXAMPLES_TIMES.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

TIMES = float(os.environ.get("HEADRACE_EXAMPLES_TIMES", "1"))


def examples(count: int, **more: Any) -> settings:
    """Return settings for ``count`` cases, without a deadline: other work runs beside."""
    return settings(
        max_examples=max(1, round(count * TIMES)),
        derandomize=TIMES <= 1,
        deadline=None,
        print_blob=True,
        **more,
    )
