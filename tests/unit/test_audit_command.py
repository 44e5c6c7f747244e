"""`headrace audit`: every change made by the other commands, and who made it."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from serve_app.admin_client import HttpAudit
from serve_app.changes import ChangeQuery
from serve_app.cli import main
from serve_app.config import RouterConfig
from serve_app.rules import limits_by_path
from tests.unit.test_books_commands import PRICES, config, url  # noqa: F401  # fixtures

CHANGES = [
    ["keys", "create", "--name", "laptop", "--tenant", "acme"],
    ["budgets", "set", "tenant", "acme", "500", "--window", "month"],
    ["budgets", "add", "tenant", "acme", "10"],
    ["budgets", "remove", "tenant", "acme"],
]


def test_what_commands_change_is_shown_with_who_and_what(
    config: str,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    monkeypatch.setattr("socket.gethostname", lambda: "desk")
    for words in CHANGES:
        assert main([*words, "--config", config]) == 0
    created = capsys.readouterr()
    secret = next(line for line in created.out.splitlines() if line.startswith("hr-"))
    key_id = secret.split("-")[1]
    assert main(["keys", "revoke", key_id, "--config", config]) == 0
    file = tmp_path / "prices.yaml"
    file.write_text(PRICES)
    assert main(["prices", "import", str(file), "--note", "why", "--config", config]) == 0
    capsys.readouterr()

    assert main(["audit", "--config", config]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["NUMBER", "AT", "BY", "VIA", "ACTION", "OF", "WHAT"]
    assert [line.split()[0] for line in lines] == ["6", "5", "4", "3", "2", "1"]
    assert all(line.split()[2:4] == ["ann@desk", "command"] for line in lines)
    assert "prices.import" in lines[0]
    assert lines[0].endswith("version 0 -> 1, cards 0 -> 1 (why)")
    assert f"key {key_id}" in lines[1]
    assert "revoked_at_s - -> " in lines[1]
    assert lines[3].endswith("budget tenant acme  amount_usd 500 -> 510")
    assert secret not in "".join(lines)

    assert main(["audit", "--subject", "budget", "--limit", "1", "--json", "--config", config]) == 0
    [removed] = json.loads(capsys.readouterr().out)
    assert (removed["action"], removed["after"]) == ("budget.remove", None)


@pytest.mark.parametrize("words", [["--limit", "0"], ["--limit", "many"], ["--before", "-1"]])
def test_a_wrong_question_is_one_line(
    words: list[str],
    config: str,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["audit", *words, "--config", config]) == 2
    assert f"{words[0]}: must be a whole number from 1" in capsys.readouterr().err


def test_a_running_service_is_asked_the_same() -> None:
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(200, json={"object": "list", "data": []})

    audit = HttpAudit("http://here", "key", httpx.MockTransport(answer))
    assert audit.changes(ChangeQuery(7, 9, "key k1", None)) == []
    assert asked[0].path == "/admin/audit"
    assert dict(asked[0].params) == {"limit": "7", "before": "9", "subject": "key k1"}


def test_limits_are_told_by_path_and_nothing_that_is_not_set() -> None:
    configured = RouterConfig.model_validate(
        {
            "pools": {"p": {}},
            "aliases": {"plain": "p", "small": {"pool": "p", "limits": {"concurrent": 3}}},
            "tenants": {"acme": {"weight": 2, "users": {"ann": {"requests_per_min": 0}}}},
            "default_tenant": {"each_key": {"tokens_per_min": 9}},
            "keys": {"k1": {"max_prompt_tokens": 5}},
        }
    )
    assert limits_by_path(configured) == {
        "aliases.small.limits.concurrent": 3,
        "tenants.acme.weight": 2.0,
        "tenants.acme.users.ann.requests_per_min": 0,
        "default_tenant.each_key.tokens_per_min": 9,
        "keys.k1.max_prompt_tokens": 5,
    }
    assert limits_by_path(RouterConfig()) == {}
