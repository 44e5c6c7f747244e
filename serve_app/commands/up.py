"""``headrace up``: start everything in a configuration on this machine and say how to use it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app import ray_env
from serve_app.commands._engine_news import EngineFailed, EngineNews
from serve_app.terminal import note, out

if TYPE_CHECKING:
    from serve_app.config_file import ServeFile

POLL_S = 0.5
STOP_TIMEOUT_S = 5.0


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "up",
        help="start a configuration on this machine and serve until interrupted",
        description="Start Ray and every application of FILE on this machine, wait until "
        "they can serve, print the endpoint and a first key, and serve until interrupted.",
        epilog="example: headrace up configs/local.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="a file such as configs/local.yaml")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=900,
        metavar="S",
        help="give up when it cannot serve after so many seconds (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM. Returns 0 then, 1 if it could not be started.

    Raises:
        ConfigError: the file cannot be served; nothing was started.
    """
    # Imported here, like everything heavy in a command: `headrace --help` stays quick.
    from serve_app import config_file
    from serve_app.usage_log import FOLDER_VARIABLE

    started_at_s = time.monotonic()
    say = _narrator(started_at_s)
    port = os.environ.get("HEADRACE_PORT")
    file = config_file.load(args.file)
    if port:
        file = config_file.with_port(file, config_file.parse_port(port, "HEADRACE_PORT"))
    os.environ.update(ray_env.missing(args.file.parent / ray_env.FILE_NAME, os.environ))
    os.environ.setdefault(FOLDER_VARIABLE, file.journal_folder)
    config_file.ask_ray(file)
    _prepare_models(file, say)
    secret = _first_key(file)
    stop = threading.Event()
    _stop_on_signals(stop)
    stack = _Stack(file, say)
    try:
        stack.start()
        _stop_on_signals(stop)  # again: Ray puts a handler of its own that aborts
        stack.wait_until_running(started_at_s + args.timeout_s, stop)
        if not stop.is_set():
            say("serving")
            out(_banner(file, stack.dashboard_url, secret))
        stop.wait()
        say("stopping")
        return 0
    except _NotStarted as error:
        note(f"headrace: {error}")
        return 1
    finally:
        stack.stop()


class _NotStarted(Exception):
    """An application could not be deployed; the message is for the screen."""


