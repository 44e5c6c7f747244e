"""The policies as clients meet them: limits, classes, pools, prefixes, brownout."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.e2e import keys
from tests.e2e.policies import HEAVY_TOKENS
from tests.e2e.waiting import patiently, until
from tests.stack import Stack


@pytest.fixture(scope="module")
def stack(policies_stack: Stack) -> Stack:
    return policies_stack


@pytest.fixture(scope="module")
def make_key(stack: Stack) -> Callable[..., str]:
    """A function that makes a key which the router knows already."""
    return functools.partial(keys.make_key, stack)


def ask(stack: Stack, key: str, text: str = "hello", **fields: Any) -> httpx.Response:
    messages = [{"role": "user", "content": text}]
    body = {"model": "chat", "messages": messages, "max_tokens": 4, **fields}
    with stack.http(key) as client:
        return patiently(lambda: client.post("/v1/chat/completions", json=body))


def error_of(answer: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def log_events(stack: Stack) -> list[dict[str, Any]]:
    """Return the events in the processes' logs."""
    lines = stack.worker_lines()
    return [json.loads(line) for line in lines if line.startswith("{") and '"event":' in line]


def line_of(stack: Stack, answer: httpx.Response) -> dict[str, Any]:
    """Return the request line of an answer."""
    wanted = answer.headers["x-headrace-request-id"]
    found: list[dict[str, Any]] = []

    def written() -> bool:
        found[:] = [each for each in log_events(stack) if each.get("request_id") == wanted]
        return bool(found)

    until(written, f"the request line of {wanted}")
    return found[0]


# Limits


@pytest.mark.parametrize(
    ("tenant", "fields", "scope"),
    [
        ("few-per-key", {}, "key"),
        ("few-per-user", {"user": "ada"}, "user"),
        ("few", {}, "tenant"),
        ("free", {"model": "scarce"}, "model"),
    ],
)
def test_each_scope_refuses_what_is_over_its_requests_per_minute(
    stack: Stack, make_key: Callable[..., str], tenant: str, fields: dict[str, Any], scope: str
) -> None:
    def refused() -> float:
        return stack.metric("headrace_rate_limited_total", scope=scope, limit="requests")

    key = make_key(tenant=tenant)
    # Others that used this stack may have met a limit of theirs.
    before = refused()
    began_s = time.monotonic()
    first, second, third = (ask(stack, key, **fields) for _ in range(3))
    took_s = time.monotonic() - began_s

    assert [first.status_code, second.status_code, third.status_code] == [200, 200, 429]
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert second.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert error_of(third)["code"] == "rate_limit_exceeded"
    assert f"requests per minute of this {scope}: limit 2" in error_of(third)["message"]
    # Two a minute drain one in thirty seconds.
    assert 29 - took_s <= int(third.headers["retry-after"]) <= 30
    until(lambda: refused() == before + 1, "the refusal in the metrics")


def test_a_limit_of_one_does_not_touch_another(stack: Stack, make_key: Callable[..., str]) -> None:
    first, second = make_key(tenant="few-per-key"), make_key(tenant="few-per-key")
    assert [ask(stack, first).status_code for _ in range(3)] == [200, 200, 429]
    assert ask(stack, second).status_code == 200
    key = make_key(tenant="few-per-user")
    assert [ask(stack, key, user="eve").status_code for _ in range(3)] == [200, 200, 429]
    assert ask(stack, key, user="bob").status_code == 200


def test_tokens_are_settled_by_count_and_what_is_over_is_owed(
    stack: Stack, make_key: Callable[..., str]
) -> None:
    key = make_key(tenant="short")
    answer = ask(stack, key, "word " * 200, max_tokens=20)
    used = answer.json()["usage"]["total_tokens"]
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"

    # The next answer's figures are those after the first was settled to its count.
    again = ask(stack, key, "word " * 200, max_tokens=20)
    assert again.status_code == 200
    left = int(again.headers["x-ratelimit-remaining-tokens"])
    assert left < 1000 - used

    refused = ask(stack, key, "word " * 700, max_tokens=20)
    assert refused.status_code == 429
    assert "tokens per minute of this tenant: limit 1000" in error_of(refused)["message"]
    assert int(refused.headers["retry-after"]) <= 60
    hopeless = ask(stack, key, "word " * 2000)
    assert hopeless.status_code == 429
    assert hopeless.headers["x-should-retry"] == "false"
    assert "retry-after" not in hopeless.headers


