"""A provider of Terraform that knows schemas and nothing else: enough to validate and to plan.

    python -m tests.cluster.fake_provider google

prints the address it listens on and serves until its standard input ends. Terraform finds it by
TF_REATTACH_PROVIDERS. It speaks the little of the plugin protocol 5 (tfplugin5.proto) that this
takes, written by hand. A plan is what was asked for; data and passwords are made up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec

SCHEMAS = json.loads((Path(__file__).parent / "provider_schemas.json").read_text())
PASSWORD = {
    "attributes": {
        "length": "r:number",
        "special": "o:bool",
        "result": "c:string",
        "bcrypt_hash": "c:string",
        "id": "c:string",
    },
    "blocks": {},
}
# hashicorp/random has no package; this is what we use of it.
RANDOM = {"resource": {"random_password": PASSWORD}, "data": {}}
# What stands in a provider's own block.
SETTINGS = {
    "google": {"project": "o:string", "region": "o:string"},
    "aws": {"region": "o:string", "allowed_account_ids": "o:dynamic"},
    "random": {},
}
DEFAULT_TAGS = {"attributes": {"tags": "o:dynamic"}, "blocks": {}, "many": False, "required": False}
LIST = 2
DELIMITED = 2
# As Terraform writes a value that is not known yet.
UNKNOWN = msgspec.msgpack.Ext(0, b"\0")


def field(number: int, value: bytes | str | int) -> bytes:
    """Encode one field of a protobuf message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def attribute(name: str, described: str) -> bytes:
    """Encode ``Schema.Attribute`` from the letter and type of provider_schemas.json."""
    letter, _, type_ = described.partition(":")
    kind, _, element = type_.rstrip(")").partition("(")
    encoded = field(1, name) + field(2, json.dumps([kind, element] if element else type_))
    flags = {"r": [4], "o": [5, 6], "c": [6]}[letter]
    if name.endswith("_wo"):
        flags = [5, 10]  # write-only: it takes ephemeral values and is in no state
    return encoded + b"".join(field(flag, 1) for flag in flags)


def block(described: dict[str, Any]) -> bytes:
    """Encode ``Schema.Block``.

    A block that may come many times cannot hold what is of any type: what is only computed of
    that kind is left out, nothing reads it.
    """
    attributes = [
        field(2, attribute(name, about))
        for name, about in described["attributes"].items()
        if about != "c:dynamic" or "many" not in described
    ]
    nested = []
    for name, inner in described["blocks"].items():
        encoded = field(1, name) + field(2, block(inner)) + field(3, LIST)
        encoded += field(4, 1) if inner["required"] else b""
        encoded += b"" if inner["many"] else field(5, 1)
        nested.append(field(3, encoded))
    return b"".join(attributes + nested)


def schema(described: dict[str, Any]) -> bytes:
    """Encode ``Schema``."""
    return field(2, block(described))


def answer(provider: str) -> bytes:
    """Encode ``GetProviderSchema.Response``."""
    known = RANDOM if provider == "random" else SCHEMAS
    own = {"attributes": SETTINGS[provider], "blocks": {}}
    if provider == "aws":
        own["blocks"] = {"default_tags": DEFAULT_TAGS}
    parts = [field(1, schema(own))]
    for number, kind in ((2, "resource"), (3, "data")):
        for name, described in known[kind].items():
            if name.startswith(f"{provider}_"):
                parts.append(field(number, field(1, name) + field(2, schema(described))))
    if provider == "random":
        parts.append(field(8, field(1, "random_password") + field(2, schema(PASSWORD))))
    return b"".join(parts)


def parts_of(message: bytes) -> dict[int, bytes]:
    """Return the length-delimited fields of a protobuf message by number, the last of each."""
    found, place = {}, 0
    while place < len(message):
        tag, place = _read(message, place)
        value, place = _read(message, place)
        if tag & 7 == DELIMITED:
            found[tag >> 3] = message[place : place + value]
            place += value
    return found


def _read(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place


def plan(request: bytes, _context: Any) -> bytes:
    """Plan what was asked for; what only the cloud can know is unknown, secrets are not kept."""
    given = parts_of(request)
    values = msgspec.msgpack.decode(parts_of(given[3])[1])
    settled = None if values is None else settle(values, described("resource", given[1].decode()))
    return field(1, field(1, msgspec.msgpack.encode(settled)))


def settle(values: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Return a block as a provider plans it."""
    settled = dict(values)
    for name, type_ in about["attributes"].items():
        if name.endswith("_wo"):
            settled[name] = None
        elif name in settled and settled[name] is None and (type_.startswith("c:") or name == "id"):
            settled[name] = UNKNOWN
    for name, inner in about["blocks"].items():
        settled[name] = [settle(each, inner) for each in settled[name]]
    return settled


def read(request: bytes, _context: Any) -> bytes:
    """Return a data source, or an ephemeral value, with made-up strings where it had none."""
    given = parts_of(request)
    values = msgspec.msgpack.decode(parts_of(given[2])[1])
    for name, type_ in described("data", given[1].decode())["attributes"].items():
        if values[name] is None and type_.endswith(":string"):
            values[name] = "0123456789"
    return field(1, msgspec.msgpack.encode(values))


def described(kind: str, name: str) -> dict[str, Any]:
    """Return the schema of a resource, a data source or an ephemeral value."""
    found: dict[str, Any] = PASSWORD if name == "random_password" else SCHEMAS[kind][name]
    return found


def handlers(provider: str) -> Iterable[tuple[str, Callable[[bytes, Any], bytes]]]:
    """Return what is answered to each call."""
    schemas = answer(provider)
    yield "GetSchema", lambda _request, _context: schemas
    # The configuration given is the configuration prepared; nothing is said against any.
    yield "PrepareProviderConfig", lambda request, _context: request
    for kind in ("ResourceType", "DataSource", "EphemeralResource"):
        yield f"Validate{kind}Config", lambda _request, _context: b""
    yield "PlanResourceChange", plan
    yield "ReadDataSource", lambda request, context: field(1, read(request, context))
    yield "OpenEphemeralResource", lambda request, context: field(3, read(request, context))
    for call in ("Configure", "CloseEphemeralResource", "Stop"):
        yield call, lambda _request, _context: b""


def main() -> None:
    provider = sys.argv[1]
    server = grpc.server(ThreadPoolExecutor(4))
    methods = {name: grpc.unary_unary_rpc_method_handler(f) for name, f in handlers(provider)}
    service = grpc.method_handlers_generic_handler("tfplugin5.Provider", methods)
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    sys.stdin.read()
    server.stop(None)


if __name__ == "__main__":
    main()
