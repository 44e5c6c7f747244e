"""A user must be told why an engine did not start, not that it did not."""

import subprocess
import sys
from pathlib import Path

from serve_app.engine.vllm_output import LONGEST_CAUSE_CHARACTERS, root_cause

WORKER = "(Worker pid=24215) ERROR 11-21 15:19:03 [multiproc_executor.py:953] "
CORE = "(EngineCore pid=24206) ERROR 11-21 15:19:03 [core.py:1510] "
FAILED = f"""\
(Worker pid=24215) INFO 11-21 15:19:02 [loader.py:1] ImportError: is not what stopped us
{WORKER}WorkerProc failed to start.
{WORKER}Traceback (most recent call last):
{WORKER}    raise SafetensorError("incomplete metadata")
{WORKER}safetensors._safetensors_rust.SafetensorError: incomplete metadata: file not covered
{CORE}EngineCore failed to start.
{CORE}Exception: WorkerProc initialization failed due to an exception in a background process.
"""


def test_the_cause_is_the_innermost_error() -> None:
    assert root_cause(FAILED) == "SafetensorError: incomplete metadata: file not covered"


def test_an_error_about_another_process_is_no_cause() -> None:
    assert root_cause(FAILED[FAILED.index(CORE) :]) is None
    assert root_cause("") is None


def test_a_long_cause_is_cut() -> None:
    cause = root_cause(f"{CORE}ValueError: {'x' * 5000}\n")
    assert cause is not None
    assert len(cause) == LONGEST_CAUSE_CHARACTERS


SCRIPT = """
import subprocess, sys
from serve_app.engine.vllm_output import OwnOutput
output = OwnOutput()
subprocess.run([sys.executable, "-c", "print('from a child')"])
print("on stderr", file=sys.stderr, flush=True)
read = output.read()
assert ("from a child" in read and "on stderr" in read) == (sys.argv[1] == "file"), read
assert "earlier" not in read
"""


def _run(output: str, stdout: object, stderr: object) -> int:
    command = [sys.executable, "-c", SCRIPT, output]
    root = Path(__file__).resolve().parents[3]
    return subprocess.run(command, stdout=stdout, stderr=stderr, cwd=root, check=False).returncode  # type: ignore[call-overload,no-any-return]


def test_what_children_print_is_read_back_from_where_it_began(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("earlier\n")
    with (tmp_path / "out").open("a") as out, (tmp_path / "err").open("a") as err:
        assert _run("file", out, err) == 0


def test_a_terminal_or_pipe_is_not_read_back() -> None:
    assert _run("pipe", subprocess.PIPE, subprocess.PIPE) == 0
