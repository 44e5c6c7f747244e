"""Every bad input through the real server: its status, OpenAI's shape, the field it names."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import orjson
import pytest

from tests.e2e.waiting import is_idle, until
from tests.stack import KEY, Stack

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
LIMIT_BYTES = 16 * 2**20
CONTEXT_TOKENS = 131_072
HI = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"model": "sim", "messages": HI, "max_tokens": 2}


def post(stack: Stack, content: Any, path: str = CHAT, **headers: str) -> httpx.Response:
    """POST bytes, or chunks of them, as JSON."""
    with stack.http() as client:
        return client.post(
            path, content=content, headers={"content-type": "application/json", **headers}
        )


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """Check that the answer is an error in OpenAI's shape; return the error."""
    assert answer.status_code == status, answer.text[:500]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get_list("x-request-id") != []
    [(name, error)] = answer.json().items()
    assert name == "error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text
    return dict(error)


def still_serves(stack: Stack) -> None:
    assert post(stack, orjson.dumps(GOOD)).status_code == 200


# Who


def revoked_key(stack: Stack) -> str:
    with stack.http() as admin:
        key = admin.post("/admin/keys", json={"name": "short-lived"}).json()
        with stack.http(key["key"]) as client:
            until(lambda: client.get("/v1/models").status_code == 200, "the key is known")
            admin.delete(f"/admin/keys/{key['id']}")
            until(lambda: client.get("/v1/models").status_code == 401, "the key is revoked")
    return str(key["key"])


@pytest.mark.parametrize("which", ["none", "wrong", "revoked", "empty", "huge", "basic"])
def test_without_a_valid_key_nothing_is_answered(sim_stack: Stack, which: str) -> None:
    headers = {
        "none": {},
        "wrong": {"authorization": "Bearer hr-abcdefgh-" + "w" * 43},
        "revoked": {},
        "empty": {"authorization": "Bearer"},
        "huge": {"authorization": "Bearer " + "k" * 4000},
        "basic": {"authorization": f"Basic {KEY}"},
    }[which]
    if which == "revoked":
        headers = {"authorization": f"Bearer {revoked_key(sim_stack)}"}
    with httpx.Client(base_url=sim_stack.url, headers=headers, timeout=120) as client:
        answers = [
            client.post(CHAT, json=GOOD),
            client.post(COMPLETIONS, json={"model": "sim", "prompt": "a"}),
            client.get("/v1/models"),
            client.get("/v1/models/sim"),
            client.get("/admin/keys"),
            client.post("/admin/keys", json={"name": "mine"}),
            client.delete("/admin/keys/bootstrap"),
        ]
    for answer in answers:
        error = problem(answer, 401)
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


