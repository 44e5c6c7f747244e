"""What is secret in a configuration."""

from __future__ import annotations

import pytest

from serve_app.config_masking import MASK, masked


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "DB_PASSWORD",
        "hf_token",
        "accessToken",
        "AWS_SECRET_ACCESS_KEY",
        "api_key",
        "apiKey",
        "key",
        "CREDENTIALS",
    ],
)
def test_texts_under_a_secret_name_are_masked_at_any_depth(name: str) -> None:
    assert masked({"a": [{name: "x"}]}) == {"a": [{name: MASK}]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer", "gpt2"),
        ("token_budget", 8192),
        ("max_num_batched_tokens", 5),
        ("keyboard", "x"),
        ("key_path", "/etc/tls.pem"),
        ("password", None),
        ("password", ""),
        ("ssl_keyfile", "/etc/tls.key"),
    ],
)
def test_what_only_sounds_secret_is_shown(name: str, value: object) -> None:
    assert masked({name: value}) == {name: value}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://ann:p%40ss@db:5432/x", f"postgresql+psycopg://ann:{MASK}@db:5432/x"),
        ("redis://:hunter2@cache", f"redis://:{MASK}@cache"),
        (
            "postgresql://db/x?user=ann&password=hunter2&sslmode=require",
            f"postgresql://db/x?user=ann&password={MASK}&sslmode=require",
        ),
        ("hr-abcdefgh-" + "s" * 43, MASK),
        ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
        ("sqlite:////var/lib/x.db", "sqlite:////var/lib/x.db"),
    ],
)
def test_secrets_inside_texts_are_masked(text: str, shown: str) -> None:
    assert masked([text]) == [shown]


def test_the_original_is_not_changed() -> None:
    original = {"env": {"TOKEN": "x"}}
    masked(original)
    assert original == {"env": {"TOKEN": "x"}}
