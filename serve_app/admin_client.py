"""Keys and usage as the command line reaches them: in the database, or over /admin."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from serve_app.changes import PARAMETERS, Actor, ChangeQuery, change_json
from serve_app.config_costs import CostSettings
from serve_app.errors import ApiError, ConfigError
from serve_app.gateway.admin import key_json, key_request, rotated_json, rotation_request
from serve_app.gateway.admin_usage import reversal_json
from serve_app.keys import BOOTSTRAP_KEY_ID
from serve_app.ledger.database import Database
from serve_app.ledger.insights import insight
from serve_app.ledger.prices import PriceStore
from serve_app.ledger.report import report
from serve_app.ledger.store import KeyStore
from serve_app.ledger.trail import Trail
from serve_app.ledger.usage import UsageLedger
from serve_app.terminal import CommandFailed, note
from serve_app.usage_report import UsageQuery

_TIMEOUT_S = 15.0


class Keys(Protocol):
    """What `headrace keys` does. Records are the JSON objects of /admin/keys.

    Every method raises CommandFailed or StoreUnavailable with one line for the user.
    """

    def create(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Make a key; the answer's `key` is its secret."""

    def list(self) -> list[dict[str, Any]]:
        """Return every key."""

    def rotate(self, key_id: str, overlap_s: float) -> dict[str, Any]:
        """Make a key in another's place; the answer's `key` is its secret."""

    def revoke(self, key_id: str) -> dict[str, Any]:
        """Revoke a key."""


class DatabaseKeys:
    """Keys in the database that a configuration names; the service need not run."""

    def __init__(self, url: str, by: Actor) -> None:
        self._by = by
        self._store = KeyStore(url)
        if self._store.is_new:
            note(
                f"headrace: made a new key store, {self._store.place}; a service that was "
                "started in another folder has one of its own"
            )

    def create(self, fields: dict[str, Any]) -> dict[str, Any]:
        """See Keys."""
        now_s = time.time()
        try:
            secret, record = self._store.create(key_request(fields).wish(now_s), self._by)
        except ApiError as error:
            raise CommandFailed(str(error)) from error
        return {**key_json(record, now_s), "key": secret}

    def list(self) -> list[dict[str, Any]]:
        """See Keys."""
        return [key_json(record, time.time()) for record in self._store.list()]

    def rotate(self, key_id: str, overlap_s: float) -> dict[str, Any]:
        """See Keys."""
        _require_stored(key_id)
        try:
            wish = rotation_request({"overlap_s": overlap_s})
        except ApiError as error:
            raise CommandFailed(str(error)) from error
        rotated = self._store.rotate(key_id, wish.overlap_s, self._by)
        if rotated is None:
            raise CommandFailed(f"there is no valid key {key_id!r}; see `headrace keys list`")
        return rotated_json(*rotated, time.time())

    def revoke(self, key_id: str) -> dict[str, Any]:
        """See Keys."""
        _require_stored(key_id)
        record = self._store.revoke(key_id, self._by)
        if record is None:
            raise CommandFailed(f"there is no key {key_id!r}; see `headrace keys list`")
        return key_json(record, time.time())


def _require_stored(key_id: str) -> None:
    if key_id == BOOTSTRAP_KEY_ID:
        raise CommandFailed(
            "the bootstrap key comes from HEADRACE_BOOTSTRAP_KEY; unset it and restart"
        )