# What


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_unknown_model_is_not_found(sim_stack: Stack, path: str) -> None:
    body = {"model": "gpt-5", "messages": HI, "prompt": "a"}
    error = problem(post(sim_stack, orjson.dumps(body), path), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


BROKEN = {
    "empty": b"",
    "not json": b"hello",
    "cut": b'{"model": "sim", "messages": [',
    "trailing": orjson.dumps(GOOD) + b" x",
    "an array": b"[]",
    "a string": b'"hello"',
    "null": b"null",
    "invalid utf-8": b'{"model": "sim", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "a lone surrogate": b'{"model":"sim","messages":[{"role":"user","content":"\\ud800"}]}',
    "nul bytes": b"\x00" * 100,
    "nested deeply": b'{"messages":' + b"[" * 200_000,
    "utf-16": '{"model": "sim"}'.encode("utf-16"),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", BROKEN)
def test_a_body_that_is_no_json_object_is_refused(sim_stack: Stack, name: str, path: str) -> None:
    error = problem(post(sim_stack, BROKEN[name], path), 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_json")


FIELDS: list[tuple[str, Any]] = [
    ("model", 7),
    ("model", None),
    ("model", ""),
    ("messages", None),
    ("messages", "hi"),
    ("messages", []),
    ("messages", {}),
    ("messages[0]", ["hi"]),
    ("messages[0].role", [{"role": "wizard", "content": "hi"}]),
    ("messages[0].role", [{"content": "hi"}]),
    ("messages[0].content", [{"role": "user", "content": 5}]),
    ("messages[1].content[0].type", [*HI, {"role": "user", "content": [{"type": "odd"}]}]),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 10**9),
    ("max_tokens", 10**30),
    ("max_tokens", 2.5),
    ("max_tokens", "ten"),
    ("max_tokens", True),
    ("max_completion_tokens", -1),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.5),
    ("n", 0),
    ("n", 1000),
    ("stream", "yes"),
    ("stop", [str(number) for number in range(100)]),
    ("logit_bias", {"1": 1000}),
    ("service_tier", "gold"),
    ("user", "u" * 65),
    ("metadata", {"k": 1}),
    ("metadata", {str(number): "v" for number in range(17)}),
    ("response_format", {"type": "yaml"}),
    ("tools", []),
    ("stream_options", {"include_usage": True}),
    ("prompt_embeds", "AAAA"),
    ("chat_template", "{{ messages }}"),
]


@pytest.mark.parametrize(("param", "value"), FIELDS, ids=lambda value: f"{value!r:.30}")
def test_a_wrong_field_is_named(sim_stack: Stack, param: str, value: Any) -> None:
    field = param.partition("[")[0]
    body = orjson.dumps({**GOOD, field: None}).replace(
        b'"%s":null' % field.encode(), b'"%s":%s' % (field.encode(), _json(value))
    )
    error = problem(post(sim_stack, body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None
    # What is wrong deep inside a small object may be named more exactly than asked here.
    assert error["param"].startswith(param)
    assert field in error["message"]


def _json(value: Any) -> bytes:
    """Return JSON of any integer; orjson knows 64 bits."""
    return str(value).encode() if type(value) is int else orjson.dumps(value)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_missing_field_is_named(sim_stack: Stack, field: str) -> None:
    body = {name: value for name, value in GOOD.items() if name != field}
    error = problem(post(sim_stack, orjson.dumps(body)), 400)
    assert (error["param"], error["code"]) == (field, "missing_required_parameter")


@pytest.mark.parametrize(
    ("param", "prompt"),
    [("prompt", None), ("prompt", []), ("prompt", 5), ("prompt", [1, "a"]), ("prompt", {})],
)
def test_a_wrong_prompt_is_named(sim_stack: Stack, param: str, prompt: Any) -> None:
    body = orjson.dumps({"model": "sim", "prompt": prompt, "max_tokens": 2})
    error = problem(post(sim_stack, body, COMPLETIONS), 400)
    assert error["param"].startswith(param)


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_what_is_no_number_is_refused_where_it_stands(sim_stack: Stack, constant: bytes) -> None:
    body = orjson.dumps({**GOOD, "temperature": None}).replace(b"null", constant)
    error = problem(post(sim_stack, body), 400)
    assert error["param"] == "temperature"
    assert constant.decode() in error["message"]


# How much


def padded(size_bytes: int) -> bytes:
    """Return a good request of exactly so many bytes, most of them blanks."""
    body = orjson.dumps(GOOD)
    return body[:-1] + b" " * (size_bytes - len(body)) + b"}"


def chunks(body: bytes) -> Iterator[bytes]:
    """Return the body in pieces, so that it is sent without a content-length."""
    for start in range(0, len(body), 2**18):
        yield body[start : start + 2**18]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_have_sixteen_mebibytes_and_not_one_byte_more(
    sim_stack: Stack, chunked: bool
) -> None:
    largest, larger = padded(LIMIT_BYTES), padded(LIMIT_BYTES + 1)
    accepted = post(sim_stack, chunks(largest) if chunked else largest)
    assert accepted.status_code == 200, accepted.text[:500]
    error = problem(post(sim_stack, chunks(larger) if chunked else larger), 413)
    assert error["code"] == "request_too_large"
    assert str(LIMIT_BYTES) in error["message"]


def test_a_content_length_far_over_the_limit_is_refused_unread(sim_stack: Stack) -> None:
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {10**12}\r\n\r\n"
    )
    assert raw(sim_stack, head.encode()).startswith(b"HTTP/1.1 413 ")


def test_a_hundred_thousand_messages_are_too_many(sim_stack: Stack) -> None:
    body = orjson.dumps({**GOOD, "messages": HI * 100_000})
    error = problem(post(sim_stack, body), 400)
    assert (error["param"], error["code"]) == ("messages", "array_above_max_length")
    assert "100000" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("words", [CONTEXT_TOKENS + 1, 2 * CONTEXT_TOKENS, 12 * CONTEXT_TOKENS])
def test_a_prompt_longer_than_the_context_says_by_how_much(
    sim_stack: Stack, path: str, stream: bool, words: int
) -> None:
    """The lengths are: just over the context, more, and by estimate more than the KV cache."""
    text = "abcd" * words
    prompt = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    body = orjson.dumps({"model": "sim", "stream": stream, **prompt})
    error = problem(post(sim_stack, body, path), 400)
    assert error["code"] == "context_length_exceeded"
    numbers = [int(number) for number in re.findall("[0-9]+", error["message"])]
    assert len(numbers) == 2
    assert CONTEXT_TOKENS <= min(numbers) < words <= max(numbers)
    still_serves(sim_stack)


# Where and how


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", CHAT, "POST"),
        ("DELETE", COMPLETIONS, "POST"),
        ("POST", "/v1/models", "GET"),
        ("POST", "/health", "GET"),
        ("PATCH", "/metrics", "GET"),
    ],
)
def test_a_wrong_method_is_told_the_right_one(
    sim_stack: Stack, method: str, path: str, allowed: str
) -> None:
    with sim_stack.http() as client:
        answer = client.request(method, path)
    assert problem(answer, 405)["code"] == "method_not_allowed"
    assert allowed in answer.headers["allow"]


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/embeddings", "/v1/chat/completions/", "/admin", "/../etc/passwd"]
)
def test_an_unknown_route_is_not_found(sim_stack: Stack, path: str) -> None:
    with sim_stack.http() as client:
        error = problem(client.post(path, json=GOOD), 404)
    assert error["code"] == "unknown_url"


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
        "application/jsonx",
        "",
    ],
)
def test_a_wrong_content_type_is_refused(sim_stack: Stack, content_type: str) -> None:
    answer = post(sim_stack, orjson.dumps(GOOD), **{"content-type": content_type})
    error = problem(answer, 415)
    assert (error["code"], error["param"]) == ("unsupported_media_type", "content-type")


