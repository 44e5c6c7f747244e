"""``headrace drill``: inject a fault into a running stack and check what comes of it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from serve_app.errors import ConfigError
from serve_app.terminal import CommandFailed, Subparsers, command, note, out, out_json, table

if TYPE_CHECKING:
    from serve_app.drills.frame import Verdict
    from serve_app.drills.target import Deployment, Names, Target

Result = TypeVar("Result")

CONNECTIONS_MAX: Final = 512
_EXAMPLE: Final = """\
headrace drill --list
headrace drill engine-kill                 on the simulated stack, started for it
headrace drill --all --json
headrace drill cancel-stream --url http://127.0.0.1:8000 --model chat --i-mean-it"""

# How often a stack is asked what its engines are, twice a second.
ASKED_MAX = 20
WAKE_S: Final = 0.2


def add_parser(subparsers: Subparsers) -> None:
    """Register the command."""
    parser = command(
        subparsers,
        "drill",
        "Inject a fault into a stack, watch, check the outcome, and print a verdict.",
        _EXAMPLE,
    )
    parser.add_argument("name", nargs="*", metavar="NAME", help="which drills; --list has them")
    parser.add_argument("--all", action="store_true", help="every drill, on one stack")
    parser.add_argument("--list", action="store_true", help="say what each drill shows")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument(
        "--url", help="a stack that runs; without it the simulated one is started and ended"
    )
    parser.add_argument("--admin-key", help="admin key for --url (default: HEADRACE_ADMIN_KEY)")
    parser.add_argument(
        "--i-mean-it",
        action="store_true",
        help="do it to a stack whose engines are not simulated: users will notice",
    )
    parser.add_argument("--pool", default="sim", help="pool that is hurt (%(default)s)")
    parser.add_argument("--model", default="sim", help="a model name of it (%(default)s)")
    parser.add_argument("--tight-pool", default="tight", help="pool of one replica to fill (tight)")
    parser.add_argument("--tight-model", default="tight", help="a model name of it (tight)")
    parser.add_argument(
        "--quota-tenant",
        default="drill-quota",
        metavar="TENANT",
        help="tenant with a limit of requests per minute (%(default)s)",
    )
    parser.add_argument(
        "--root", type=int, metavar="PID", help="of --url: processes below this one may be killed"
    )
    parser.add_argument("--dashboard", metavar="URL", help="Ray's dashboard, for rollback")
    parser.add_argument("--config", type=Path, metavar="FILE", help="what runs now, for rollback")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the drills one after another. Returns 0 if all passed, 1 otherwise.

    Raises:
        ConfigError: there is no such drill, or none was named.
        CommandFailed: the stack cannot be reached or started, or is not to be hurt.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP; what was broken is put back.
    """
    from serve_app.drills.frame import DRILLS, summary

    # What a drill's own GPU watcher logs is said by its checks.
    logging.getLogger("headrace").addHandler(logging.NullHandler())
    if args.list:
        out(table(["drill", "shows"], [[name, summary(name)] for name in DRILLS]))
        return 0
    unknown = [name for name in args.name if name not in DRILLS]
    if unknown:
        raise ConfigError(f"no drill {', '.join(unknown)}; there are: {', '.join(DRILLS)}")
    names = list(DRILLS) if args.all else args.name
    if not names:
        raise ConfigError("name a drill, or give --all; --list says what each shows")
    began_s = time.monotonic()

    def say(text: str) -> None:
        # What was broken is put back although the terminal hung up.
        with suppress(OSError):
            note(f"[{time.monotonic() - began_s:6.1f} s] {text}")

    ending = _Ending()
    with ending.heeded():
        verdicts = _with_stack(args, names, say, ending)
    passed = all(each.passed for each in verdicts)
    if args.json:
        took_s = round(time.monotonic() - began_s, 1)
        found = [each.as_json() for each in verdicts]
        out_json({"passed": passed, "took_s": took_s, "drills": found})
    else:
        out(_report(verdicts))
    return 0 if passed else 1


class _Ending:
    """SIGTERM and SIGHUP end drills as Ctrl-C does: what was broken is put back.

    The first one interrupts the start of a stack, or cancels the drill that runs. Another one
    changes nothing: it comes twice where a whole group is told, and would cut the rest short.
    """

    def __init__(self) -> None:
        self._told = False
        self._stop: Callable[[], object] = _interrupt

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Have it so within; afterwards the handlers are those from before."""
        # Under nohup SIGHUP is ignored, and stays so.
        before = {
            each: signal.signal(each, self._heed)
            for each in (signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(each) is not signal.SIG_IGN
        }
        try:
            yield
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
        if self._told:
            raise KeyboardInterrupt

    async def cancels(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what ``work`` does; once it is over, what is left is ended in peace."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        self._stop = lambda: loop.call_soon_threadsafe(task.cancel)
        # A signal that comes just before the loop goes to sleep is heeded when it wakes.
        waking = asyncio.create_task(_wake_often())
        try:
            return await work
        finally:
            waking.cancel()
            self._stop = lambda: None

    def _heed(self, *_: object) -> None:
        if not self._told:
            self._told = True
            self._stop()


async def _wake_often() -> None:
    while True:  # noqa: ASYNC110  # nothing is waited for
        await asyncio.sleep(WAKE_S)


def _interrupt() -> None:
    raise KeyboardInterrupt


def _with_stack(
    args: argparse.Namespace, names: list[str], say: Callable[[str], None], ending: _Ending
) -> list[Verdict]:
    from serve_app.drills.stack import simulated_stack
    from serve_app.drills.target import Deployment

    chosen = _names(args)
    if args.url:
        key = args.admin_key or os.environ.get("HEADRACE_ADMIN_KEY")
        if not key:
            raise ConfigError("give --admin-key or set HEADRACE_ADMIN_KEY")
        if not args.url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must start with http:// or https://, not {args.url!r:.80}")
        if (args.root is not None or args.dashboard) and not args.i_mean_it:
            raise CommandFailed(
                "--root and --dashboard may belong to another stack than --url, which nobody can "
                "tell: --i-mean-it says that all of it may be hurt"
            )
        work = _perform(args, names, say, (args.url, key, args.root, None), chosen)
        return asyncio.run(ending.cancels(work))
    with simulated_stack(say) as stack:
        deployment = Deployment(stack.dashboard, stack.document, stack.environment, stack.folder)
        where = (stack.url, stack.key, stack.root, deployment)
        return asyncio.run(ending.cancels(_perform(args, names, say, where, chosen)))


async def _perform(
    args: argparse.Namespace,
    names: list[str],
    say: Callable[[str], None],
    where: tuple[str, str, int | None, Deployment | None],
    chosen: Names,
) -> list[Verdict]:
    import httpx

    from serve_app.drills.frame import DrillImpossible, Verdict, perform
    from serve_app.drills.target import Target

    url, key, root, deployment = where
    verdicts = []
    limits = httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=0)
    headers = {"authorization": f"Bearer {key}"}
    base = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(base_url=base, headers=headers, limits=limits) as client:
        deployment = deployment or _deployment(args)
        target = Target(client, chosen, root=root, deployment=deployment)
        await _may_be_hurt(target, base, meant=args.i_mean_it)
        for name in names:
            say(f"{name}: begins")
            try:
                verdict = await perform(name, target, say, time.monotonic)
            except DrillImpossible as error:
                verdict = Verdict(name, why=f"cannot be run here: {error}")
            say(f"{name}: {'PASSED' if verdict.passed else 'FAILED'} in {verdict.took_s:.1f} s")
            verdicts.append(verdict)
            _end_if_cancelled(verdict, say)
    return verdicts


def _end_if_cancelled(verdict: Verdict, say: Callable[[str], None]) -> None:
    """Raise CancelledError if a drill was cancelled, which an error of its clean-up hides."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        say(f"{verdict.drill}: {verdict.why or 'came to its end'}")
        raise asyncio.CancelledError


async def _may_be_hurt(target: Target, url: str, *, meant: bool) -> None:
    """Raise CommandFailed unless the stack is simulated or its end is meant."""
    import httpx

    try:
        for _ in range(ASKED_MAX):
            simulated = await target.simulated()
            # A stack that has just started has not told its metrics yet.
            if simulated is not None or meant:
                break
            await asyncio.sleep(0.5)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandFailed(f"cannot reach {url}: {error}; is it running?") from error
    if not simulated and not meant:
        raise CommandFailed(
            f"the engines of {url} are not simulated: a drill kills processes and turns away "
            "users there; --i-mean-it does it"
        )


def _names(args: argparse.Namespace) -> Names:
    from serve_app.drills.target import Names

    return Names(args.pool, args.model, args.tight_pool, args.tight_model, args.quota_tenant)


def _deployment(args: argparse.Namespace) -> Deployment | None:
    import yaml

    from serve_app.drills.target import Deployment

    if not args.dashboard or not args.config:
        return None
    try:
        document = yaml.safe_load(args.config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{args.config}: {error}") from error
    return Deployment(args.dashboard, document, dict(os.environ), Path.cwd())


def _report(verdicts: list[Verdict]) -> str:
    rows = []
    for each in verdicts:
        failed = [check.what for check in each.checks if not check.passed]
        why = "; ".join([*failed, *([each.why] if each.why else [])])
        figures = ", ".join(f"{name} {value}" for name, value in each.figures.items())
        result = "passed" if each.passed else "FAILED"
        rows.append([each.drill, result, f"{each.took_s:.1f}", why or figures])
    return table(["drill", "verdict", "s", "figures, or what was wrong"], rows)
