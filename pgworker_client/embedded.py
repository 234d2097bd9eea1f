"""A throwaway PostgreSQL server: for the demo, for tests, for benchmarks. Nothing of it outlives the process.

It listens on a Unix socket in its own directory only, trusts everybody who can reach that (nobody but the own user and
root), has ``CREATE EXTENSION pgworker`` at hand without touching the system's directories, and runs as an unprivileged
user when the caller is root, as PostgreSQL refuses to run as root. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypedDict

import psycopg
from psycopg.conninfo import make_conninfo

from pgworker_client import schema
from pgworker_client.installations import Installation, find_installation
from pgworker_client.throwaway import ThrowawayDirectory, places

StopMode = Literal["smart", "fast", "immediate"]

_SIGNALS: Mapping[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
# What is committed outlives a crash of the server all the same; only the machine must not crash.
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}
_PR_SET_PDEATHSIG = 1


class _Identity(TypedDict, total=False):
    """Keywords of `subprocess.Popen` that make a child leave root."""

    user: int
    group: int
    extra_groups: list[int]


class EmbeddedServer:
    """One server, running from the start of a ``with`` block (or `start`) to its end (or `close`).

    Start it in the main thread, or in one that lives as long as the server should: on Linux the kernel ends the server
    with the thread that started it, which is how it dies with a process that was killed.

    Args:
        installation: whose programs to run; default `find_installation` ``("best")``.
        settings: further server settings, name to value.
        durable: False keeps the data in memory where there is room and never waits for a disk; True is a server as in
            production (fsync, data in ``/var/tmp``), for measuring.

    Attributes:
        host: the directory of the socket.
        port: its number there.
        user: the superuser's name.
        log: the path of the server's log.
        has_extension: whether ``CREATE EXTENSION pgworker`` works; where it does not, `schema.install_by_hand` does.
    """

    port = 5432
    user = "postgres"

    def __init__(
        self,
        installation: Installation | None = None,
        *,
        settings: Mapping[str, str] | None = None,
        durable: bool = False,
    ) -> None:
        self.installation = installation or find_installation()
        self._identity = _unprivileged()
        self._throwaway = ThrowawayDirectory(places(on_disk=durable))
        self._copy: ThrowawayDirectory | None = None
        self.directory = self._throwaway.path
        self.host = str(self.directory)
        self.log = self.directory / "log"
        self.has_extension = False
        self._process: subprocess.Popen[bytes] | None = None
        self._settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.host,
            **({} if durable else _NOT_DURABLE),
        }
        try:
            self._bindir = self._reachable_bindir()
            self._offer_extension()
            self._settings.update(settings or {})
            self._give_away()
            self._make_data()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        """Start the server."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server and remove everything."""
        self.close()

    def dsn(self, dbname: str = "postgres", user: str | None = None) -> str:
        """Return a connection string."""
        return make_conninfo(host=self.host, port=self.port, user=user or self.user, dbname=dbname)

    @property
    def running(self) -> bool:
        """Whether the server process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 60) -> None:
        """Start the server and return when it answers.

        Raises RuntimeError, with the end of the log, when it ends or does not answer within ``timeout`` seconds.
        """
        if self.running:
            return
        if sys.platform == "linux" and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("start the server in the main thread: it ends with the thread that started it")
        parent = os.getpid()
        command = [str(self._bindir / "postgres"), "-D", "data", *(f"-c{k}={v}" for k, v in self._settings.items())]
        with self.log.open("ab") as log:
            # A session of its own keeps the terminal's Ctrl-C away: it is this process that stops the server, last.
            process = self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=self._environment(),
                start_new_session=True,
                preexec_fn=lambda: _die_with(parent),
                **self._identity,
            )
        deadline = time.monotonic() + timeout
        while True:
            try:
                psycopg.connect(self.dsn(), connect_timeout=10).close()
                return
            except psycopg.OperationalError as refused:
                if process.poll() is not None or time.monotonic() > deadline:
                    self.stop("immediate")
                    tail = self.log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"PostgreSQL did not start ({refused}); its log ends with:\n{tail}") from refused
            time.sleep(0.02)

    def stop(self, mode: StopMode = "fast", timeout: float = 60) -> None:
        """Stop the server and wait until it has ended; nothing happens to one that is not running.

        Args:
            mode: PostgreSQL's: ``smart`` waits for clients to leave, ``fast`` rolls them back, ``immediate`` crashes.
            timeout: seconds to wait before the process is killed.
        """
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(_SIGNALS[mode])
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process = None

    def restart(self, mode: StopMode = "immediate") -> None:
        """Stop the server, by default as a crash would, and start it again on the same data."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """Stop the server and remove its directories. May be called again."""
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):  # killed by then
                self.stop("immediate", 20)
        finally:
            self._throwaway.close()
            if self._copy is not None:
                self._copy.close()

    def _make_data(self) -> None:
        """Make the data directory."""
        self._run("initdb", "-D", "data", "-U", self.user, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")

    def _environment(self) -> dict[str, str]:
        """Return this process's environment without what would lead the server or its tools elsewhere."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_"))}
        return {**kept, "LC_ALL": "C", "HOME": self.host}

    def _run(self, program: str, *arguments: str) -> None:
        """Run one of the server's programs as the server's user."""
        done = subprocess.run(
            [self._bindir / program, *arguments],
            cwd=self.directory,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **self._identity,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed with status {done.returncode}:\n{done.stdout}")

    def _reachable_bindir(self) -> Path:
        """Return programs that the server's user may run: a copy where they lie in a directory closed to it."""
        try:
            subprocess.run(
                [self.installation.bindir / "postgres", "--version"],
                check=True,
                capture_output=True,
                cwd="/",
                **self._identity,
            )
        except PermissionError as refused:
            if self.installation.movable_root is None:
                raise RuntimeError(
                    f"{self.installation.bindir} cannot be run without being root ({refused}): open it to other "
                    "users, or name another PostgreSQL with PG_CONFIG"
                ) from refused
            return self._copied_bindir(self.installation.movable_root)
        if not self.installation.keeps_extensions_apart and self.installation.movable_root is not None:
            return self._copied_bindir(self.installation.movable_root)
        return self.installation.bindir

    def _copied_bindir(self, root: Path) -> Path:
        """Copy a whole installation (40 MB) and return the copy's bin directory."""
        # Not where the data is: memory file systems are often mounted without the right to execute.
        self._copy = ThrowawayDirectory([Path("/tmp")])
        to = self._copy.path
        to.chmod(0o755)
        if self.installation.wheel is None:
            shutil.copytree(root, to / "pg", symlinks=True)
            return to / "pg" / self.installation.bindir.relative_to(root)
        package = root.name
        for name in (package, f"{package}.libs"):
            if (root.parent / name).is_dir():
                shutil.copytree(root.parent / name, to / name, symlinks=True)
        return to / self.installation.bindir.relative_to(root.parent)

    def _offer_extension(self) -> None:
        """Put the extension's two files where the server looks for them."""
        major = self.installation.major
        if major >= 18:
            place = self.directory / "share/extension"
            self._settings["extension_control_path"] = f"$system:{self.directory}/share"
        elif self.installation.debian:
            place = self.directory / f"usr/share/postgresql/{major}/extension"
            self._settings["extension_destdir"] = self.host
        else:
            controls = list(self._copy.path.rglob("extension/plpgsql.control")) if self._copy else []
            if not controls:
                return
            place = controls[0].parent
        place.mkdir(parents=True, exist_ok=True)
        (place / "pgworker.control").write_text(schema.control(), encoding="utf-8")
        (place / f"pgworker--{schema.version()}.sql").write_text(schema.script(), encoding="utf-8")
        self.has_extension = True

    def _give_away(self) -> None:
        """Make the server's user the owner of the directory; it stays closed to all others but root."""
        if self._identity:
            for path in (self.directory, *self.directory.rglob("*")):
                os.chown(path, self._identity["user"], self._identity["group"])


def _unprivileged() -> _Identity:
    """Return who the server is to run as: nobody special unless this process is root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):  # initdb needs a user that has an entry in passwd
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError(
        "PostgreSQL refuses to run as root, and neither user postgres nor nobody exists: make one of them"
    )


def _die_with(parent: int) -> None:
    """In the new process, after it left root: have the kernel end it (immediate shutdown) when the parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)
        if os.getppid() != parent:  # it ended before that took effect
            os._exit(1)
