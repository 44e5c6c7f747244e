"""Numbers on the command line that must lie somewhere."""

from __future__ import annotations

from math import isfinite

from serve_app.errors import ConfigError


def positive(flag: str, value: float | None, most: float = 1e9) -> None:
    """Check a number that must be above 0, if it is given.

    Raises:
        ConfigError: it is not.
    """
    if value is not None and not (isfinite(value) and 0 < value <= most):
        raise ConfigError(f"{flag} must be above 0 and at most {most:g}, not {value:g}")


def share(flag: str, value: float | None) -> None:
    """Check a share above 0 and up to 1, if it is given.

    Raises:
        ConfigError: it is none.
    """
    if value is not None and not 0 < value <= 1:
        raise ConfigError(f"{flag} must be above 0 and at most 1, not {value:g}")
