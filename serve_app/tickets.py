"""From a parsed request to the core's ticket: how long, for whom, where, by which prefix.

Lengths are estimated. The upper bound admits and the engine's count reconciles; a prompt is
counted exactly only where that decides something: near the context, a policy's maximum, a
token limit or the heavy pool's threshold, or when it is long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from serve_app.config import LimitSettings
from serve_app.core.routing import choose_pool
from serve_app.core.tokens import PromptTokenEstimator, TokenEstimate
from serve_app.core.types import Dispatch, PoolName, PriorityClass, RequestId, TenantId, Ticket
from serve_app.engine.api import Endpoint, GenerateCall
from serve_app.errors import ContextLengthExceeded, InvalidRequest
from serve_app.gateway.prefixes import prefix_hashes
from serve_app.gateway.prompt import PREFIX_BYTES
from serve_app.gateway.wire import ParsedRequest, ServiceTier
from serve_app.keys import KeyRecord
from serve_app.rules import PoolRule, Rules, Terms
from serve_app.token_counts import TokenCounter
from serve_app.usage import Charge

TEMPLATE_TOKENS = 32
# Beyond this a prompt is no text (inline media, runs of one character): nothing to learn.
BYTES_PER_TOKEN_MAX = 16
SALT_CHARACTERS = 16

_CLASS_OF_TIER: Mapping[ServiceTier, PriorityClass] = {
    "priority": PriorityClass.CRITICAL,
    "auto": PriorityClass.STANDARD,
    "default": PriorityClass.STANDARD,
    "flex": PriorityClass.SHEDDABLE,
}


class Expectations(Protocol):
    """What the core has learned that an estimate needs."""

    def expected_output(self, pool: PoolName, tenant: TenantId, max_tokens: int) -> int:
        """Return the output expected of a tenant's request, at most ``max_tokens``."""

    def largest_kv_tokens(self, pool: PoolName) -> int:
        """Return the largest KV cache in a pool, in tokens; 0 while it has no replica."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be admitted.

    ``prompt`` is its length as far as known, ``expected_output`` that of all its answers
    together. ``output_cap`` is the most tokens per answer that a policy allows a request
    that set no maximum, else None.
    """

    ticket: Ticket
    terms: Terms
    parsed: ParsedRequest
    salt: str
    prompt: TokenEstimate
    expected_output: int
    output_cap: int | None

    @property
    def expected_tokens(self) -> int:
        """Tokens it will probably use."""
        return self.prompt.expected_tokens + self.expected_output

    @property
    def upper_tokens(self) -> int:
        """The same with the prompt's upper bound."""
        return self.prompt.upper_tokens + self.expected_output

    def capped(self, output_tokens: int) -> Prepared:
        """Return the request with all its answers together cut to so many tokens."""
        each = max(1, output_tokens // self.parsed.choices)
        cap = each if self.output_cap is None else min(each, self.output_cap)
        return replace(self, output_cap=cap)

    def call(
        self,
        endpoint: Endpoint,
        dispatch: Dispatch,
        charge: Charge | None = None,
        attempt: int = 1,
        paid_tokens: int | None = None,
    ) -> GenerateCall:
        """Return the engine's call, with the place and the cap that the core decided on.

        ``charge`` and ``attempt`` are for the engine's own record of what it generated;
        ``paid_tokens`` is as far as a request of one choice may go for now.
        """
        first, *others = dispatch.replicas
        ticket, parsed = self.ticket, self.parsed
        caps = [] if self.output_cap is None else [self.output_cap]
        if dispatch.max_tokens is not None:
            caps.append(max(1, dispatch.max_tokens // parsed.choices))
        return GenerateCall(
            request_id=ticket.request_id,
            endpoint=endpoint,
            body=parsed.body_for_engine(parsed.model),
            stream=parsed.stream,
            tenant=ticket.tenant,
            cache_salt=self.salt,
            priority_class=ticket.priority_class,
            target=first,
            fallbacks=tuple(others),
            max_tokens=min(caps, default=None),
            paid_tokens=paid_tokens,
            charge=charge,
            attempt=attempt,
        )


def asked_class(parsed: ParsedRequest) -> PriorityClass:
    """Return the class that a request's ``service_tier`` asks for."""
    return _CLASS_OF_TIER[parsed.service_tier]


class Tickets:
    """Makes tickets and learns from how the requests ended. One per router.

    ``on_counted`` is told of each prompt whose exact length was wanted, and whether it
    could be had.
    """

    def __init__(
        self,
        expectations: Expectations,
        counter: TokenCounter,
        limits: LimitSettings,
        on_counted: Callable[[bool], None],
    ) -> None:
        self._expectations = expectations
        self._counter = counter
        self._limits = limits
        self._on_counted = on_counted
        self._prompts = PromptTokenEstimator(overhead_tokens=TEMPLATE_TOKENS)
        self.rules = Rules()

    async def prepare(
        self,
        request_id: RequestId,
        key: KeyRecord,
        parsed: ParsedRequest,
        *,
        terms: Terms,
        session: str | None = None,
        room_tokens: int | None = None,
    ) -> Prepared:
        """Return a request's ticket and what goes with it.

        ``session`` is the client's header. ``room_tokens`` is what its token limits leave
        now, None without any.

        Raises:
            InvalidRequest: it asks for more output than its policies allow.
            ContextLengthExceeded: its prompt is longer than a policy or every engine allows.
        """
        per_choice, output_cap = self._output(parsed, terms)
        max_tokens = per_choice * parsed.choices
        expected_output = self._expectations.expected_output(terms.pool, key.tenant, max_tokens)
        asked_output = expected_output if parsed.max_tokens is None else max_tokens
        prompt, least_tokens = await self._prompt(
            parsed, terms, asked_output, expected_output, room_tokens
        )
        _check_policy(prompt, terms)
        salt = hashlib.sha256(key.tenant.encode()).hexdigest()[:SALT_CHARACTERS]
        asked_tokens = prompt.expected_tokens + asked_output
        pool = choose_pool(terms.pool, asked_tokens, self._rule(terms.pool).heavy)
        rule = self._rule(pool)
        if rule.spot is not None:
            max_tokens = min(max_tokens, rule.spot.max_output_tokens * parsed.choices)
            expected_output = min(expected_output, max_tokens)
        hashes: tuple[int, ...] = ()
        if rule.prefixes:
            hashes = prefix_hashes(parsed.prefix, f"{salt}{terms.adapter or ''}")
        ticket = Ticket(
            request_id=request_id,
            pool=pool,
            tenant=key.tenant,
            key=key.key_id,
            priority_class=max(asked_class(parsed), terms.ceiling),
            prompt_tokens=self._fitting(prompt, least_tokens, parsed, pool),
            max_tokens=max_tokens,
            user=key.user,
            session=_session(key, parsed, session),
            adapter=terms.adapter,
            weight=terms.weight,
            prefix_hashes=hashes,
        )
        return Prepared(ticket, terms, parsed, salt, prompt, expected_output, output_cap)

    def learn(self, prepared: Prepared, pool: PoolName, prompt_tokens: int) -> None:
        """Learn from the engine's count of a prompt served by ``pool``."""
        parsed = prepared.parsed
        if parsed.prompt_token_ids is not None:
            return
        if parsed.prompt_bytes <= BYTES_PER_TOKEN_MAX * prompt_tokens:
            self._prompts.observe(pool, parsed.prompt_bytes, prompt_tokens)

    def error_ratio(self, pool: PoolName) -> float:
        """Return the recent error of prompt estimates over tokens counted."""
        return self._prompts.error_ratio(pool)

    def _output(self, parsed: ParsedRequest, terms: Terms) -> tuple[int, int | None]:
        """Return the most tokens of an answer, and the cap to hand to the engine."""
        most = terms.max_output_tokens
        if parsed.max_tokens is None:
            # What is reserved for is what it can become: without the cap, the context's rest.
            bound = self._limits.max_output_tokens if most is None else most
            return bound, bound
        if most is not None and parsed.max_tokens > most:
            raise InvalidRequest(
                f"Invalid value for 'max_tokens': at most {most} are allowed for this key and "
                f"model (got {parsed.max_tokens}).",
                param="max_tokens",
                code="number_above_max_value",
            )
        return parsed.max_tokens, None

    async def _prompt(
        self,
        parsed: ParsedRequest,
        terms: Terms,
        asked_output: int,
        expected_output: int,
        room_tokens: int | None,
    ) -> tuple[TokenEstimate, int]:
        """Return the prompt's length, counted if that decides something and can be had.

        Beside it the least that it can be. A count lacks what the chat template adds.
        """
        known = parsed.prompt_token_ids
        if known is not None:
            return TokenEstimate(known, known), known
        pool, rule = terms.pool, self._rule(terms.pool)
        estimate = self._prompts.estimate(pool, parsed.prompt_bytes)
        bounds = [self._context_tokens(pool, rule), terms.max_prompt_tokens]
        if rule.heavy is not None:
            bounds.append(rule.heavy.threshold_tokens - asked_output)
        if room_tokens is not None:
            bounds.append(room_tokens - expected_output)
        decides = any(bound is not None and estimate.decides(bound) for bound in bounds)
        guessed = (estimate, estimate.expected_tokens // 2)
        if not decides and estimate.expected_tokens < rule.exact_above_tokens:
            return guessed
        counted = await self._counter.count(pool, parsed.prefix)
        self._on_counted(counted is not None)
        if counted is None:
            return guessed
        expected, upper = counted, counted + TEMPLATE_TOKENS
        if len(parsed.prefix) >= PREFIX_BYTES:
            # Only its beginning was counted.
            expected = max(expected, estimate.expected_tokens)
            upper = max(upper, estimate.upper_tokens)
        return TokenEstimate(expected, upper), counted

    def _fitting(
        self, prompt: TokenEstimate, least_tokens: int, parsed: ParsedRequest, pool: PoolName
    ) -> int:
        """Return the prompt tokens to admit with: the upper bound, within what engines hold.

        A prompt that only may be too long is left to the engine's own count.
        """
        context = self._context_tokens(pool, self._rule(pool))
        if context is None or prompt.upper_tokens <= context:
            return prompt.upper_tokens
        several = parsed.choices > parsed.n  # none of the prompts need be that long
        if least_tokens > context and not several:
            raise ContextLengthExceeded(
                "The prompt is longer than this model's context: about "
                f"{prompt.expected_tokens} tokens, where an engine holds {context}."
            )
        return context

    def _context_tokens(self, pool: PoolName, rule: PoolRule) -> int | None:
        """Return the longest prompt a pool can hold, None while that is not known."""
        held = self._expectations.largest_kv_tokens(pool) - 1
        if held <= 0:
            return rule.context_tokens
        return held if rule.context_tokens is None else min(held, rule.context_tokens)

    def _rule(self, pool: PoolName) -> PoolRule:
        return self.rules.pools.get(pool) or PoolRule()


def _check_policy(prompt: TokenEstimate, terms: Terms) -> None:
    most = terms.max_prompt_tokens
    if most is not None and prompt.expected_tokens > most:
        raise ContextLengthExceeded(
            f"The prompt has about {prompt.expected_tokens} tokens; at most {most} are allowed "
            "for this key and model."
        )


def _session(key: KeyRecord, parsed: ParsedRequest, header: str | None) -> str | None:
    """Return what ties requests together: the client's hint, or else its end user."""
    name = parsed.session or header or parsed.user or key.user
    return None if name is None else f"{key.tenant}\0{name}"
