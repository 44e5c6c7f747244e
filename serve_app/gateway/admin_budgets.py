"""/admin/budgets: budgets set, topped up, listed and removed, by whoever has an admin key.

GET    /admin/budgets                       every budget and how it stands
PUT    /admin/budgets/{scope}/{id}          set one: {"amount_usd": "500", "window": "month"}
POST   /admin/budgets/{scope}/{id}/credits  add to its amount: {"amount_usd": "10"}
DELETE /admin/budgets/{scope}/{id}          remove it; what was spent stays in the ledger
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from serve_app.changes import Actor
from serve_app.core.budget import Balance, Budget, BudgetKey, BudgetScope, Window
from serve_app.core.calendar import HOUR_S
from serve_app.core.pricing import AMOUNT_NANOUSD_MAX, AmountTooLarge, amount_nanousd, dollars
from serve_app.errors import InvalidRequest, NotFound
from serve_app.gateway.admin import actor, from_control, json_answer, read_fields, validated
from serve_app.gateway.auth import require_admin
from serve_app.keys import KeyRecord

logger = logging.getLogger("headrace.admin")

_MAX_ID = 400


class BudgetAdmin(Protocol):
    """Where budgets are kept, as this module needs it: Control, from any router."""

    async def list_budgets(self) -> Sequence[Balance]:
        """Return every budget and how it stands."""

    async def put_budget(self, budget: Budget, by: Actor) -> None:
        """Set a budget."""

    async def add_credit(self, key: BudgetKey, amount_nanousd: int, by: Actor) -> Budget | None:
        """Add to a budget's amount; None if there is none. Raises AmountTooLarge."""

    async def remove_budget(self, key: BudgetKey, by: Actor) -> bool:
        """Remove a budget; tell whether there was one."""


class BudgetRequest(BaseModel):
    """What may be asked of a budget. Dollars are a decimal in a string, exact."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    amount_usd: str = Field(max_length=40)
    window: Literal["day", "week", "month", "rolling", "none"] = "none"
    rolling_hours: Annotated[int, Field(ge=1, le=99_999)] | None = None
    alerts: Annotated[list[Annotated[float, Field(gt=0, le=10)]], Field(max_length=16)] = []
    hard: bool = True


class CreditRequest(BaseModel):
    """What was bought."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    amount_usd: str = Field(max_length=40)


def budget_json(balance: Balance) -> dict[str, Any]:
    """Return a budget as the API shows it."""
    budget = balance.budget
    return {
        "object": "budget",
        "scope": budget.key.scope.value,
        "id": budget.key.id,
        "amount_usd": dollars(budget.amount_nanousd),
        "window": budget.window.value,
        "rolling_hours": budget.rolling_s // HOUR_S or None,
        "alerts": list(budget.alert_ratios),
        "hard": budget.hard,
        "spent_usd": dollars(balance.spent_nanousd),
        "at_routers_usd": dollars(balance.outstanding_nanousd),
        "period_start": balance.period.start_s or None,
    }


class BudgetAdministration:
    """The handlers. ``caller`` authenticates a request and returns the key it came with."""

    def __init__(self, caller: Callable[[Scope], KeyRecord], budgets: BudgetAdmin) -> None:
        self._caller = caller
        self._budgets = budgets

    def routes(self) -> list[Route]:
        """Return the routes."""
        one = "/admin/budgets/{scope}/{id:path}"
        return [
            Route("/admin/budgets", self.every, methods=["GET"]),
            Route(f"{one}/credits", self.add, methods=["POST"]),
            Route(one, self.put, methods=["PUT"]),
            Route(one, self.remove, methods=["DELETE"]),
        ]

    async def every(self, request: Request) -> Response:
        """Answer with every budget."""
        require_admin(self._caller(request.scope))
        return json_answer({"object": "list", "data": await self._all()})

    async def put(self, request: Request) -> Response:
        """Set a budget, new or in place of another."""
        caller = self._caller(request.scope)
        require_admin(caller)
        key = _key(request)
        budget = _budget(key, validated(BudgetRequest, await read_fields(request)))
        await from_control(self._budgets.put_budget(budget, actor(caller)))
        logger.info("budget %s %s set by key %s", key.scope.value, key.id, caller.key_id)
        return json_answer(await self._one(key))

    async def add(self, request: Request) -> Response:
        """Add to a budget's amount."""
        caller = self._caller(request.scope)
        require_admin(caller)
        key = _key(request)
        amount = _amount(validated(CreditRequest, await read_fields(request)).amount_usd)
        budget = await from_control(self._add(key, amount, actor(caller)))
        if budget is None:
            raise _missing(key)
        logger.info("budget %s %s raised by key %s", key.scope.value, key.id, caller.key_id)
        return json_answer(await self._one(key))

    async def remove(self, request: Request) -> Response:
        """Remove a budget."""
        caller = self._caller(request.scope)
        require_admin(caller)
        key = _key(request)
        if not await from_control(self._budgets.remove_budget(key, actor(caller))):
            raise _missing(key)
        logger.info("budget %s %s removed by key %s", key.scope.value, key.id, caller.key_id)
        return json_answer({"object": "budget", "scope": key.scope, "id": key.id, "deleted": True})

    async def _add(self, key: BudgetKey, amount: int, by: Actor) -> Budget | None:
        try:
            return await self._budgets.add_credit(key, amount, by)
        except AmountTooLarge as error:
            most = dollars(AMOUNT_NANOUSD_MAX)
            raise InvalidRequest(
                f"Invalid value for 'amount_usd': with it the budget is too large; at most {most}.",
                param="amount_usd",
            ) from error

    async def _all(self) -> list[dict[str, Any]]:
        balances = await from_control(self._budgets.list_budgets())
        return [budget_json(each) for each in balances]

    async def _one(self, key: BudgetKey) -> dict[str, Any]:
        for each in await self._all():
            if (each["scope"], each["id"]) == (key.scope.value, key.id):
                return each
        raise _missing(key)


def _key(request: Request) -> BudgetKey:
    scope, name = request.path_params["scope"], request.path_params["id"]
    if scope not in set(BudgetScope):
        known = ", ".join(each.value for each in BudgetScope)
        raise NotFound(f"There are no budgets of {scope!r:.40}; of these there are: {known}.")
    if not 0 < len(name) <= _MAX_ID:
        raise InvalidRequest(f"An id has 1 to {_MAX_ID} characters.", param="id")
    if scope in {BudgetScope.USER, BudgetScope.TAG} and "/" not in name:
        shape = f"TENANT/{scope.upper()}"
        raise InvalidRequest(f"A {scope} is named with its tenant: {shape}.", param="id")
    return BudgetKey(BudgetScope(scope), name)


def _budget(key: BudgetKey, wanted: BudgetRequest) -> Budget:
    hours = wanted.rolling_hours
    if (wanted.window == "rolling") != (hours is not None):
        raise InvalidRequest(
            "A rolling window has rolling_hours, and no other has.", param="rolling_hours"
        )
    return Budget(
        key,
        _amount(wanted.amount_usd),
        Window(wanted.window),
        (hours or 0) * HOUR_S,
        tuple(wanted.alerts),
        wanted.hard,
    )


def _amount(text: str) -> int:
    try:
        return amount_nanousd(text)
    except ValueError as error:
        raise InvalidRequest(
            f"Invalid value for 'amount_usd': {error}.", param="amount_usd"
        ) from error


def _missing(key: BudgetKey) -> NotFound:
    return NotFound(f"There is no budget of {key.scope.value} {key.id!r:.80}.", param="id")
