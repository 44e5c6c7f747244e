"""An engine process must not outlive its replica: it would hold the GPU, out of reach."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PARENT = """
import multiprocessing, sys, time
from serve_app.engine.vllm_lifeline import end_with_parent

def live(pipe):
    end_with_parent()
    pipe.send("attached")
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    ours, theirs = context.Pipe()
    child = context.Process(target=live, args=(theirs,))
    child.start()
    ours.recv()
    print(child.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_killing_the_parent_outright_ends_the_child(tmp_path: Path, method: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    parent = subprocess.Popen(
        [sys.executable, str(script), method], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    ended, _, _ = select.select([child], [], [], 120)
    os.close(child)
    assert ended
