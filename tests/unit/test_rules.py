"""What holds for a request, by its key, tenant, user and model."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.config import RouterConfig
from serve_app.core.limits import Limits, ScopeKind
from serve_app.core.types import KeyId, PoolName, PriorityClass, TenantId, UserId
from serve_app.errors import ModelNotFound
from serve_app.keys import KeyRecord
from serve_app.rules import Rules

CONFIG: dict[str, Any] = {
    "pools": {
        "chat": {
            "heavy": {"pool": "long", "threshold_tokens": 1000},
            "brownout": {"fallback_pool": "small"},
        },
        "long": {"prompt": {"context_tokens": 9000, "tokenizer": "/model"}},
        "small": {"routing": "prefix_affinity"},
    },
    "aliases": {
        "chat": "chat",
        "legal": {
            "pool": "chat",
            "adapter": "law",
            "max_prompt_tokens": 500,
            "limits": {"tokens_per_min": 70},
        },
    },
    "tenants": {
        "acme": {
            "weight": 3,
            "class_ceiling": "standard",
            "max_prompt_tokens": 400,
            "max_output_tokens": 90,
            "limits": {"requests_per_min": 10},
            "each_key": {"concurrent": 5},
            "each_user": {"requests_per_min": 2},
            "users": {"ada": {"requests_per_min": 4}},
        }
    },
    "default_tenant": {"limits": {"requests_per_min": 1}},
    "keys": {"vip": {"max_output_tokens": 80, "limits": {"concurrent": 9}}},
}


def rules(config: dict[str, Any] | None = None) -> Rules:
    parsed = RouterConfig.model_validate(CONFIG if config is None else config)
    prefixes = {PoolName(n): p.routing == "prefix_affinity" for n, p in parsed.pools.items()}
    return Rules.of(parsed, prefixes)


def key(
    key_id: str = "k",
    tenant: str = "acme",
    user: str | None = None,
    ceiling: PriorityClass = PriorityClass.CRITICAL,
) -> KeyRecord:
    return KeyRecord(
        key_id=KeyId(key_id),
        name="",
        digest=b"",
        tenant=TenantId(tenant),
        created_at_s=0.0,
        user=None if user is None else UserId(user),
        priority_ceiling=ceiling,
    )


def scopes_of(made: Rules, *arguments: Any) -> dict[str, tuple[str, Limits]]:
    return {s.kind.value: (s.id, s.limits) for s in made.terms(*arguments).scopes}


def test_every_scope_with_limits_counts() -> None:
    assert scopes_of(rules(), key(), "legal", "bob") == {
        "key": ("k", Limits(concurrent=5)),
        "user": ("acme\0bob", Limits(requests_per_min=2)),
        "tenant": ("acme", Limits(requests_per_min=10)),
        "model": ("legal", Limits(tokens_per_min=70)),
    }
    assert scopes_of(rules(), key(), "chat", None).keys() == {"key", "tenant"}


def test_named_keys_and_users_have_limits_of_their_own() -> None:
    found = scopes_of(rules(), key("vip"), "chat", "ada")
    assert found["key"] == ("vip", Limits(concurrent=9))
    assert found["user"] == ("acme\0ada", Limits(requests_per_min=4))


def test_a_key_that_belongs_to_a_user_counts_as_that_user() -> None:
    found = scopes_of(rules(), key(user="ada"), "chat", "somebody-else")
    assert found["user"][0] == "acme\0ada"


def test_an_unknown_tenant_has_the_default_and_is_counted_by_itself() -> None:
    one = scopes_of(rules(), key(tenant="new"), "chat", "bob")
    assert one == {"tenant": ("new", Limits(requests_per_min=1))}
    assert rules().terms(key(tenant="new"), "chat", None).weight == 1.0


def test_the_strictest_context_policy_holds() -> None:
    terms = rules().terms(key("vip"), "legal", None)
    assert (terms.max_prompt_tokens, terms.max_output_tokens) == (400, 80)
    plain = rules().terms(key(tenant="new"), "chat", None)
    assert (plain.max_prompt_tokens, plain.max_output_tokens) == (None, None)


def test_class_weight_adapter_and_pool_come_from_tenant_and_alias() -> None:
    terms = rules().terms(key(), "legal", None)
    assert (terms.ceiling, terms.weight) == (PriorityClass.STANDARD, 3.0)
    assert (terms.pool, terms.adapter) == ("chat", "law")
    low = rules().terms(key(ceiling=PriorityClass.SHEDDABLE), "chat", None)
    assert low.ceiling is PriorityClass.SHEDDABLE


def test_a_pool_hashes_prefixes_if_it_or_its_fallback_routes_by_them() -> None:
    made = rules()
    assert {name: rule.prefixes for name, rule in made.pools.items()} == {
        "chat": True,
        "long": False,
        "small": True,
    }
    heavy = made.pools[PoolName("chat")].heavy
    assert heavy is not None
    assert (heavy.pool, heavy.threshold_tokens) == ("long", 1000)
    assert made.pools[PoolName("long")].context_tokens == 9000


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound):
        rules().terms(key(), "nowhere", None)
    assert rules().scopes(key(), None)[0].kind is ScopeKind.KEY


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"tenants": {"a": {"weight": 0}}}, ("tenants", "a", "weight")),
        ({"tenants": {"a": {"weight": -1}}}, ("tenants", "a", "weight")),
        ({"tenants": {"a": {"weight": float("nan")}}}, ("tenants", "a", "weight")),
        ({"tenants": {"a": {"weight": float("inf")}}}, ("tenants", "a", "weight")),
        ({"tenants": {"a b": {}}}, ("tenants", "a b", "[key]")),
        (
            {"tenants": {"a": {"limits": {"requests_per_min": -1}}}},
            ("tenants", "a", "limits", "requests_per_min"),
        ),
        (
            {"tenants": {"a": {"limits": {"tokens_per_min": 1.5}}}},
            ("tenants", "a", "limits", "tokens_per_min"),
        ),
        ({"default_tenant": {"max_prompt_tokens": 0}}, ("default_tenant", "max_prompt_tokens")),
        ({"tenants": {"a": {"class_ceiling": "vip"}}}, ("tenants", "a", "class_ceiling")),
        ({"aliases": {"m": {"adapter": "x"}}}, ("aliases", "m", "pool")),
        ({"keys": {"k": {"limit": {}}}}, ("keys", "k", "limit")),
    ],
)
def test_what_cannot_mean_anything_is_refused_with_its_path(
    change: dict[str, Any], where: tuple[str, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        RouterConfig.model_validate({**CONFIG, **change})
    assert where in [error["loc"] for error in caught.value.errors()]


@pytest.mark.parametrize(
    ("pools", "said"),
    [
        ({"a": {"heavy": {"pool": "a", "threshold_tokens": 1}}}, "pools.a.heavy.pool: 'a' must"),
        ({"a": {"heavy": {"pool": "b", "threshold_tokens": 1}}}, "pools.a.heavy.pool: 'b' must"),
        (
            {
                "a": {"heavy": {"pool": "b", "threshold_tokens": 1}},
                "b": {"heavy": {"pool": "a", "threshold_tokens": 1}},
            },
            "'b' has a heavy pool itself",
        ),
        ({"a": {"brownout": {"fallback_pool": "z"}}}, "pools.a.brownout.fallback_pool: 'z' must"),
    ],
)
def test_a_pool_hands_on_to_another_pool_in_one_step(pools: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RouterConfig.model_validate({"pools": pools})
