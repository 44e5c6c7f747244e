"""Exact prompt lengths, by a pool's own tokenizer in a few bounded threads.

Only asked where an estimate cannot decide (tickets.py). Whoever asks gets None where there
is no tokenizer, or too many wait already, and goes on with the estimate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app import models
from serve_app.core.types import PoolName
from serve_app.gateway.prompt import ROLE_MARK, TEXT_MARK

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger("headrace.tokens")

THREADS = 2
WAITING_MAX = 8
TOKENS_PER_MESSAGE = 4
FILE_NAME = "tokenizer.json"


class TokenCounter:
    """Counts on threads of its own; one per router, used from its loop."""

    def __init__(self, load: Callable[[str], Tokenizer] | None = None) -> None:
        """``load`` reads what a pool's ``prompt.tokenizer`` names; by default from a file."""
        self._load = load or load_tokenizer
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokens")
        self._sources: dict[PoolName, str] = {}
        self._loaded: dict[str, Tokenizer | None] = {}
        self._waiting = 0

    def configure(self, sources: Mapping[PoolName, str]) -> None:
        """Use these tokenizers; a changed one is read when it is first needed."""
        self._sources = dict(sources)
        self._loaded = {
            name: self._loaded[name] for name in {*sources.values()} & self._loaded.keys()
        }

    async def count(self, pool: PoolName, prefix: bytes) -> int | None:
        """Return how many tokens a prompt's text has, as laid out by ``gateway.prompt``."""
        source = self._sources.get(pool)
        if source is None or self._waiting >= WAITING_MAX:
            return None
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, partial(self._count, source, prefix))
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the threads; what they count is finished first."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _count(self, source: str, prefix: bytes) -> int | None:
        """Count on a thread. A tokenizer that cannot be read is one log line, not an error."""
        if source not in self._loaded:
            try:
                self._loaded[source] = self._load(source)
            except Exception as error:  # noqa: BLE001  # tokenizers raises bare Exceptions
                logger.warning("no exact token counts from %s: %.200s", source, error)
                self._loaded[source] = None
        tokenizer = self._loaded[source]
        if tokenizer is None:
            return None
        text = prefix.decode("utf-8", "ignore")
        messages = prefix.count(ROLE_MARK)
        text = text.replace(ROLE_MARK.decode(), "\n").replace(TEXT_MARK.decode(), "\n")
        # Unlike ``encode`` this releases the interpreter's lock: the loop goes on meanwhile.
        [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return len(encoding) + TOKENS_PER_MESSAGE * messages


def load_tokenizer(source: str) -> Tokenizer:
    """Read a tokenizer.json; ``source`` is the file, its folder, or a built-in model's name.

    Raises:
        ConfigError: there is no such model folder.
        Exception: the file cannot be read, or the library is not installed.
    """
    from tokenizers import Tokenizer

    path = Path(source).expanduser()
    if not path.is_file():
        path = models.resolve(source, models.default_cache_dir()) / FILE_NAME
    tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