def raw(stack: Stack, request: bytes) -> bytes:
    """Send bytes to the server as they are; return what it answers first."""
    address = httpx.URL(stack.url)
    with socket.create_connection((address.host, address.port or 80), timeout=120) as connection:
        connection.sendall(request)
        return connection.recv(65_536)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n"
        b"content-length: 2\r\n\r\nab",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-large: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    ids=["no http", "version", "tls", "negative length", "two lengths", "large header"],
)
def test_what_is_no_http_is_refused_at_the_door(sim_stack: Stack, request_bytes: bytes) -> None:
    answer = raw(sim_stack, request_bytes)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    still_serves(sim_stack)


@pytest.mark.parametrize(
    ("path", "key", "status"), [(CHAT, "", b"401"), ("/v1/nowhere", KEY, b"404")]
)
def test_who_is_refused_cannot_hold_a_connection_by_a_body_that_never_ends(
    sim_stack: Stack, path: str, key: str, status: bytes
) -> None:
    address = httpx.URL(sim_stack.url)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {key}\r\ncontent-length: {LIMIT_BYTES}\r\n\r\n"
    )
    with socket.create_connection((address.host, address.port or 80), timeout=120) as connection:
        connection.sendall(head.encode() + b"{")
        assert connection.recv(65_536).startswith(b"HTTP/1.1 " + status)
        connection.settimeout(0.1)

        def closed() -> bool:
            try:
                connection.sendall(b" ")
                return connection.recv(65_536) == b""
            except TimeoutError:
                return False
            except OSError:
                return True

        until(closed, "the end of the connection")


# Headers by which a client could steer Serve or an engine


ENGINE_HEADERS = {
    "X-Vllm-Priority": "-1000",
    "x-request-disconnect-disabled": "?1",
    "x-request-timeout-seconds": "0.001",
    "serve_multiplexed_model_id": "other",
    "serve-multiplexed-model-id": "other",
    "X-data-parallel-rank": "7",
    "X-Session-ID": "somebody-elses",
    "x-headrace-class": "critical",
    "x-headrace-pool": "other",
    "x-forwarded-for": "10.0.0.1",
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ENGINE_HEADERS)
def test_engine_headers_of_clients_change_nothing(
    sim_stack: Stack, name: str, stream: bool
) -> None:
    body = orjson.dumps({**GOOD, "max_tokens": 20, "stream": stream})
    plain = post(sim_stack, body)
    steered = post(sim_stack, body, **{name: ENGINE_HEADERS[name]})
    assert steered.status_code == 200, steered.text
    assert text_of(steered) == text_of(plain) != ""
    for header in ("x-headrace-class", "x-headrace-pool"):
        assert steered.headers.get_list(header) == plain.headers.get_list(header)


