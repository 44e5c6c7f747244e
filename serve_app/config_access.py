"""Who may use what: model names, tenants and keys in the Router's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from serve_app.config_base import Name, Strict
from serve_app.core import limits
from serve_app.core.types import PriorityClass

MOST: int = 10**12

Count = Annotated[int, Field(ge=0, le=MOST)]
Tokens = Annotated[int, Field(ge=1, le=MOST)]


class RateLimits(Strict):
    """Limits of one scope. Unset is unlimited, 0 allows nothing."""

    requests_per_min: Count | None = None
    tokens_per_min: Count | None = Field(None, description="Prompt and output tokens together.")
    concurrent: Count | None = Field(None, description="Requests open at once.")

    def to_core(self) -> limits.Limits:
        """Return the limits as core reads them."""
        return limits.Limits(self.requests_per_min, self.tokens_per_min, self.concurrent)


class ContextPolicy(Strict):
    """How long a request's prompt and each of its answers may be."""

    max_prompt_tokens: Tokens | None = Field(None, description="Longer prompts are refused.")
    max_output_tokens: Tokens | None = Field(
        None, description="More is refused if asked for, and is the end if nothing was."
    )


class AliasPolicy(ContextPolicy):
    """What stands behind a model name that clients use. ``limits`` are shared by all of them."""

    pool: Name
    adapter: str | None = Field(
        None, min_length=1, max_length=256, description="LoRA adapter that the name stands for."
    )
    limits: RateLimits = RateLimits()


class KeyPolicy(ContextPolicy):
    """What one key may use."""

    limits: RateLimits = RateLimits()


class TenantPolicy(ContextPolicy):
    """What a tenant may use: all its keys and users together, each of them, and by name."""

    weight: float = Field(
        1.0, gt=0, le=1000, description="Share of a busy pool relative to other tenants'."
    )
    class_ceiling: Literal["critical", "standard", "sheddable"] = Field(
        "critical", description="The most important class, whatever its keys allow."
    )
    limits: RateLimits = RateLimits()
    each_key: RateLimits = Field(RateLimits(), description="Limits of every key by itself.")
    each_user: RateLimits = Field(RateLimits(), description="Limits of every end user by itself.")
    users: dict[Annotated[str, Field(min_length=1, max_length=64)], RateLimits] = Field(
        default_factory=dict, max_length=10_000, description="Users with limits of their own."
    )

    @property
    def ceiling(self) -> PriorityClass:
        """The most important class of the tenant's requests."""
        return PriorityClass[self.class_ceiling.upper()]


def _as_mapping(alias: object) -> object:
    return {"pool": alias} if isinstance(alias, str) else alias


Aliases = dict[
    Annotated[str, Field(min_length=1, max_length=256)],
    Annotated[AliasPolicy, BeforeValidator(_as_mapping)],
]
