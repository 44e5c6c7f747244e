"""A tenant over its quota is refused exactly what is over it, and nobody else is."""

from __future__ import annotations

from serve_app.drills.frame import Stage
from serve_app.drills.load import ANSWER_S, body
from serve_app.drills.target import Target

ASKED_MAX = 300
ASKED_BEYOND = 5


async def run(stage: Stage) -> None:
    """Ask as a tenant with a limit of requests per minute until some were refused."""
    target = stage.target
    tenant = target.names.quota_tenant
    async with (
        target.key(tenant=tenant) as secret,
        target.key(tenant=f"{tenant}-neighbour") as other,
    ):
        stage.inject(f"requests of tenant {tenant} beyond its limit, on every router")
        answered, refused, limit = await _exhaust(target, secret)
        stage.figure(limit_per_min=limit, answered=answered, refused=len(refused))
        stage.check(bool(limit), "answers tell the tenant's limit of requests")
        stage.check(answered == limit, f"{answered} of {limit} requests per minute were answered")
        stage.check(len(refused) == ASKED_BEYOND, "everything beyond was refused")
        stage.check(set(refused) == {True}, "each refusal is a 429 that says when to come again")
        status, _, _ = await _ask(target, other)
        stage.check(status == 200, "another tenant is served meanwhile")


async def _exhaust(target: Target, secret: str) -> tuple[int, list[bool], int]:
    """Return how many were answered, whether each refusal is proper, and the limit."""
    answered, limit = 0, 0
    refused: list[bool] = []
    while len(refused) < ASKED_BEYOND and answered < ASKED_MAX:
        status, headers, _ = await _ask(target, secret)
        limit = int(headers.get("x-ratelimit-limit-requests", limit))
        if status == 200:
            answered += 1
        else:
            refused.append(status == 429 and int(headers.get("retry-after", 0)) >= 1)
    return answered, refused, limit


async def _ask(target: Target, secret: str) -> tuple[int, dict[str, str], str]:
    answer = await target.client.post(
        "/v1/completions",
        json=body(target.names.model, 1),
        headers=target.headers(secret),
        timeout=ANSWER_S,
    )
    return answer.status_code, dict(answer.headers), answer.text
