"""Where a command finds what it administers: a configuration's database, or a running service."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve_app.errors import ConfigError

if TYPE_CHECKING:
    from serve_app.changes import Actor
    from serve_app.config_costs import CostSettings


@dataclass(frozen=True, slots=True)
class Service:
    """A running service and a key for its /admin routes."""

    url: str
    admin_key: str


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """Add --config, --url and --admin-key."""
    place = parser.add_argument_group("where", "the database of --config, or a running service")
    place.add_argument("--config", metavar="FILE", help="use the database that FILE names")
    place.add_argument("--url", help="use the service at this URL (default: HEADRACE_URL)")
    place.add_argument(
        "--admin-key",
        metavar="KEY",
        help="default: HEADRACE_ADMIN_KEY, which other users of this machine cannot see",
    )


def place(args: argparse.Namespace, what: str) -> Service | str:
    """Return the service, or the database's URL; the command line wins over the environment.

    ``what`` is looked for, in the words of a message.

    Raises:
        ConfigError: neither is named, or both, or there is no admin key.
    """
    if args.config and args.url:
        raise ConfigError("--config and --url exclude each other")
    url = args.url or (None if args.config else os.environ.get("HEADRACE_URL"))
    if url:
        admin_key = args.admin_key or os.environ.get("HEADRACE_ADMIN_KEY")
        if not admin_key:
            raise ConfigError("an admin key is needed: set HEADRACE_ADMIN_KEY")
        return Service(url, admin_key)
    if not args.config:
        raise ConfigError(
            f"say where {what} are: --config FILE, or --url URL with HEADRACE_ADMIN_KEY set"
        )
    return database_url(args.config)


@contextmanager
def checked_options() -> Iterator[None]:
    """Say of a value that is wrong which option has it.

    Raises:
        ConfigError: in place of BadQuery.
    """
    from serve_app.usage_report import BadQuery

    try:
        yield
    except BadQuery as error:
        raise ConfigError(f"--{error}") from None


def actor() -> Actor:
    """Return who runs a command, for the audit trail of a database that it changes."""
    from serve_app.changes import Actor, Via

    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A container's user need not have a name.
        user = f"uid {os.getuid()}"
    return Actor(f"{user}@{socket.gethostname()}", Via.COMMAND)


def cost_settings(config: str) -> CostSettings:
    """Return what nodes cost, as a configuration says.

    Raises:
        ConfigError: the configuration is wrong.
    """
    from serve_app.config_file import load

    return load(config).control.costs


def database_url(config: str) -> str:
    """Return the URL of the database that a configuration names.

    Raises:
        ConfigError: the configuration is wrong.
    """
    from serve_app.config_file import load

    return load(config).control.database