class _Service:
    """The /admin routes of a running service."""

    def __init__(
        self, url: str, admin_key: str, transport: httpx.BaseTransport | None = None
    ) -> None:
        """``url`` is the service's root; ``transport`` replaces the network in tests.

        Raises:
            ConfigError: the URL is not one.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"the URL must start with http:// or https://; got {url!r:.80}")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(
            headers={"authorization": f"Bearer {admin_key}"},
            timeout=_TIMEOUT_S,
            transport=transport,
        )

    def _get(self, path: str, given: Mapping[str, object] = MappingProxyType({})) -> dict[str, Any]:
        """Ask with the parameters that are given at all."""
        wanted = {name: str(value) for name, value in given.items() if value is not None}
        return self._call("GET", path, params=wanted)

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, self._url + path, **options)
            body = answer.json()
        except httpx.InvalidURL as error:
            raise ConfigError(f"{self._url!r:.80} is not a URL: {error}") from error
        except httpx.HTTPError as error:
            raise CommandFailed(f"cannot reach {self._url}: {error}; is it running?") from error
        except ValueError as error:
            raise CommandFailed(
                f"{self._url}{path} answered {answer.status_code}, and not as Headrace does"
            ) from error
        if answer.is_error:
            raise CommandFailed(_problem(answer.status_code, body))
        assert isinstance(body, dict)
        return body


class HttpKeys(_Service):
    """Keys of a running service."""

    def create(self, fields: dict[str, Any]) -> dict[str, Any]:
        """See Keys."""
        return self._call("POST", "/admin/keys", json=fields)

    def list(self) -> list[dict[str, Any]]:
        """See Keys."""
        records: list[dict[str, Any]] = self._get("/admin/keys")["data"]
        return records

    def rotate(self, key_id: str, overlap_s: float) -> dict[str, Any]:
        """See Keys."""
        return self._call("POST", f"/admin/keys/{key_id}/rotation", json={"overlap_s": overlap_s})

    def revoke(self, key_id: str) -> dict[str, Any]:
        """See Keys."""
        return self._call("DELETE", f"/admin/keys/{key_id}")


class HttpUsage(_Service):
    """The ledger of a running service."""

    def usage(self, by: str, from_: str | None, to: str | None) -> dict[str, Any]:
        """Return a report as /admin/usage answers it.

        Raises:
            CommandFailed: the service cannot be reached or refuses.
        """
        return self._get("/admin/usage", {"by": by, "from": from_, "to": to})

    def insight(self, name: str, from_: str | None, to: str | None) -> dict[str, Any]:
        """Return a report on cost as /admin/usage/{name} answers it.

        Raises:
            CommandFailed: the service cannot be reached or refuses.
        """
        return self._get(f"/admin/usage/{name}", {"from": from_, "to": to})

    def reverse(self, request_id: str, reason: str) -> dict[str, Any]:
        """Take back what a request was billed, as /admin/usage/{request_id}/reversal does.

        Raises:
            CommandFailed: the service cannot be reached or refuses.
        """
        path = f"/admin/usage/{quote(request_id, safe='')}/reversal"
        return self._call("POST", path, json={"reason": reason})


class HttpAudit(_Service):
    """The audit trail of a running service."""

    def changes(self, query: ChangeQuery) -> list[dict[str, Any]]:
        """Return changes as /admin/audit answers them.

        Raises:
            CommandFailed: the service cannot be reached or refuses.
        """
        given = {name: getattr(query, name) for name in PARAMETERS}
        found: list[dict[str, Any]] = self._get("/admin/audit", given)["data"]
        return found


def database_changes(url: str, query: ChangeQuery) -> list[dict[str, Any]]:
    """Return changes from the database itself, as /admin/audit answers them.

    Raises:
        StoreUnavailable: it failed.
    """
    with closing(Database(url)) as database:
        return [change_json(each) for each in Trail(database).changes(query)]


def database_usage(url: str, query: UsageQuery, costs: CostSettings) -> dict[str, Any]:
    """Return a report from the database itself.

    Raises:
        StoreUnavailable: it failed.
    """
    with closing(Database(url)) as database:
        return report(database, query, costs.prices(), costs.idle_rules())


def database_reversal(url: str, request_id: str, reason: str, by: Actor) -> dict[str, Any]:
    """Take back what a request was billed, in the database itself.

    Raises:
        CommandFailed: there is no such request.
        StoreUnavailable: it failed.
    """
    with closing(Database(url)) as database:
        done = UsageLedger(database, PriceStore(database)).reverse(request_id, reason, by)
    if done is None:
        raise CommandFailed(f"the ledger has no request {request_id!r:.80}")
    return reversal_json(done)


def database_insight(
    url: str, name: str, query: UsageQuery, settings: CostSettings
) -> dict[str, Any]:
    """Return a report on cost from the database itself; see ledger.insights.

    Raises:
        StoreUnavailable: it failed.
    """
    with closing(Database(url)) as database:
        return insight(database, name, query, settings)


def _problem(status: int, body: object) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    if status == 401:
        return "the service does not know this admin key (HEADRACE_ADMIN_KEY or --admin-key)"
    return f"the service answered {status}: {message or repr(body)[:200]}"
