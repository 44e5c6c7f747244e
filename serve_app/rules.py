"""The Router's configuration, ready to be looked up once per request.

Built as a whole by each change of the configuration and never mutated, so that a request
sees one configuration from beginning to end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from serve_app.config import RouterConfig
from serve_app.config_access import AliasPolicy, ContextPolicy, KeyPolicy, TenantPolicy
from serve_app.config_policy import PoolPolicy, SpotLimits
from serve_app.core.limits import Limits, Scope, ScopeKind
from serve_app.core.routing import HeavyPool
from serve_app.core.types import KeyId, PoolName, PriorityClass, TenantId
from serve_app.errors import ModelNotFound
from serve_app.keys import KeyRecord

_UNLIMITED = Limits()


@dataclass(frozen=True, slots=True)
class PoolRule:
    """What the router itself does with a pool's requests.

    ``context_tokens`` None means that the KV cache is the only bound known. ``prefixes``
    says whether the pool, or the one it falls back to, routes by prefixes. ``spot`` bounds
    what may run in it, if its nodes are spot nodes.
    """

    heavy: HeavyPool | None = None
    context_tokens: int | None = None
    tokenizer: str | None = None
    exact_above_tokens: int = 8192
    prefixes: bool = False
    spot: SpotLimits | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for one request, by who asks and for which model.

    ``scopes`` are those with limits. The maxima are the strictest of key, tenant and alias,
    per prompt and per answer, None without any.
    """

    pool: PoolName
    adapter: str | None
    weight: float
    ceiling: PriorityClass
    max_prompt_tokens: int | None
    max_output_tokens: int | None
    scopes: tuple[Scope, ...]


@dataclass(frozen=True, slots=True)
class _Tenant:
    policy: TenantPolicy
    limits: Limits
    each_key: Limits
    each_user: Limits
    users: Mapping[str, Limits]


@dataclass(frozen=True, slots=True)
class _Policy:
    """A key's or an alias's own policy, its limits as core reads them."""

    context: ContextPolicy
    limits: Limits


@dataclass(frozen=True, slots=True)
class Rules:
    """Aliases, tenants, keys and pools of one configuration."""

    pools: Mapping[PoolName, PoolRule] = field(default_factory=dict)
    aliases: Mapping[str, AliasPolicy] = field(default_factory=dict)
    _models: Mapping[str, _Policy] = field(default_factory=dict)
    _tenants: Mapping[TenantId, _Tenant] = field(default_factory=dict)
    _default_tenant: _Tenant | None = None
    _keys: Mapping[KeyId, _Policy] = field(default_factory=dict)

    @staticmethod
    def of(config: RouterConfig, prefixes: Mapping[PoolName, bool]) -> Rules:
        """Compile a configuration; ``prefixes`` says which pools route by prefixes."""
        return Rules(
            pools={
                PoolName(name): _pool_rule(PoolName(name), pool, prefixes)
                for name, pool in config.pools.items()
            },
            aliases=MappingProxyType(dict(config.aliases)),
            _models={name: _policy(alias) for name, alias in config.aliases.items()},
            _tenants={TenantId(name): _tenant(each) for name, each in config.tenants.items()},
            _default_tenant=_tenant(config.default_tenant),
            _keys={KeyId(name): _policy(key) for name, key in config.keys.items()},
        )

    def spot(self, pool: PoolName) -> SpotLimits | None:
        """Return what bounds a request in a pool, None where its nodes are no spot nodes."""
        rule = self.pools.get(pool)
        return None if rule is None else rule.spot

    def alias(self, model: str) -> AliasPolicy:
        """Return what stands behind a client's model name.

        Raises:
            ModelNotFound: nothing does.
        """
        alias = self.aliases.get(model)
        if alias is None:
            raise ModelNotFound(
                f"The model {model!r:.200} does not exist or you do not have access to it.",
                param="model",
            )
        return alias

    def terms(self, key: KeyRecord, model: str, user: str | None) -> Terms:
        """Return what holds for a request; ``user`` is the end user that the client named.

        Raises:
            ModelNotFound: no pool serves that name.
        """
        alias, own = self.alias(model), self._models[model]
        tenant = self._tenant(key.tenant)
        named = self._keys.get(key.key_id)
        contexts: list[ContextPolicy] = [alias, tenant.policy]
        if named is not None:
            contexts.append(named.context)
        return Terms(
            pool=PoolName(alias.pool),
            adapter=alias.adapter,
            weight=tenant.policy.weight,
            ceiling=max(key.priority_ceiling, tenant.policy.ceiling),
            max_prompt_tokens=_least(each.max_prompt_tokens for each in contexts),
            max_output_tokens=_least(each.max_output_tokens for each in contexts),
            scopes=(*self.scopes(key, user), *_limited(ScopeKind.MODEL, model, own.limits)),
        )

    def scopes(self, key: KeyRecord, user: str | None) -> tuple[Scope, ...]:
        """Return the scopes with limits of whoever asks, whatever the model.

        A key that belongs to a user is that user's, whatever name the client sends.
        """
        tenant = self._tenant(key.tenant)
        named = self._keys.get(key.key_id)
        own = tenant.each_key if named is None else named.limits
        found = [*_limited(ScopeKind.KEY, key.key_id, own)]
        name = key.user or user
        if name is not None:
            limits = tenant.users.get(name, tenant.each_user)
            found += _limited(ScopeKind.USER, f"{key.tenant}\0{name}", limits)
        found += _limited(ScopeKind.TENANT, key.tenant, tenant.limits)
        return tuple(found)

    def _tenant(self, tenant: TenantId) -> _Tenant:
        return self._tenants.get(tenant) or self._default_tenant or _tenant(TenantPolicy())


def limits_by_path(config: RouterConfig) -> dict[str, Any]:
    """Return what a configuration allows whom, as the audit trail tells it.

    ``tenants.acme.limits.requests_per_min: 60`` and so on; what is not set is not there.
    """
    chosen = {"tenants", "default_tenant", "keys", "aliases"}
    document = config.model_dump(mode="json", include=chosen, exclude_defaults=True)
    for alias in document.get("aliases", {}).values():
        for name in ("pool", "adapter"):
            alias.pop(name, None)
    return dict(_paths("", document))


def _paths(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _paths(f"{prefix}.{name}" if prefix else name, inner)
    else:
        yield prefix, value


def _pool_rule(name: PoolName, pool: PoolPolicy, prefixes: Mapping[PoolName, bool]) -> PoolRule:
    fallback = pool.brownout.fallback_pool
    return PoolRule(
        heavy=pool.heavy.to_core() if pool.heavy else None,
        context_tokens=pool.prompt.context_tokens,
        tokenizer=pool.prompt.tokenizer,
        exact_above_tokens=pool.prompt.exact_above_tokens,
        spot=pool.spot,
        prefixes=prefixes[name] or (fallback is not None and prefixes[PoolName(fallback)]),
    )


def _tenant(policy: TenantPolicy) -> _Tenant:
    return _Tenant(
        policy=policy,
        limits=policy.limits.to_core(),
        each_key=policy.each_key.to_core(),
        each_user=policy.each_user.to_core(),
        users={name: limits.to_core() for name, limits in policy.users.items()},
    )


def _policy(policy: AliasPolicy | KeyPolicy) -> _Policy:
    return _Policy(policy, policy.limits.to_core())


def _least(limits: Iterable[int | None]) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _limited(kind: ScopeKind, name: str, limits: Limits) -> tuple[Scope, ...]:
    return () if limits == _UNLIMITED else (Scope(kind, name, limits),)