def test_a_concurrent_limit_counts_open_requests_only(
    stack: Stack, make_key: Callable[..., str]
) -> None:
    key = make_key(tenant="single")
    body = {"model": "chat", "prompt": "hello", "max_tokens": 3000, "stream": True}
    with contextlib.ExitStack() as open_:
        client = open_.enter_context(stack.http(key))
        stream = patiently(
            lambda: open_.enter_context(client.stream("POST", "/v1/completions", json=body))
        )
        assert stream.status_code == 200
        lines = stream.iter_lines()
        next(lines)
        refused = ask(stack, key)
        assert refused.status_code == 429
        assert "concurrent requests of this tenant: limit 1" in error_of(refused)["message"]
    until(lambda: ask(stack, key).status_code == 200, "the slot is free again")


def test_a_limit_of_zero_refuses_for_good(stack: Stack, make_key: Callable[..., str]) -> None:
    key = make_key(tenant="nobody")
    answer = ask(stack, key)
    assert answer.status_code == 429
    assert answer.headers["x-should-retry"] == "false"
    with pytest.raises(openai.RateLimitError):
        stack.openai(api_key=key, max_retries=5).completions.create(
            model="chat", prompt="x", max_tokens=1
        )


def test_a_refusal_for_another_reason_tells_the_limits_too(
    stack: Stack, make_key: Callable[..., str]
) -> None:
    answer = ask(stack, make_key(tenant="acme"), model="nowhere")
    assert answer.status_code == 404
    assert answer.headers["x-ratelimit-limit-requests"] == "6000"


# Classes and contexts


def test_a_tier_above_the_ceiling_is_served_at_the_ceiling_and_echoed(
    stack: Stack, make_key: Callable[..., str]
) -> None:
    for tenant, ceiling, served in (
        ("free", "critical", "priority"),
        ("free", "standard", "default"),
        ("interns", "critical", "flex"),
    ):
        key = make_key(tenant=tenant, priority_ceiling=ceiling)
        assert ask(stack, key).status_code == 200, "the limit can be looked up"
        client = stack.openai(api_key=key)
        messages: list[Any] = [{"role": "user", "content": "hello"}]
        whole = client.chat.completions.create(
            model="chat", messages=messages, max_tokens=4, service_tier="priority"
        )
        assert whole.service_tier == served
        chunks = list(
            client.chat.completions.create(
                model="chat",
                messages=messages,
                max_tokens=4,
                service_tier="priority",
                stream=True,
            )
        )
        assert chunks[0].service_tier == served
        assert len("".join(c.choices[0].delta.content or "" for c in chunks).split()) == 4


def test_a_name_may_allow_less_context_than_its_pool(
    stack: Stack, make_key: Callable[..., str]
) -> None:
    key = make_key(tenant="free")
    long = ask(stack, key, "word " * 400, model="brief")
    assert (long.status_code, error_of(long)["code"]) == (400, "context_length_exceeded")
    greedy = ask(stack, key, model="brief", max_tokens=7)
    assert (greedy.status_code, error_of(greedy)["param"]) == (400, "max_tokens")
    silent = ask(stack, key, model="brief", max_tokens=None)
    assert silent.json()["usage"]["completion_tokens"] == 6
    assert silent.json()["choices"][0]["finish_reason"] == "length"


# Pools and routing


def test_long_contexts_go_to_the_heavy_pool(stack: Stack, make_key: Callable[..., str]) -> None:
    key = make_key(tenant="free")
    short = ask(stack, key, "word " * 100)
    long = ask(stack, key, "word " * 5000)
    wordy = ask(stack, key, max_tokens=HEAVY_TOKENS)
    unsaid = ask(stack, key, max_tokens=None)

    assert short.headers["x-headrace-pool"] == "chat"
    assert long.headers["x-headrace-pool"] == "chat-long"
    assert wordy.headers["x-headrace-pool"] == "chat-long"
    assert unsaid.headers["x-headrace-pool"] == "chat"
    assert line_of(stack, long)["pool"] == "chat-long"
    until(
        lambda: stack.metric("headrace_requests_total", pool="chat-long", outcome="completed") >= 2,
        "the long requests in the metrics of the heavy pool",
    )


