"""Which requests go straight to their endpoint, and which through everything."""

from __future__ import annotations

from typing import Any

import pytest

from serve_app.gateway.front import Front


@pytest.mark.parametrize(
    ("scope", "reached"),
    [
        ({"type": "http", "method": "POST", "path": "/hot"}, "hot"),
        ({"type": "http", "method": "POST", "path": "/hot/"}, "others"),
        ({"type": "http", "method": "GET", "path": "/hot"}, "others"),
        ({"type": "http", "method": "POST", "path": "/hot", "root_path": "/x"}, "others"),
        ({"type": "http", "method": "POST", "path": "/hot", "root_path": ""}, "hot"),
        ({"type": "websocket", "path": "/hot"}, "others"),
        ({"type": "lifespan"}, "others"),
    ],
)
async def test_only_a_post_to_a_hot_path_goes_straight(scope: Any, reached: str) -> None:
    seen: list[str] = []

    async def hot(*_: Any) -> None:
        seen.append("hot")

    async def others(*_: Any) -> None:
        seen.append("others")

    async def nothing(*_: Any) -> Any:
        return {}

    await Front({"/hot": hot}, others)(scope, nothing, nothing)
    assert seen == [reached]
