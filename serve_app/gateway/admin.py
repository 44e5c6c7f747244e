"""/admin/keys: keys created, listed and revoked over HTTP, by whoever has an admin key.

GET    /admin/keys                     every key, revoked ones included; never a secret
POST   /admin/keys                     a new key; the only answer that has its secret
POST   /admin/keys/{key_id}/rotation   a new key in its place; the old one ends after an overlap
DELETE /admin/keys/{key_id}            revoke for good
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.changes import Actor, Via
from serve_app.core.calendar import DAY_S
from serve_app.core.types import PriorityClass, TenantId, UserId
from serve_app.errors import ApiError, InvalidRequest, NotFound, Unavailable
from serve_app.gateway.auth import require_admin
from serve_app.gateway.http import read_body, require_json
from serve_app.gateway.invalid import from_validation, parse_object
from serve_app.keys import BOOTSTRAP_KEY_ID, KeyRecord, KeyWish
from serve_app.usage_report import BadQuery

logger = logging.getLogger("headrace.admin")

Result = TypeVar("Result")
Wanted = TypeVar("Wanted", bound=BaseModel)
ClassName = Literal["critical", "standard", "sheddable"]

MAX_BODY_BYTES: Final = 65_536
# Longer than a report over a large ledger takes.
CONTROL_S: Final = 60.0
OVERLAP_S: Final = float(DAY_S)
_LONGEST_S: Final = 10 * 366 * DAY_S


class KeyAdmin(Protocol):
    """Where keys are kept, as this module needs it: Control, from any router."""

    async def list_keys(self) -> list[KeyRecord]:
        """Return every key."""

    async def create_key(self, wish: KeyWish, by: Actor) -> tuple[str, KeyRecord]:
        """Make a key; return its secret and its record."""

    async def rotate_key(
        self, key_id: str, overlap_s: float, by: Actor
    ) -> tuple[str, KeyRecord, KeyRecord] | None:
        """Make a key in another's place; return its secret and both records, or None."""

    async def revoke_key(self, key_id: str, by: Actor) -> KeyRecord | None:
        """Revoke a key and return its record, or None if there is none."""


class KeyRequest(BaseModel):
    """What may be asked of a new key."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=200, description="What it is for.")
    tenant: str = Field("default", pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}$")
    user: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    admin: bool = False
    priority_ceiling: ClassName = "standard"
    models: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=256)]],
            Field(min_length=1, max_length=256),
        ]
        | None
    ) = None
    expires_in_s: Annotated[float, Field(gt=0, le=_LONGEST_S)] | None = None

    def wish(self, now_wall_s: float) -> KeyWish:
        """Return it as the store takes it."""
        return KeyWish(
            name=self.name,
            tenant=TenantId(self.tenant),
            user=None if self.user is None else UserId(self.user),
            admin=self.admin,
            priority_ceiling=PriorityClass[self.priority_ceiling.upper()],
            models=None if self.models is None else tuple(self.models),
            expires_at_s=None if self.expires_in_s is None else now_wall_s + self.expires_in_s,
        )


class RotationRequest(BaseModel):
    """For how long the old key works beside the new one."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    overlap_s: float = Field(OVERLAP_S, ge=0, le=_LONGEST_S)


def rotation_request(fields: dict[str, Any]) -> RotationRequest:
    """Check what is asked of a rotation.

    Raises:
        InvalidRequest: a field is unknown or wrong; ``param`` names it.
    """
    return validated(RotationRequest, fields)


def rotated_json(secret: str, record: KeyRecord, old: KeyRecord, now_s: float) -> dict[str, Any]:
    """Return a rotation as the API shows it: the new key with its secret, and the old one."""
    return {**key_json(record, now_s), "key": secret, "replaces": key_json(old, now_s)}


def key_request(fields: dict[str, Any]) -> KeyRequest:
    """Check what is asked of a new key.

    Raises:
        InvalidRequest: a field is missing, unknown or wrong; ``param`` names it.
    """
    return validated(KeyRequest, fields)


def key_json(record: KeyRecord, now_wall_s: float) -> dict[str, Any]:
    """Return a record as the API shows it. Times are whole seconds since the epoch."""
    return {
        "object": "api_key",
        "id": record.key_id,
        "name": record.name,
        "tenant": record.tenant,
        "user": record.user,
        "admin": record.admin,
        "priority_ceiling": record.priority_ceiling.name.lower(),
        "models": None if record.models is None else list(record.models),
        "state": record.state(now_wall_s).value,
        "created_at": int(record.created_at_s),
        "expires_at": None if record.expires_at_s is None else int(record.expires_at_s),
        "revoked_at": None if record.revoked_at_s is None else int(record.revoked_at_s),
    }


