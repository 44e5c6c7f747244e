"""The API as its clients meet it: through HAProxy, with the unmodified `openai` client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.config import ControlArgs, ControlLinkSettings
from tests.e2e.canaries import files_with, request_lines
from tests.e2e.waiting import until
from tests.stack import KEY, ROOT, Stack

CONFIG = ROOT / "configs" / "sim.yaml"
CHAT = "/v1/chat/completions"


def question(text: str = "What is the capital of France?") -> list[Any]:
    return [{"role": "user", "content": text}]


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": question(), "max_tokens": 4, **fields}


@pytest.fixture(scope="module")
def made_key(sim_stack: Stack) -> Callable[..., str]:
    """A function that makes a key which every router knows already."""

    def make(**fields: Any) -> str:
        with sim_stack.http() as admin:
            created = admin.post("/admin/keys", json={"name": "test", **fields})
        assert created.status_code == 201, created.text
        secret = str(created.json()["key"])
        until(lambda: _status(sim_stack, secret) == 200, "the key is known")
        return secret

    return make


def _status(stack: Stack, key: str | None) -> int:
    with stack.http(key) as client:
        return client.get("/v1/models").status_code


# Completions


def test_a_chat_answer_comes_whole(sim_stack: Stack) -> None:
    answer = sim_stack.openai().chat.completions.create(
        model="sim", messages=question(), max_tokens=12
    )
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert len((choice.message.content or "").split()) == 12
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.usage.prompt_tokens > 0
    assert answer.id.startswith("chatcmpl-")


def test_a_chat_answer_streams_the_same_words(sim_stack: Stack) -> None:
    client = sim_stack.openai()
    whole = client.chat.completions.create(model="sim", messages=question(), max_tokens=12)
    chunks = list(
        client.chat.completions.create(model="sim", messages=question(), max_tokens=12, stream=True)
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_completion_comes_whole_and_streamed(sim_stack: Stack) -> None:
    client = sim_stack.openai()
    whole = client.completions.create(model="sim", prompt="Once upon a time", max_tokens=9)
    assert len(whole.choices[0].text.split()) == 9
    stream = client.completions.create(
        model="sim", prompt="Once upon a time", max_tokens=9, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_several_prompts_get_an_answer_each(sim_stack: Stack) -> None:
    answer = sim_stack.openai().completions.create(model="sim", prompt=["a", "b"], max_tokens=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text != answer.choices[1].text


def test_two_choices_come_whole_and_streamed(sim_stack: Stack) -> None:
    client = sim_stack.openai()
    whole = client.chat.completions.create(model="sim", messages=question(), max_tokens=6, n=2)
    texts = [choice.message.content or "" for choice in whole.choices]
    assert len(texts) == 2
    assert texts[0] != texts[1]
    streamed = ["", ""]
    for chunk in client.chat.completions.create(
        model="sim", messages=question(), max_tokens=6, n=2, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_usage_comes_in_the_last_chunk_if_asked_for(sim_stack: Stack) -> None:
    chunks = list(
        sim_stack.openai().chat.completions.create(
            model="sim",
            messages=question(),
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": False}}])
def test_usage_does_not_come_unasked(sim_stack: Stack, options: dict[str, Any]) -> None:
    chunks = sim_stack.openai().chat.completions.create(
        model="sim", messages=question(), max_tokens=5, stream=True, **options
    )
    assert [chunk for chunk in chunks if chunk.usage is not None or not chunk.choices] == []


def test_a_stream_is_events_ended_by_done(sim_stack: Stack) -> None:
    with sim_stack.http() as client:
        answer = client.post(CHAT, json=chat_body(stream=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])


async def test_many_streams_at_once_each_get_their_own_answer(sim_stack: Stack) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> tuple[str, str]:
        messages = question(f"Question number {number}")
        stream = await client.chat.completions.create(
            model="sim", messages=messages, max_tokens=8, stream=True
        )
        streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        whole = await client.chat.completions.create(model="sim", messages=messages, max_tokens=8)
        return streamed, whole.choices[0].message.content or ""

    async with sim_stack.async_openai() as client:
        answers = await asyncio.gather(*(ask(client, number) for number in range(24)))
    assert all(streamed == whole for streamed, whole in answers)
    assert len({whole for _, whole in answers}) == 24


def test_requests_go_through_haproxy_which_bounds_headers(sim_stack: Stack) -> None:
    door, *_ = sim_stack.processes("haproxy", "-dS", "-f")
    file = door.cmdline()[door.cmdline().index("-f") + 1]
    assert "timeout http-request 10000ms" in Path(file).read_text()
    listening = [each for each in door.net_connections() if each.status == "LISTEN"]
    assert {each.laddr.ip for each in listening} == {"127.0.0.1"}


# The other routes


def test_models_are_listed_and_found_by_name(sim_stack: Stack) -> None:
    client = sim_stack.openai()
    assert [model.id for model in client.models.list()] == ["gpt-4o-mini", "sim"]
    model = client.models.retrieve("gpt-4o-mini")
    assert (model.id, model.object, model.owned_by) == ("gpt-4o-mini", "model", "headrace")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-5")
    assert caught.value.code == "model_not_found"


def test_health_and_readiness_need_no_key(sim_stack: Stack) -> None:
    with sim_stack.http(key=None) as client:
        health, ready = client.get("/health"), client.get("/ready")
    assert (health.status_code, health.json()) == (200, {"status": "alive"})
    assert ready.status_code == 200
    expected = {
        "status": "ready",
        "pools": {"sim": {"ready": True, "replicas": 2}},
        "keys_loaded": True,
        "limits_loaded": True,
        "fast_path": True,
        "notes": [],
    }
    assert expected.items() <= ready.json().items()


def test_metrics_are_the_whole_applications(sim_stack: Stack) -> None:
    for name, least in (("replicas", 2), ("build_info", 4), ("open_descriptors", 11)):
        until(
            lambda of=name, count=least: sim_stack.metric(f"headrace_{of}") >= count,  # type: ignore[misc]  # defaults
            f"every process has told its {name}",
        )
    with sim_stack.http(key=None) as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {f.name: f for f in text_string_to_metric_families(answer.text)}
    roles = [s.labels["role"] for s in families["headrace_build_info"].samples]
    assert sorted(roles) == ["control", "engine", "engine", "router"]
    slots = families["headrace_engine_slots"].samples
    assert len({sample.labels["replica"] for sample in slots}) == 2
    assert [s.value for s in families["headrace_replicas"].samples] == [2.0]
    [descriptors] = families["headrace_open_descriptors"].samples
    assert descriptors.value > 10, "the loop's probes are told"
    [age] = families["headrace_scrape_age_seconds"].samples
    assert age.value >= 0


def test_a_request_moves_the_counters_of_router_and_engine(sim_stack: Stack) -> None:
    names = ("headrace_requests_total", "headrace_engine_requests_total")
    completed = {"outcome": "completed"}
    before = [sim_stack.metric(name, **completed) for name in names]
    tokens = sim_stack.metric("headrace_tokens_total", kind="output")
    first_tokens = sim_stack.metric("headrace_time_to_first_token_seconds_count")
    with sim_stack.http() as client:
        answer = client.post(CHAT, json=chat_body(max_tokens=7, stream=True))
    assert answer.status_code == 200
    until(
        lambda: all(
            sim_stack.metric(name, **completed) > count
            for name, count in zip(names, before, strict=True)
        ),
        "both counters move",
    )
    # By now what moved may have been an earlier request, told of late.
    until(
        lambda: sim_stack.metric("headrace_tokens_total", kind="output") >= tokens + 7,
        "its tokens are counted",
    )
    until(
        lambda: sim_stack.metric("headrace_time_to_first_token_seconds_count") > first_tokens,
        "its first token is timed",
    )


# Names and log lines

RESPONSES = [
    ("GET", "/health", None),
    ("GET", "/ready", None),
    ("GET", "/metrics", None),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/none", None),
    ("GET", "/nowhere", None),
    ("DELETE", CHAT, None),
    ("POST", CHAT, b"{"),
    ("POST", CHAT, json.dumps(chat_body()).encode()),
    ("POST", CHAT, json.dumps(chat_body(stream=True)).encode()),
    ("POST", CHAT, json.dumps(chat_body(model="none")).encode()),
    ("POST", "/v1/completions", b'{"model": "sim", "prompt": "a", "max_tokens": 2}'),
    ("GET", "/admin/keys", None),
]


@pytest.mark.parametrize("key", [KEY, "wrong-key"])
@pytest.mark.parametrize(("method", "path", "body"), RESPONSES)
def test_every_response_is_named_once(
    sim_stack: Stack, method: str, path: str, body: bytes | None, key: str
) -> None:
    headers = {"content-type": "application/json", "x-request-id": "my-label"}
    with sim_stack.http(key) as client:
        answer = client.request(method, path, content=body, headers=headers)
    assert answer.headers.get_list("x-request-id") == ["my-label"]
    [own] = answer.headers.get_list("x-headrace-request-id")
    assert own.startswith("req_")


@pytest.mark.parametrize("label", ["x" * 129, "two words", "caf\u00e9"])
def test_a_label_that_is_long_or_not_printable_is_ignored(sim_stack: Stack, label: str) -> None:
    with sim_stack.http() as client:
        answer = client.get("/v1/models", headers={b"x-request-id": label.encode()})
    own = answer.headers["x-headrace-request-id"]
    assert answer.headers.get_list("x-request-id") == [own]


def test_the_openai_client_knows_its_requests_name(sim_stack: Stack) -> None:
    answer = sim_stack.openai().chat.completions.create(
        model="sim", messages=question(), max_tokens=2
    )
    assert (answer._request_id or "").startswith("req_")
    with pytest.raises(openai.NotFoundError) as caught:
        sim_stack.openai().chat.completions.create(model="none", messages=question())
    assert (caught.value.request_id or "").startswith("req_")


def test_every_request_leaves_one_log_line_without_content(sim_stack: Stack) -> None:
    secret_words = "the-prompt-is-nobodys-business"
    label = f"log-test-{time.monotonic_ns()}"
    with sim_stack.http() as client:
        for body in (
            chat_body(messages=question(secret_words), max_tokens=3),
            chat_body(messages=question(secret_words), temperature=9),
        ):
            client.post(CHAT, json=body, headers={"x-request-id": label})
    mine = list[dict[str, Any]]()

    def both_written() -> bool:
        mine[:] = [
            line for line in request_lines(sim_stack) if line.get("client_request_id") == label
        ]
        return len(mine) >= 2

    until(both_written, "two log lines")
    served, refused = mine
    assert (served["status"], served["decision"], served["outcome"]) == (
        200,
        "dispatched",
        "completed",
    )
    assert (served["model"], served["pool"], served["key_id"]) == ("sim", "sim", "bootstrap")
    assert served["output_tokens"] == 3
    assert served["duration_s"] >= served["time_to_first_token_s"] >= 0
    assert (refused["status"], refused["decision"], refused["outcome"]) == (
        400,
        "refused",
        "rejected",
    )
    assert files_with(sim_stack.folder, secret_words) == []


# Keys


def test_keys_made_and_revoked_on_the_command_line_work_without_a_restart(
    sim_stack: Stack,
) -> None:
    created = sim_stack.headrace("keys", "create", "--name", "cli", "--config", CONFIG, "--json")
    assert created.returncode == 0, created.stderr
    key = json.loads(created.stdout)
    until(lambda: _status(sim_stack, key["key"]) == 200, "the key is known")
    listed = sim_stack.headrace("keys", "list", "--config", CONFIG)
    assert key["id"] in listed.stdout
    assert key["key"] not in listed.stdout + listed.stderr
    revoked = sim_stack.headrace("keys", "revoke", key["id"], "--config", CONFIG)
    assert revoked.returncode == 0, revoked.stderr
    until(lambda: _status(sim_stack, key["key"]) == 401, "the key is revoked")
    assert key["id"] not in sim_stack.headrace("keys", "list", "--config", CONFIG).stdout


def test_keys_made_and_revoked_over_http_work_without_a_restart(
    sim_stack: Stack, made_key: Callable[..., str]
) -> None:
    secret = made_key(name="http", tenant="acme")
    with sim_stack.http() as admin:
        [mine] = [k for k in admin.get("/admin/keys").json()["data"] if k["name"] == "http"]
        assert (mine["tenant"], mine["state"]) == ("acme", "valid")
        assert "key" not in mine
        assert secret not in admin.get("/admin/keys").text
        assert admin.delete(f"/admin/keys/{mine['id']}").json()["state"] == "revoked"
    until(lambda: _status(sim_stack, secret) == 401, "the key is revoked")
    with pytest.raises(openai.AuthenticationError):
        sim_stack.openai(api_key=secret).models.list()


def test_a_change_of_keys_reaches_routers_within_two_seconds() -> None:
    """The two periods that a change may have to wait for; a test's clock proves nothing."""
    assert ControlArgs().follow_period_s + ControlLinkSettings().heartbeat_period_s < 2


