"""How a database is connected to."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from serve_app.errors import StoreUnavailable
from serve_app.ledger.database import Database


@pytest.mark.parametrize(("query", "waits_s"), [("", 5), ("?connect_timeout=2", "2")])
def test_a_server_that_has_gone_is_not_waited_for_without_end(query: str, waits_s: Any) -> None:
    asked: dict[str, Any] = {}

    def note(_dialect: object, _record: object, _arguments: object, how: dict[str, Any]) -> None:
        asked.update(how)

    event.listen(Engine, "do_connect", note)
    try:
        with pytest.raises(StoreUnavailable):
            Database(f"postgresql+psycopg://nobody@127.0.0.1:1/none{query}")
    finally:
        event.remove(Engine, "do_connect", note)
    assert asked["connect_timeout"] == waits_s
    assert asked["tcp_user_timeout"] == 20_000