class _Stack:
    """A Ray instance of our own, with the file's applications on it."""

    def __init__(self, file: ServeFile, say: Callable[[str], None]) -> None:
        self._file = file
        self._say = say
        self.dashboard_url = ""
        self._logs = Path()

    def start(self) -> None:
        """Start Ray and hand Serve the applications.

        Raises:
            _NotStarted: Serve's proxy did not come up.
        """
        self._say("starting Ray")
        import ray
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        context = ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR)
        self.dashboard_url = f"http://{context.dashboard_url}"
        self._logs = Path(context.address_info["session_dir"]) / "logs"
        schema = ServeDeploySchema.model_validate(dict(self._file.document))
        self._say("starting Ray Serve")
        try:
            serve.start(
                proxy_location=schema.proxy_location, http_options=schema.http_options.model_dump()
            )
        except Exception as error:
            raise _NotStarted(f"Ray Serve's proxy did not start: {_reason(str(error))}") from error
        self._say(f"deploying {', '.join(app.name for app in schema.applications)}")
        _get_global_client().deploy_apps(schema, _blocking=False)

    def wait_until_running(self, deadline_s: float, stop: threading.Event) -> None:
        """Return when every application runs and the gateway is ready, or on ``stop``.

        Raises:
            _NotStarted: an application failed, or the deadline passed.
        """
        from ray import serve

        reported: dict[str, str] = {}
        news = EngineNews(self._logs, self._say)
        while not stop.wait(POLL_S):
            try:
                news.tell()
            except EngineFailed as error:
                raise _NotStarted(f"{error}\n  its log: {self._logs}") from error
            applications = serve.status().applications
            for name, application in applications.items():
                status = str(application.status.value)
                if reported.get(name, "DEPLOYING") != status:
                    self._say(f"{name}: {status.lower()}")
                reported[name] = status
                if status == "DEPLOY_FAILED":
                    told = [deployment.message for deployment in application.deployments.values()]
                    raise _NotStarted(f"{name} failed: {_reason(chr(10).join(told))}")
            if all(status == "RUNNING" for status in reported.values()) and self._ready():
                return
            if time.monotonic() > deadline_s:
                waiting = sorted(name for name, status in reported.items() if status != "RUNNING")
                raise _NotStarted(f"still waiting for {', '.join(waiting) or 'the gateway'}")

    def _ready(self) -> bool:
        import httpx

        try:
            return httpx.get(f"{_base_url(self._file)}/ready", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """End everything that was started, open streams included."""
        import psutil
        import ray

        # HAProxy outlives Ray: remember what runs while it can be found below this process.
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        _, alive = psutil.wait_procs(started, timeout=STOP_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _stop_on_signals(stop: threading.Event) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stop.set())


def _narrator(started_at_s: float) -> Callable[[str], None]:
    """Return a function that prints a step with the seconds since the start."""

    def say(step: str) -> None:
        note(f"[{time.monotonic() - started_at_s:6.1f} s] {step}")

    return say


def _prepare_models(file: ServeFile, say: Callable[[str], None]) -> None:
    from serve_app import models
    from serve_app.config import VllmSettings

    built_in = {model.name for model in models.BUILT_IN}
    for pool in file.pools.values():
        if isinstance(pool.engine, VllmSettings) and pool.engine.model in built_in:
            models.prepare(pool.engine.model, models.default_cache_dir(), say)


def _first_key(file: ServeFile) -> str | None:
    """Create an admin key if the store has none; return its secret, else None."""
    from serve_app.core.types import PriorityClass
    from serve_app.keys import KeyWish
    from serve_app.ledger.store import KeyStore

    if os.environ.get("HEADRACE_BOOTSTRAP_KEY"):
        return None
    store = KeyStore(file.control.database)
    try:
        if store.list():
            return None
        wish = KeyWish(name="first", admin=True, priority_ceiling=PriorityClass.CRITICAL)
        secret, _ = store.create(wish)
        return secret
    finally:
        store.close()


def _reason(message: str) -> str:
    """Return the line of Serve's message that says what went wrong, without the traces."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if "Error:" in line or line.startswith("serve_app.")]
    return (telling or lines or ["no reason given"])[-1]


def _base_url(file: ServeFile) -> str:
    """Return where a client on this machine finds the gateway."""
    host = str((file.document.get("http_options") or {}).get("host", "127.0.0.1"))
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104  # recognised here, not bound
    return f"http://{'127.0.0.1' if everywhere else host}:{file.port}"


def _banner(file: ServeFile, dashboard_url: str, secret: str | None) -> str:
    model = next(iter(file.router.aliases), "MODEL")
    base_url = _base_url(file)
    shown = secret or "$HEADRACE_API_KEY"
    lines = ["", f"  endpoint  {base_url}/v1", f"  models    {', '.join(file.router.aliases)}"]
    lines.append(f"  dashboard {dashboard_url}   (it asks for what `ray get-auth-token` prints)")
    if secret is not None:
        lines.append(f"  key       {secret}   (shown once)")
    else:
        another = f"headrace keys create --name NAME --config {file.path}"
        lines.append(f"  key       use one you have; another: {another}")
    lines += [
        "",
        f"  curl -N {base_url}/v1/chat/completions \\",
        f"    -H 'Authorization: Bearer {shown}' -H 'Content-Type: application/json' \\"
        if secret is not None
        else f"    -H \"Authorization: Bearer {shown}\" -H 'Content-Type: application/json' \\",
        f'    -d \'{{"model": "{model}", "stream": true, "temperature": 0, "messages": '
        '[{"role": "user", "content": "What is the capital of France?"}]}\'',
        "",
    ]
    return "\n".join(lines)
