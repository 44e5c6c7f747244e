"""The front of the router's application: the few hot routes, then everything else.

Starlette's middlewares and its routing cost more than the request's governance, and the
completion endpoints need nothing of them: they answer every error themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send


class Front:
    """Sends a POST to one of these paths straight to its application."""

    def __init__(self, posts: Mapping[str, ASGIApp], others: ASGIApp) -> None:
        self._posts = posts
        self._others = others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of any kind."""
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            hot = self._posts.get(scope["path"])
            if hot is not None:
                await hot(scope, receive, send)
                return
        await self._others(scope, receive, send)