def text_of(answer: httpx.Response) -> str:
    """Return the text of an answer, streamed or not."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return str(answer.json()["choices"][0]["message"]["content"])
    events = answer.text.removesuffix("data: [DONE]\n\n").split("\n\n")
    bodies = [orjson.loads(event.removeprefix("data: ")) for event in events if event]
    return "".join(body["choices"][0]["delta"].get("content", "") for body in bodies)


def test_a_client_cannot_keep_its_abandoned_request_running(sim_stack: Stack) -> None:
    def cancelled() -> float:
        return sim_stack.metric("headrace_engine_requests_total", outcome="cancelled")

    before = cancelled()
    headers = {"x-request-disconnect-disabled": "?1"}
    with sim_stack.http() as client:
        body = {**GOOD, "max_tokens": 100_000, "stream": True}
        with client.stream("POST", CHAT, json=body, headers=headers) as answer:
            next(answer.iter_bytes())
    until(lambda: cancelled() == before + 1, "the engine's cancellation")


# Without room and without an engine


async def test_a_full_queue_is_a_429_with_advice(policies_stack: Stack) -> None:
    ask: dict[str, Any] = {"model": "tight", "messages": HI}
    async with policies_stack.async_openai() as client:
        running = await client.chat.completions.create(**ask, max_tokens=100_000, stream=True)
        await anext(aiter(running))
        waiting = [
            asyncio.create_task(client.chat.completions.create(**ask, max_tokens=2))
            for _ in range(2)
        ]
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await running.close()
        await asyncio.wait(waiting)
    assert len(done) == 1
    error = done.pop().exception()
    assert isinstance(error, openai.RateLimitError)
    assert error.code == "overloaded_queue_full"
    assert error.type == "rate_limit_error"
    assert 1 <= int(error.response.headers["retry-after"]) <= 61
    assert sum(task.exception() is None for task in waiting) == 1


def test_without_a_replica_it_is_a_503_with_advice(policies_stack: Stack) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        policies_stack.openai().chat.completions.create(model="empty", messages=HI)
    assert caught.value.status_code == 503
    assert caught.value.code == "no_replica"
    assert int(caught.value.response.headers["retry-after"]) >= 1


def test_readiness_tells_the_pools_apart(policies_stack: Stack) -> None:
    with policies_stack.http(key=None) as client:
        answer = client.get("/ready")
    assert answer.status_code == 200
    pools = answer.json()["pools"]
    assert pools["empty"] == {"ready": False, "replicas": 0, "asleep": True}
    assert pools["tight"] == {"ready": True, "replicas": 1}


# What the client library makes of it


@pytest.mark.parametrize(
    ("kind", "status", "options"),
    [
        (openai.BadRequestError, 400, {"model": "sim", "messages": []}),
        (openai.BadRequestError, 400, {"model": "sim", "messages": HI, "max_tokens": -1}),
        (openai.NotFoundError, 404, {"model": "none", "messages": HI}),
        (openai.APIStatusError, 413, {"model": "m" * (LIMIT_BYTES + 1), "messages": HI}),
        (
            openai.APIStatusError,
            415,
            {"model": "sim", "messages": HI, "extra_headers": {"content-type": "text/plain"}},
        ),
    ],
)
def test_the_openai_client_raises_the_right_exception(
    sim_stack: Stack, kind: type[openai.APIStatusError], status: int, options: dict[str, Any]
) -> None:
    with pytest.raises(kind) as caught:
        sim_stack.openai().chat.completions.create(**options)
    assert type(caught.value) is kind
    assert caught.value.status_code == status
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        sim_stack.openai(api_key="wrong-key").chat.completions.create(**options)


async def test_a_thousand_bad_requests_leave_nothing_behind(sim_stack: Stack) -> None:
    bodies = [*BROKEN.values(), orjson.dumps({**GOOD, "model": "none"})]
    async with httpx.AsyncClient(
        base_url=sim_stack.url,
        headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
        timeout=240,
        limits=httpx.Limits(max_connections=16),
    ) as client:
        answers = await asyncio.gather(
            *(client.post(CHAT, content=bodies[number % len(bodies)]) for number in range(1000))
        )
    assert {answer.status_code for answer in answers} == {400, 404}
    until(lambda: is_idle(sim_stack), "an empty stack")
    still_serves(sim_stack)
