"""What nodes cost, and where their bills are read: a part of Control's config."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from serve_app.config_base import Strict
from serve_app.core.calendar import NS_PER_S
from serve_app.core.idle import IdlePolicy, IdleRule
from serve_app.core.pricing import nanousd
from serve_app.core.reconciliation import Rate
from serve_app.core.true_cost import InstancePrice
from serve_app.core.types import TenantId

_USD_PER_HOUR_MAX = 100_000


def _moment_s(text: str) -> int:
    """Return a date or time, UTC unless it says otherwise, as whole wall seconds."""
    moment = datetime.fromisoformat(text)
    whole = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return int(whole.timestamp())


def _moment(value: object) -> str:
    """Return a date or time as text: YAML reads one as such unless it is quoted."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time(tzinfo=UTC))
    text = value.isoformat() if isinstance(value, datetime) else str(value)
    try:
        _moment_s(text)
    except ValueError:
        raise ValueError(f"write 2026-01-31 or 2026-01-31T05:00Z; got {text!r:.40}") from None
    return text


def _price(value: float) -> float:
    nanousd(str(Decimal(repr(value))))
    return value


ClassName = Literal["critical", "standard", "sheddable"]
Moment = Annotated[str, BeforeValidator(_moment)]
UsdPerHour = Annotated[float, Field(ge=0, le=_USD_PER_HOUR_MAX), AfterValidator(_price)]


class InstanceSettings(Strict):
    """The price of one kind of instance; zero is a price."""

    usd_per_hour: UsdPerHour | dict[Moment, UsdPerHour] = Field(
        description="One price for all time, or prices by the date or time they hold from."
    )
    per: Literal["instance", "gpu"] = Field(
        "instance", description="`gpu`: the price of each GPU that a replica holds."
    )

    def to_core(self) -> InstancePrice:
        """Return the price as core reads it."""
        given = self.usd_per_hour
        dated = {0: given} if isinstance(given, float) else _by_time(given)
        rates = tuple(
            Rate(from_s * NS_PER_S, nanousd(str(Decimal(repr(dated[from_s])))))
            for from_s in sorted(dated)
        )
        return InstancePrice(rates, self.per == "gpu")


def _by_time(given: dict[str, float]) -> dict[int, float]:
    return {_moment_s(moment): price for moment, price in given.items()}


class OpenCostSettings(Strict):
    """An OpenCost whose bills of nodes are read, apart from serving."""

    url: str = Field(pattern=r"^https?://", description="Such as http://opencost:9003.")
    period_s: float = Field(600, ge=1, le=86_400, description="How often it is asked.")
    timeout_s: float = Field(10, gt=0, le=300, description="Each answer ends within this.")
    look_back_hours: int = Field(
        48, ge=1, le=744, description="Whole hours read again, since bills come late and change."
    )


class IdleSettings(Strict):
    """Who bears the idle time of a pool. It is a column of its own in any case."""

    policy: IdlePolicy = Field(
        IdlePolicy.UNALLOCATED,
        description="Nobody, each tenant by what its requests cost, or by what is kept for it.",
    )
    reserved: dict[
        Annotated[str, Field(min_length=1, max_length=64)], Annotated[int, Field(ge=1, le=10**9)]
    ] = Field(
        default_factory=dict,
        max_length=10_000,
        description="Capacity kept for each tenant, in any unit: for by_reservation.",
    )

    @model_validator(mode="after")
    def _reserves(self) -> IdleSettings:
        if (self.policy is IdlePolicy.BY_RESERVATION) != bool(self.reserved):
            raise ValueError("reserved and policy: by_reservation go together")
        return self

    def to_core(self) -> IdleRule:
        """Return the rule as core reads it."""
        reserved = {TenantId(tenant): kept for tenant, kept in self.reserved.items()}
        return IdleRule(self.policy, reserved)


class CostSettings(Strict):
    """What the time of replicas costs."""

    instances: dict[Annotated[str, Field(min_length=1, max_length=128)], InstanceSettings] = Field(
        default_factory=dict,
        max_length=1000,
        description="By a pool's `instance`; others pay by their node's bill.",
    )
    opencost: OpenCostSettings | None = None
    idle: dict[Annotated[str, Field(min_length=1, max_length=64)], IdleSettings] = Field(
        default_factory=dict,
        max_length=1000,
        description="By pool: who bears its idle time; a pool without an entry bears its own.",
    )
    ttft_slo_s: dict[ClassName, Annotated[float, Field(gt=0)]] = Field(
        {"critical": 1.0, "standard": 2.0, "sheddable": 10.0},
        min_length=1,
        description="A request is in time if its first token came within its class's.",
    )
    watch_period_s: float = Field(
        60, ge=1, le=3600, description="How often Control looks whether an hour is over."
    )
    alert_gap_ratio: float = Field(
        0.01, gt=0, le=1, description="A node's gap above this part of its bill is an alert."
    )

    def prices(self) -> dict[str, InstancePrice]:
        """Return the list of prices as core reads it."""
        return {name: instance.to_core() for name, instance in self.instances.items()}

    def idle_rules(self) -> dict[str, IdleRule]:
        """Return who bears what pool's idle time, as core reads it."""
        return {pool: settings.to_core() for pool, settings in self.idle.items()}

    @property
    def alert_ratio(self) -> Fraction:
        """Return the threshold as it is written."""
        return Fraction(repr(self.alert_gap_ratio))
