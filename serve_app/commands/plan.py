"""``headrace plan``: GPUs, replicas and dollars for a model and its traffic."""

from __future__ import annotations

from serve_app.commands import _plan_fit, _plan_replay, _plan_size
from serve_app.terminal import Subparsers, command

_EXAMPLE = """\
headrace plan fit --model ./llama-70b --gpu H200 --quantization fp8
headrace plan size --rate-per-s 40 --input-tokens 1200 --output-tokens 200 --usd-per-gpu-hour 2.5
headrace plan replay --trace trace.csv --usd-per-gpu-hour 2.5 --what-if quantization=fp8"""


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers, "plan", "GPUs, replicas and dollars for a model and its traffic.", _EXAMPLE
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for action in (_plan_fit, _plan_size, _plan_replay):
        action.add_parser(actions)
