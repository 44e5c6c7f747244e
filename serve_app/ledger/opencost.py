"""What nodes were billed, as OpenCost tells it over plain HTTP.

Its answers are material and not truth: numbers come as numbers, as strings, as null (a NaN
there) or not at all; sets of assets as an object or as a list of them; behind the UI the
routes sit under ``/model``. A figure that is none is None here, never zero. Values are
rounded to five decimals, so ask for an hour or more.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final

import httpx

from serve_app.core.pricing import NANOUSD
from serve_app.core.reconciliation import NodeBill

BODY_BYTES_MAX: Final = 64 * 1024 * 1024
# A node that costs more in a window is a slip, and so is one that costs less than nothing.
USD_MAX: Final = Decimal(10**9)
_WINDOW_MIN_S: Final = 3600
_PREFIXES: Final = ("", "/model")


class OpenCostUnavailable(RuntimeError):
    """No usable answer: an outage, a slow answer, an error, or not what was asked for."""


class OpenCost:
    """A client of one OpenCost at ``url``; every call ends within ``timeout_s``."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 10.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._prefixes: tuple[str, ...] = _PREFIXES
        self._client = httpx.AsyncClient(
            base_url=url.rstrip("/"), timeout=timeout_s, transport=transport
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def node_bills(self, from_s: int, until_s: int) -> tuple[NodeBill, ...]:
        """Return what each node cost between two times, wall seconds; an hour or more.

        Raises:
            OpenCostUnavailable: there is no usable answer; the message says why.
            ValueError: the window is shorter than an hour.
        """
        if until_s - from_s < _WINDOW_MIN_S:
            raise ValueError("OpenCost rounds to 0.00001 dollars: ask for an hour or more")
        window = f"{_time(from_s)},{_time(until_s)}"
        data = await self._get("/assets", {"window": window, "accumulate": "true"})
        return tuple(sorted(_bills(data), key=lambda bill: bill.node))

    async def _get(self, path: str, params: dict[str, str]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._first_answer(path, params)
        except TimeoutError as error:
            raise OpenCostUnavailable(f"no answer within {self._timeout_s:g} s") from error
        except httpx.HTTPError as error:
            raise OpenCostUnavailable(f"{type(error).__name__}: {error}") from error

    async def _first_answer(self, path: str, params: dict[str, str]) -> Any:
        """Ask under each prefix until one has the route; keep that one."""
        problem = ""
        for prefix in self._prefixes:
            status, body = await self._body(prefix + path, params)
            if status == 200:
                try:
                    data = _data(body)
                except ValueError as error:
                    problem = str(error)
                    continue
                self._prefixes = (prefix,)
                return data
            problem = f"status {status}"
            if status != 404:
                break
        raise OpenCostUnavailable(f"{path}: {problem}")

    async def _body(self, path: str, params: dict[str, str]) -> tuple[int, bytes]:
        body = bytearray()
        async with self._client.stream("GET", path, params=params) as response:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > BODY_BYTES_MAX:
                    raise OpenCostUnavailable(f"{path}: more than {BODY_BYTES_MAX} bytes")
            return response.status_code, bytes(body)


def _data(body: bytes) -> Any:
    """Return the ``data`` of an answer.

    Raises:
        ValueError: it is no JSON, an error in the guise of one, or of another route.
    """
    try:
        answer = json.loads(body, parse_float=Decimal, parse_constant=lambda _: None)
    except (ValueError, RecursionError) as error:
        raise ValueError("the answer is no JSON") from error
    if not isinstance(answer, dict):
        raise ValueError("the answer is no object")
    if answer.get("code", 200) != 200:
        raise ValueError(f"code {str(answer['code'])[:20]}: {str(answer.get('message'))[:200]}")
    data = answer.get("data")
    if not isinstance(data, dict | list):
        raise ValueError("the answer has no data")
    assets = [asset for each in _sets(data) for asset in each.values() if isinstance(asset, dict)]
    if assets and not any("type" in asset for asset in assets):
        raise ValueError("the answer has no assets: its rows say no type")
    return data


def _sets(data: Any) -> Iterator[dict[str, Any]]:
    for assets in data if isinstance(data, list) else [data]:
        if isinstance(assets, dict):
            yield assets


def _bills(data: Any) -> Iterator[NodeBill]:
    for assets in _sets(data):
        for key, asset in assets.items():
            if not isinstance(asset, dict) or asset.get("type") != "Node":
                continue
            yield _bill(key, asset)


def _bill(key: str, asset: dict[str, Any]) -> NodeBill:
    properties = asset.get("properties")
    name = properties.get("name") if isinstance(properties, dict) else None
    if not isinstance(name, str) or not name:
        name = key.rpartition("/")[2]
    total = _number(asset.get("totalCost"))
    hours = _number(asset.get("GPUHours", asset.get("gpuHours")))
    return NodeBill(
        name,
        None if total is None else round(total * NANOUSD),
        None if hours is None else Fraction(hours),
    )


def _number(value: object) -> Decimal | None:
    """Return a number in [0, USD_MAX], however it is written; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        return None
    try:
        number = Decimal(value)
    except InvalidOperation:
        return None
    return number if number.is_finite() and 0 <= number <= USD_MAX else None


def _time(time_s: int) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
