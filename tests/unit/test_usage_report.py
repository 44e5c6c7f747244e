"""What may be asked of the ledger."""

from __future__ import annotations

import pytest

from serve_app.usage_report import BadQuery, usage_query


@pytest.mark.parametrize(
    ("by", "start", "end", "field", "words"),
    [
        ("tenant,colour", None, None, "by", "'colour' is not one of tenant, model"),
        ("tenant,tenant", None, None, "by", "twice"),
        ("", "yesterday", None, "from", "write 2026-01-31"),
        ("", None, "2026-02-30", "to", "write 2026-01-31"),
        ("", "2026-01-31T05:30", None, "from", "whole hour, as 2026-01-31T05:00:00Z is"),
        ("", "2026-01-02", "2026-01-02", "to", "later than from"),
        ("", "2026-01-02", "2026-01-01", "to", "later than from"),
    ],
)
def test_a_query_that_cannot_be_says_which_part_and_what_to_write(
    by: str, start: str | None, end: str | None, field: str, words: str
) -> None:
    with pytest.raises(BadQuery, match=words) as caught:
        usage_query(by, start, end)
    assert caught.value.field == field


def test_names_may_stand_apart_and_none_is_a_total() -> None:
    assert usage_query("tenant, model,", None, None).by == ("tenant", "model")
    assert usage_query("", None, None).by == ()


def test_a_leap_day_is_a_day() -> None:
    day = usage_query("", "2028-02-29", "2028-03-01")
    assert day.from_s is not None
    assert day.to_s is not None
    assert day.to_s - day.from_s == 86_400
