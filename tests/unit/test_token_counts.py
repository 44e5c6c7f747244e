"""Exact counts: bounded threads, a pool's own tokenizer, and none where there is none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.core.types import PoolName
from serve_app.gateway.prompt import chat_prompt
from serve_app.token_counts import THREADS, TOKENS_PER_MESSAGE, WAITING_MAX, TokenCounter

POOL = PoolName("chat")


class Words:
    """A tokenizer whose tokens are words; ``gate`` holds it until it is set."""

    def __init__(self, gate: threading.Event | None = None) -> None:
        self._gate = gate
        self.running = 0

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        assert not add_special_tokens
        self.running += 1
        if self._gate is not None:
            assert self._gate.wait(120)
        return [text.split() for text in texts]


@pytest.fixture
def counters() -> Iterator[list[TokenCounter]]:
    made: list[TokenCounter] = []
    yield made
    for counter in made:
        counter.close()


async def test_a_prompt_is_counted_by_its_pools_tokenizer(counters: list[TokenCounter]) -> None:
    loaded: list[str] = []

    def load(source: str) -> Any:
        loaded.append(source)
        return Words()

    counter = TokenCounter(load)
    counters.append(counter)
    counter.configure({POOL: "/model"})
    messages = [{"role": "user", "content": "one two three"}]
    prefix = chat_prompt(messages, None).prefix

    # The role is a word of its own, and a template adds some tokens to every message.
    assert await counter.count(POOL, prefix) == 4 + TOKENS_PER_MESSAGE
    assert await counter.count(POOL, b"a b") == 2
    assert await counter.count(PoolName("other"), b"a b") is None
    assert loaded == ["/model"]


async def test_a_tokenizer_that_cannot_be_read_is_tried_once(
    counters: list[TokenCounter], caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[str] = []

    def load(source: str) -> Any:
        tries.append(source)
        raise OSError("no such file")

    counter = TokenCounter(load)
    counters.append(counter)
    counter.configure({POOL: "/gone"})
    assert [await counter.count(POOL, b"a") for _ in range(3)] == [None] * 3
    assert tries == ["/gone"]
    counter.configure({POOL: "/other"})
    assert await counter.count(POOL, b"a") is None
    assert tries == ["/gone", "/other"]


async def test_more_than_a_few_waiting_prompts_are_not_counted(
    counters: list[TokenCounter],
) -> None:
    held = threading.Event()
    words = Words(held)
    counter = TokenCounter(lambda source: words)  # type: ignore[arg-type,return-value]
    counters.append(counter)
    counter.configure({POOL: "/model"})
    waiting = [asyncio.create_task(counter.count(POOL, b"a b c")) for _ in range(WAITING_MAX)]
    await asyncio.sleep(0)

    assert await counter.count(POOL, b"a b c") is None
    assert words.running <= THREADS
    held.set()
    assert await asyncio.gather(*waiting) == [3] * WAITING_MAX
    assert await counter.count(POOL, b"a b c") == 3


async def test_a_tokenizer_file_is_read_and_never_cuts_or_pads(
    counters: list[TokenCounter], tmp_path: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(5)
    made.enable_padding(length=50)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    counter = TokenCounter()
    counters.append(counter)
    counter.configure({POOL: str(tmp_path), PoolName("b"): str(tmp_path / "tokenizer.json")})

    assert await counter.count(POOL, b"a b c d e f g") == 7
    assert await counter.count(PoolName("b"), b"a " * 2000) == 2000
