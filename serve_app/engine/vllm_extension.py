"""A running request's output limit, raised inside vLLM's engine process.

vLLM has no message for that. What it does hand to its scheduler as it comes is the ids of
requests that are to end: one that begins with our mark is not such an id and says which request
may go on, and how far. A scheduler that does not know the mark knows no such request.
"""

from __future__ import annotations

from typing import Any, Final

_MARK: Final = "headrace-extend:"


def extension(internal_id: str, output_tokens: int) -> str:
    """Return the id that lets vLLM's request ``internal_id`` go on to ``output_tokens``."""
    return f"{_MARK}{output_tokens}:{internal_id}"


class ExtendsAnswers:
    """Over a scheduler of vLLM's: takes extensions from among the ids of requests to end.

    A limit is only ever raised, so that one that comes twice, or late, changes nothing.
    """

    def finish_requests(self, request_ids: Any, *args: Any, **options: Any) -> Any:
        """End requests from outside a step."""
        if request_ids is not None and not isinstance(request_ids, str):
            request_ids = [each for each in request_ids if not self._extend(each)]
        return super().finish_requests(request_ids, *args, **options)  # type: ignore[misc]  # vLLM's

    def _extend(self, name: str) -> bool:
        if not name.startswith(_MARK):
            return False
        tokens, _, internal_id = name.removeprefix(_MARK).partition(":")
        request = self.requests.get(internal_id)  # type: ignore[attr-defined]  # vLLM's
        if request is not None:
            request.max_tokens = max(request.max_tokens, int(tokens))
        return True
