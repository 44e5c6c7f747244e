"""``headrace keys``: create, list, rotate and revoke API keys."""

from __future__ import annotations

import argparse
import re
import time
from typing import TYPE_CHECKING, Any

from serve_app.commands._place import Service, actor, add_place_options, place
from serve_app.errors import ConfigError
from serve_app.terminal import Subparsers, command, note, out, out_json, table

if TYPE_CHECKING:
    from serve_app.admin_client import Keys

_EXAMPLE = """\
headrace keys create --name laptop --config configs/local.yaml
headrace keys list --config configs/local.yaml
HEADRACE_URL=http://127.0.0.1:8000 HEADRACE_ADMIN_KEY=hr-... headrace keys revoke k7f3m2qa"""
_CREATE_EXAMPLE = """\
headrace keys create --name laptop --config configs/local.yaml
headrace keys create --name batch --tenant acme --ceiling sheddable --expires 30d
headrace keys create --name bot --models smollm2,gpt-4o-mini --json"""
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(subparsers, "keys", "Create, list, rotate and revoke API keys.", _EXAMPLE)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = command(
        actions, "create", "Create an API key; it is shown once and kept nowhere.", _CREATE_EXAMPLE
    )
    _add_create_options(create)
    listing = command(
        actions, "list", "List API keys.", "headrace keys list --config configs/local.yaml"
    )
    listing.add_argument("--all", action="store_true", help="revoked and expired keys too")
    listing.set_defaults(run=_list)
    rotate = command(
        actions,
        "rotate",
        "Make a key in another's place: same scope, same lifetime anew; shown once.",
        "headrace keys rotate k7f3m2qa --overlap 12h --config configs/local.yaml",
    )
    rotate.add_argument("key_id", metavar="KEY_ID", help="as `headrace keys list` shows it")
    rotate.add_argument(
        "--overlap",
        metavar="TIME",
        default="24h",
        help="the old key works for so long beside the new one (default: %(default)s)",
    )
    rotate.set_defaults(run=_rotate)
    revoke = command(
        actions,
        "revoke",
        "Revoke an API key for good; routers follow within two seconds.",
        "headrace keys revoke k7f3m2qa --config configs/local.yaml",
    )
    revoke.add_argument("key_id", metavar="KEY_ID", help="as `headrace keys list` shows it")
    revoke.set_defaults(run=_revoke)
    for action in (create, listing, rotate, revoke):
        add_place_options(action)
        action.add_argument("--json", action="store_true", help="print JSON")


def _add_create_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="what the key is for")
    parser.add_argument("--tenant", default="default", help="who pays (default: default)")
    parser.add_argument("--user", help="the end user, if the key belongs to one")
    parser.add_argument("--admin", action="store_true", help="may use admin routes")
    parser.add_argument(
        "--ceiling",
        choices=("critical", "standard", "sheddable"),
        default="standard",
        help="the most important class it may ask for (default: standard)",
    )
    parser.add_argument("--models", metavar="A,B", help="the models it may use (default: all)")
    parser.add_argument("--expires", metavar="TIME", help="lifetime such as 90m, 12h or 30d")
    parser.set_defaults(run=_create)


def _create(args: argparse.Namespace) -> int:
    fields = {
        "name": args.name,
        "tenant": args.tenant,
        "user": args.user,
        "admin": args.admin,
        "priority_ceiling": args.ceiling,
        "models": args.models.split(",") if args.models else None,
        "expires_in_s": _duration_s("--expires", args.expires) if args.expires else None,
    }
    return _show_secret(args, _keys(args).create(fields))


def _rotate(args: argparse.Namespace) -> int:
    overlap_s = _duration_s("--overlap", args.overlap)
    rotated = _keys(args).rotate(_key_id(args.key_id), overlap_s)
    if not args.json:
        old = rotated["replaces"]
        note(f"key {old['id']} works until {_local_time(old['expires_at'])}")
    return _show_secret(args, rotated)


def _show_secret(args: argparse.Namespace, created: dict[str, Any]) -> int:
    if args.json:
        out_json(created)
        return 0
    note(f"key {created['id']} of tenant {created['tenant']}, shown only now:")
    out(created["key"])
    return 0


def _list(args: argparse.Namespace) -> int:
    records = _keys(args).list()
    shown = [record for record in records if args.all or record["state"] == "valid"]
    if args.json:
        out_json(shown)
        return 0
    header = ("ID", "NAME", "TENANT", "USER", "ADMIN", "CEILING", "MODELS", "STATE", "EXPIRES")
    out(table(header, [_cells(record) for record in shown]))
    if len(shown) < len(records):
        note(f"{len(records) - len(shown)} revoked or expired; --all shows them")
    return 0


def _revoke(args: argparse.Namespace) -> int:
    record = _keys(args).revoke(_key_id(args.key_id))
    if args.json:
        out_json(record)
    else:
        out(f"revoked {record['id']} ({record['name']}, tenant {record['tenant']})")
    return 0


def _key_id(text: str) -> str:
    """Return the id that is meant; whoever has only the secret has it too: it is in there."""
    secret = re.fullmatch(r"(?:hr-)?([a-z0-9]{8})(?:-[A-Za-z0-9_-]{43})?", text)
    return secret.group(1) if secret else text


def _local_time(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at_s))


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    expires_at = record["expires_at"]
    return (
        record["id"],
        record["name"],
        record["tenant"],
        record["user"] or "-",
        "yes" if record["admin"] else "-",
        record["priority_ceiling"],
        ",".join(record["models"]) if record["models"] else "all",
        record["state"],
        _local_time(expires_at) if expires_at else "never",
    )


def _keys(args: argparse.Namespace) -> Keys:
    """Return where keys are: what was said on the command line wins over the environment."""
    from serve_app.admin_client import DatabaseKeys, HttpKeys

    where = place(args, "the keys")
    if isinstance(where, Service):
        return HttpKeys(where.url, where.admin_key)
    return DatabaseKeys(where, actor())


def _duration_s(option: str, text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if not match:
        raise ConfigError(f"{option} must be a number with s, m, h, d or w; got {text!r:.40}")
    return float(int(match.group(1)) * _UNITS_S[match.group(2)])
