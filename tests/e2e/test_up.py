"""`headrace up` as its user sees it end."""

from __future__ import annotations

import signal

from tests.stack import ROOT, running_stack


def test_a_signal_ends_it_quietly_though_a_stream_is_open() -> None:
    with running_stack(ROOT / "configs" / "sim.yaml") as stack:
        chunks = iter(
            stack.openai().chat.completions.create(
                model="sim",
                messages=[{"role": "user", "content": "a long story"}],
                max_tokens=50_000,
                stream=True,
            )
        )
        next(chunks)
        [up] = [each for each in stack.processes("serve_app.cli", "up") if each.name() != "bash"]

        up.send_signal(signal.SIGTERM)

        # Ray's own handler would print a trace and abort.
        assert stack.root.wait(timeout=60) == 0
        assert stack.output().rstrip().endswith("stopping"), stack.output()
