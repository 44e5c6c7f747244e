"""The engine forked from a fork server must be as if the replica had started it."""

import os
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest

from serve_app.engine import vllm_fork


def _report(pipe: Connection) -> None:
    pipe.send({name: value for name, value in os.environ.items() if name.startswith("FORKED_")})


def _environment_of_a_process() -> object:
    context = vllm_fork._Context()
    ours, theirs = context._context.Pipe()
    process = context.Process(target=_report, name="engine", kwargs={"pipe": theirs})
    process.start()
    try:
        assert ours.poll(120)
        return ours.recv()
    finally:
        process.join(120)


def test_the_engine_has_the_environment_of_the_moment_it_is_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORKED_BEFORE", "1")
    assert _environment_of_a_process() == {"FORKED_BEFORE": "1"}
    # The fork server runs by now, with the environment it was started in.
    monkeypatch.delenv("FORKED_BEFORE")
    monkeypatch.setenv("FORKED_AFTER", "2")
    assert _environment_of_a_process() == {"FORKED_AFTER": "2"}


def test_vllm_is_given_its_own_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    vllms_own = object()
    utils = SimpleNamespace(get_mp_context=vllms_own)
    for name, module in {
        "vllm": SimpleNamespace(),
        "vllm.v1": SimpleNamespace(),
        "vllm.v1.engine": SimpleNamespace(utils=utils),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    with vllm_fork.engine_from_fork_server():
        assert utils.get_mp_context is vllm_fork._Context
    assert utils.get_mp_context is vllms_own
