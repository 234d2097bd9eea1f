"""A real pgbouncer in front of a test server."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg.conninfo import make_conninfo

from pgworker_client.embedded import EmbeddedServer
from tests.waiting import until

PROGRAM = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")


class Bouncer:
    """pgbouncer in transaction mode on a Unix socket of its own, from the start of a ``with`` block to its end.

    Args:
        server: where the databases are.
        pool_size: how many server sessions all clients of a database share.
        user: whose sessions these are.
    """

    def __init__(self, server: EmbeddedServer, pool_size: int, user: str = "postgres") -> None:
        assert PROGRAM is not None
        self._owner = os.stat(server.host)  # pgbouncer refuses to be root, and the server's socket is its owner's only
        self._directory = Path(tempfile.mkdtemp(prefix="pgbouncer-", dir="/tmp"))
        self._log = self._directory / "log"
        config = self._directory / "pgbouncer.ini"
        config.write_text(
            f"""
[databases]
* = host={server.host} port={server.port} user={user}
[pgbouncer]
listen_addr =
listen_port = 6432
unix_socket_dir = {self._directory}
auth_type = any
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 100
server_login_retry = 0.1
logfile = {self._log}
"""
        )
        for path in (self._directory, config):
            os.chown(path, self._owner.st_uid, self._owner.st_gid)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def dsn(self, dbname: str) -> str:
        """Return a connection string for a client that is to go through the pooler."""
        return make_conninfo(host=str(self._directory), port=6432, user="postgres", dbname=dbname)

    def connect(self, dbname: str) -> psycopg.Connection[Any]:
        """Return an autocommit connection that prepares nothing, as is right for a transaction pooler."""
        return psycopg.connect(self.dsn(dbname), autocommit=True, prepare_threshold=None)

    def start(self) -> None:
        """Start it, and return when it answers."""
        identity: dict[str, Any] = {}
        if os.geteuid() == 0:
            identity = {"user": self._owner.st_uid, "group": self._owner.st_gid, "extra_groups": []}
        for left in self._directory.glob(".s.PGSQL.*"):
            left.unlink()
        self._process = subprocess.Popen(
            [str(PROGRAM), "-q", str(self._directory / "pgbouncer.ini")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self._directory,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            **identity,
        )
        until(self._answers, f"pgbouncer, which said {self._said()!r}")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._said()
        try:
            psycopg.connect(self.dsn("postgres"), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""

    def kill(self) -> None:
        """End it with SIGKILL: all its clients lose their connections."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