class KeyAdministration:
    """The handlers. ``caller`` authenticates a request and returns the key it came with."""

    def __init__(self, caller: Callable[[Scope], KeyRecord], keys: KeyAdmin) -> None:
        self._caller = caller
        self._keys = keys

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/admin/keys", self.list, methods=["GET"]),
            Route("/admin/keys", self.create, methods=["POST"]),
            Route("/admin/keys/{key_id}", self.revoke, methods=["DELETE"]),
            Route("/admin/keys/{key_id}/rotation", self.rotate, methods=["POST"]),
        ]

    async def list(self, request: Request) -> Response:
        """Answer with every key, oldest first."""
        require_admin(self._caller(request.scope))
        records = await from_control(self._keys.list_keys())
        now_s = time.time()
        return json_answer(
            {"object": "list", "data": [key_json(record, now_s) for record in records]}
        )

    async def create(self, request: Request) -> Response:
        """Make a key; its secret is in this answer and nowhere else."""
        caller = self._caller(request.scope)
        require_admin(caller)
        fields = await read_fields(request)
        now_s = time.time()
        wish = key_request(fields).wish(now_s)
        secret, record = await from_control(self._keys.create_key(wish, actor(caller)))
        logger.info("key %s created by key %s", record.key_id, caller.key_id)
        return json_answer({**key_json(record, now_s), "key": secret}, status=201)

    async def rotate(self, request: Request) -> Response:
        """Make a key in another's place; its secret is in this answer and nowhere else."""
        caller = self._caller(request.scope)
        require_admin(caller)
        key_id = _stored_id(request)
        body = await read_body(request.scope, request.receive, MAX_BODY_BYTES)
        wish = rotation_request(parse_object(body) if body else {})
        rotated = await from_control(self._keys.rotate_key(key_id, wish.overlap_s, actor(caller)))
        if rotated is None:
            raise NotFound(f"There is no valid key {key_id!r:.80}.", param="key_id")
        logger.info("key %s rotated by key %s", key_id, caller.key_id)
        return json_answer(rotated_json(*rotated, time.time()), status=201)

    async def revoke(self, request: Request) -> Response:
        """Revoke a key; doing it twice changes nothing."""
        caller = self._caller(request.scope)
        require_admin(caller)
        key_id = _stored_id(request)
        record = await from_control(self._keys.revoke_key(key_id, actor(caller)))
        if record is None:
            raise NotFound(f"There is no key {key_id!r:.80}.", param="key_id")
        logger.info("key %s revoked by key %s", record.key_id, caller.key_id)
        return json_answer(key_json(record, time.time()))


def _stored_id(request: Request) -> str:
    """Return the key id of a path, which must be a stored key's."""
    key_id = str(request.path_params["key_id"])
    if key_id == BOOTSTRAP_KEY_ID:
        raise InvalidRequest(
            "The bootstrap key comes from HEADRACE_BOOTSTRAP_KEY; unset it and restart.",
            param="key_id",
        )
    return key_id


def parameters(request: Request, *known: str) -> Mapping[str, str]:
    """Return the parameters of a URL.

    Raises:
        InvalidRequest: one of them is not ``known``.
    """
    for name in request.query_params:
        if name not in known:
            names = f"{'is' if len(known) == 1 else 'are'} {', '.join(known)}"
            raise InvalidRequest(f"Unknown parameter {name!r:.40}; known {names}.", param=name)
    return request.query_params


@contextmanager
def checked_values() -> Iterator[None]:
    """Answer for a value that is wrong, with the parameter or field that has it.

    Raises:
        InvalidRequest: in place of BadQuery.
    """
    try:
        yield
    except BadQuery as error:
        raise InvalidRequest(f"Invalid value for {error}.", param=error.field) from None


async def read_fields(request: Request) -> dict[str, Any]:
    """Return the JSON object that a request brings, of at most MAX_BODY_BYTES.

    Raises:
        InvalidRequest: it brings none.
    """
    require_json(request.scope)
    return parse_object(await read_body(request.scope, request.receive, MAX_BODY_BYTES))


def validated(model: type[Wanted], fields: dict[str, Any]) -> Wanted:
    """Return an object's fields as a model.

    Raises:
        InvalidRequest: one is missing, unknown or wrong; ``param`` names it.
    """
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error, fields) from None


def actor(caller: KeyRecord) -> Actor:
    """Return who a change is by, for the audit trail."""
    return Actor(f"key {caller.key_id}", Via.HTTP)


async def from_control(answer: Awaitable[Result]) -> Result:
    """Await Control for at most CONTROL_S; whatever goes wrong there is a 503 here.

    Serve keeps a call for a replica that is not there yet, so that nothing would end the wait for
    a Control that cannot begin.

    Raises:
        Unavailable: Control is away or its database failed.
    """
    try:
        async with asyncio.timeout(CONTROL_S):
            return await answer
    except ApiError:
        raise
    except Exception:
        logger.exception("Control did not answer")
        raise Unavailable("Control cannot be reached; try again.", retry_after_s=2.0) from None


def json_answer(body: dict[str, Any], *, status: int = 200) -> Response:
    """Return an answer that nobody may cache."""
    headers = {"cache-control": "no-store"}
    return Response(orjson.dumps(body), status, headers, media_type="application/json")
