"""`make audit`: never green for what was not looked at."""

from __future__ import annotations

import datetime
import socket
from pathlib import Path

import pytest

from scripts import audit

TODAY = datetime.date(2026, 5, 1)


def test_every_lock_is_looked_at() -> None:
    names = {lock.name for lock in audit.locks()}
    assert {"cpu.lock", "gpu.lock", "bootstrap.lock"} <= names
    assert names == {path.name for path in audit.REQUIREMENTS.iterdir() if path.suffix == ".lock"}


def test_what_stands_in_a_lock_is_what_is_asked_about() -> None:
    words = audit.command(Path("pip-audit"), Path("x.lock"), ["GHSA-1"])
    assert {"--disable-pip", "--require-hashes"} <= set(words), "nothing is resolved anew"
    assert words[-2:] == ["--ignore-vuln", "GHSA-1"]


def test_what_is_accepted_is_accepted_until_a_day_and_for_a_reason() -> None:
    lines = ["# why", "", "GHSA-1 2026-05-01 not reachable: no YAML of strangers is read"]
    assert audit.read_accepted(lines, TODAY) == ["GHSA-1"]
    for line in ("GHSA-1 2026-04-30 too long ago", "GHSA-1 2026-06-01", "GHSA-1 soon for ever"):
        with pytest.raises(audit.NotChecked):
            audit.read_accepted([line], TODAY)


def test_without_the_database_it_says_that_nothing_was_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_: object, **__: object) -> socket.socket:
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", away)
    assert audit.main() == 2
    assert "nothing was checked: api.osv.dev cannot be reached" in capsys.readouterr().err


def test_the_file_of_what_is_accepted_can_be_read() -> None:
    lines = audit.ACCEPTED.read_text().splitlines()
    assert audit.read_accepted(lines, datetime.date(2000, 1, 1)) == []