def test_equal_beginnings_share_a_replica_and_its_cache_within_a_tenant_only(
    stack: Stack, make_key: Callable[..., str]
) -> None:
    key, stranger = make_key(tenant="free"), make_key(tenant="strangers")
    shared = "".join(f"clause {number} of the contract. " for number in range(150))
    answers = [ask(stack, key, f"{shared} Question {number}?") for number in range(6)]
    replicas = {line_of(stack, answer)["replica"] for answer in answers}
    cached = [a.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    assert len(replicas) == 1
    assert cached[0] == 0
    assert min(cached[1:]) > 0.9 * answers[0].json()["usage"]["prompt_tokens"]

    other = ask(stack, stranger, f"{shared} Question 1?").json()["usage"]
    assert other["prompt_tokens_details"]["cached_tokens"] == 0

    spread = [ask(stack, key, f"{number} times {shared}") for number in range(20)]
    assert len({line_of(stack, answer)["replica"] for answer in spread}) == 2


# Brownout


@pytest.fixture
def held(stack: Stack) -> Iterator[Callable[[str, int], None]]:
    """A function that keeps a pool's KV cache in use until its ladder reached a rung."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def occupy(pool: str) -> None:
        body = {"model": pool, "prompt": "hold", "max_tokens": 8000, "service_tier": "priority"}
        with (
            stack.http() as client,
            client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream,
        ):
            for _ in stream.iter_raw():
                if stop.is_set():
                    return

    def hold(pool: str, rung: int) -> None:
        thread = threading.Thread(target=occupy, args=(pool,))
        thread.start()
        threads.append(thread)
        until(
            lambda: stack.metric("headrace_brownout_rung", pool=pool) == rung,
            f"rung {rung} of {pool}",
        )

    yield hold
    stop.set()
    for thread in threads:
        thread.join(60)


def test_a_shortened_answer_says_so(
    stack: Stack, make_key: Callable[..., str], held: Callable[[str, int], None]
) -> None:
    held("capped", 2)
    key = make_key(tenant="free", priority_ceiling="critical")
    answer = ask(stack, key, model="capped", max_tokens=100)
    assert answer.headers["x-headrace-degraded"] == "max_tokens"
    assert answer.json()["usage"]["completion_tokens"] == 8
    critical = ask(stack, key, model="capped", max_tokens=20, service_tier="priority")
    assert "x-headrace-degraded" not in critical.headers
    assert critical.json()["usage"]["completion_tokens"] == 20

    assert line_of(stack, answer)["degraded"] == "max_tokens"
    events = [each for each in log_events(stack) if each["event"] == "brownout"]
    assert [each["rung"] for each in events if each["pool"] == "capped"][-1] == 2
    until(
        lambda: stack.metric("headrace_degraded_total", pool="capped", how="max_tokens") == 1,
        "the degraded request in the metrics",
    )
    assert stack.metric("headrace_notices_total", pool="capped", kind="brownout") >= 1


def test_standard_goes_to_the_fallback_pool_and_is_told(
    stack: Stack, make_key: Callable[..., str], held: Callable[[str, int], None]
) -> None:
    held("full", 3)
    key = make_key(tenant="free", priority_ceiling="critical")
    answer = ask(stack, key, model="full")
    assert answer.headers["x-headrace-pool"] == "chat-small"
    assert answer.headers["x-headrace-degraded"] == "fallback_model"
    assert answer.json()["model"] == "full"
    assert line_of(stack, answer)["pool"] == "chat-small"
    critical = ask(stack, key, model="full", service_tier="priority")
    assert critical.headers["x-headrace-pool"] == "full"


def test_what_the_policies_know_is_in_the_metrics(stack: Stack) -> None:
    for name in (
        "headrace_saturation_ratio",
        "headrace_ttft_prediction_error_seconds",
        "headrace_prompt_estimate_error_ratio",
        "headrace_output_estimate_error_ratio",
        "headrace_open_breakers",
        "headrace_retry_budget",
    ):
        until(lambda of=name: is_told(stack, of), name)  # type: ignore[misc]  # a default


def is_told(stack: Stack, name: str) -> bool:
    """Whether there is a sample of a metric, of the pool ``chat`` or of a process."""
    with stack.http() as client:
        text = client.get("/metrics").text
    return f'{name}{{pool="chat"' in text or f'{name}{{process="' in text
