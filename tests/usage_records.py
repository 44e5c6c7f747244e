"""Usage records for tests: requests of a few tenants with both of their witnesses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from serve_app.core.types import KeyId, Outcome, PoolName, PriorityClass, RequestId, TenantId
from serve_app.gateway.request_id import new_request_id
from serve_app.usage import Charge, UsageRecord, Witness

HOUR_S = 3600
# 2026-01-01T00:00:00Z, a whole hour.
START_S = 1_767_225_600


def request_id(at_s: float = START_S, number: int = 0) -> RequestId:
    """Return an id of a request that came at ``at_s``; the same for the same arguments."""
    return new_request_id(int(at_s * 1e9), number.to_bytes(10, "big"))


def charge(number: int = 0, at_s: float = START_S, **fields: Any) -> Charge:
    """Return who pays for a request."""
    values: dict[str, Any] = {
        "request_id": request_id(at_s, number),
        "tenant": TenantId("acme"),
        "key": KeyId("k1"),
        "model": "small",
        "pool": PoolName("pool"),
        "priority_class": PriorityClass.STANDARD,
        "endpoint": "chat",
        "price_version": 0,
    }
    return Charge(**(values | fields))


def record(of: Charge | None = None, witness: Witness = Witness.ROUTER, **fields: Any) -> Any:
    """Return one witness's record of a completed request: 20 tokens in, 8 cached, 5 out."""
    values: dict[str, Any] = {
        "charge": of or charge(),
        "witness": witness,
        "attempt": 1,
        "outcome": Outcome.COMPLETED.value,
        "ended_at_s": START_S + 1.5,
        "prompt_tokens": 20,
        "cached_prompt_tokens": 8,
        "output_tokens": 5,
    }
    return UsageRecord(**(values | fields))


def traffic(requests: int, seed: int = 0, price_version: int = 0) -> Iterator[UsageRecord]:
    """Yield records of random requests over some hours, late and lost ones among them."""
    chance = random.Random(seed)
    held: list[UsageRecord] = []
    for number in range(requests):
        of = charge(
            number,
            START_S + chance.random() * 5 * HOUR_S,
            tenant=TenantId(chance.choice(("acme", "bolt", "coil"))),
            user=chance.choice(("", "ann", "bob")),
            key=KeyId(chance.choice(("k1", "k2"))),
            model=chance.choice(("small", "large")),
            priority_class=chance.choice(tuple(PriorityClass)),
            tag=chance.choice(("", "batch-7")),
            price_version=price_version,
        )
        outcome = chance.choices(tuple(Outcome), (90, 8, 2))[0]
        prompt, output = chance.randint(1, 5000), chance.randint(1, 2000)
        cached = chance.randint(0, prompt)
        delivered = output if outcome is Outcome.COMPLETED else chance.randint(0, output)
        seen = {"prompt_tokens": prompt, "cached_prompt_tokens": cached, "outcome": outcome.value}
        both = [
            record(of, output_tokens=delivered, billable=outcome is not Outcome.FAILED, **seen),
            record(of, Witness.ENGINE, output_tokens=output, **seen),
        ]
        chance.shuffle(both)
        # One of a hundred is lost for good, some come late and some twice.
        if chance.random() < 0.01:
            both.pop()
        held += both
        if chance.random() < 0.01:
            held.append(both[0])
        if len(held) > 50:
            yield held.pop(chance.randrange(len(held)))
    chance.shuffle(held)
    yield from held
