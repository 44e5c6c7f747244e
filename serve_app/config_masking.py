"""Replaces secrets in a configuration that is about to be printed."""

from __future__ import annotations

import re
from typing import Any

MASK = "********"

_SECRET_WORDS = frozenset(
    {"secret", "password", "passwd", "passphrase", "token", "credential", "credentials", "apikey"}
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_URL_PASSWORD = re.compile(r"(://[^\s/:@]*:)[^\s@/]+(@)")
_QUERY_SECRET = re.compile(
    r"([?&;](?:password|passwd|token|secret|api_?key|access_?key)=)[^&;\s]+", re.IGNORECASE
)
_API_KEY = re.compile(r"\b(?:hr-[a-z0-9]{8}-|sk-|hf_|ghp_)[A-Za-z0-9_-]{8,}")


def masked(value: Any) -> Any:
    """Return a copy of a YAML document with every text that looks secret replaced.

    A text is secret by the name of its field (its last word is `key`, or one of its words
    is `token`, `password`, ...) or by its look (a password in a URL, an API key).
    """
    if isinstance(value, dict):
        return {key: _masked_field(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [masked(inner) for inner in value]
    return _masked_text(value) if isinstance(value, str) else value


def _masked_field(name: str, value: Any) -> Any:
    if isinstance(value, str) and value and _is_secret_name(name):
        return MASK
    return masked(value)


def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    return bool(words) and (words[-1] == "key" or not _SECRET_WORDS.isdisjoint(words))


def _masked_text(text: str) -> str:
    text = _URL_PASSWORD.sub(rf"\g<1>{MASK}\g<2>", text)
    text = _QUERY_SECRET.sub(rf"\g<1>{MASK}", text)
    return _API_KEY.sub(MASK, text)