def test_only_an_admin_key_administers(sim_stack: Stack, made_key: Callable[..., str]) -> None:
    with sim_stack.http(made_key()) as client:
        answers = [
            client.get("/admin/keys"),
            client.post("/admin/keys", json={"name": "mine", "admin": True}),
            client.delete("/admin/keys/bootstrap"),
        ]
    assert [answer.status_code for answer in answers] == [403, 403, 403]
    with sim_stack.http() as client:
        assert client.delete("/admin/keys/bootstrap").status_code == 400
        assert client.delete("/admin/keys/nosuchid").status_code == 404
        refused = client.post("/admin/keys", json={"name": "x", "priority": "critical"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"


def test_a_key_is_held_to_its_models(sim_stack: Stack, made_key: Callable[..., str]) -> None:
    client = sim_stack.openai(api_key=made_key(models=["gpt-4o-mini"]))
    assert [model.id for model in client.models.list()] == ["gpt-4o-mini"]
    client.chat.completions.create(model="gpt-4o-mini", messages=question(), max_tokens=2)
    with pytest.raises(openai.PermissionDeniedError) as caught:
        client.chat.completions.create(model="sim", messages=question(), max_tokens=2)
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("sim")


@pytest.mark.parametrize(
    ("ceiling", "tier", "served"),
    [
        ("sheddable", "priority", "sheddable"),
        ("sheddable", "default", "sheddable"),
        ("standard", "priority", "standard"),
        ("standard", "flex", "sheddable"),
        ("standard", None, "standard"),
        ("critical", "priority", "critical"),
        ("critical", "auto", "standard"),
    ],
)
def test_a_tier_above_the_keys_ceiling_is_served_at_the_ceiling(
    sim_stack: Stack,
    made_key: Callable[..., str],
    ceiling: str,
    tier: str | None,
    served: str,
) -> None:
    body = chat_body() if tier is None else chat_body(service_tier=tier)
    with sim_stack.http(made_key(priority_ceiling=ceiling)) as client:
        answer = client.post(CHAT, json=body)
    assert answer.status_code == 200
    assert answer.headers["x-headrace-class"] == served
    assert answer.headers["x-headrace-pool"] == "sim"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"bearer {KEY}"},
        {"x-api-key": KEY},
        {"api-key": KEY},
    ],
)
def test_a_key_may_come_in_the_ways_clients_send_it(
    sim_stack: Stack, headers: dict[str, str]
) -> None:
    with httpx.Client(base_url=sim_stack.url, headers=headers, timeout=120) as client:
        assert client.get("/v1/models").status_code == 200


def test_keys_are_printed_nowhere(sim_stack: Stack, made_key: Callable[..., str]) -> None:
    """Neither the bootstrap key nor a made one, a wrong one or its digest's source."""
    made, wrong = made_key(), "hr-abcdefgh-" + "w" * 43
    for key in (KEY, made, wrong):
        with sim_stack.http(key) as client:
            client.post(CHAT, json=chat_body())
            client.get("/nowhere")
    assert KEY not in sim_stack.output()
    assert files_with(sim_stack.folder, KEY, made, wrong) == []
    assert sim_stack.processes(KEY) == []
