"""Connections: where to connect, and links that come back by themselves when they are lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row

from pgworker_client.database import LOST, Database
from pgworker_client.errors import LOCKED, LinkDown, is_passing, keeps_connection, one_line

#: Given to libpq unless the connection string says otherwise: a peer that vanished without a word is noticed within
#: half a minute rather than after the two hours of the kernel's defaults.
_DEFAULTS = {
    "connect_timeout": "10",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
#: The environment variables by which libpq takes the same settings; who set one of them meant it.
_ENVIRONMENT = {"connect_timeout": "PGCONNECT_TIMEOUT", "application_name": "PGAPPNAME"}

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0


def connection_string(dsn: str | None = None, *, name: str | None = None) -> str:
    """``dsn``, else DATABASE_URL, else nothing, which leaves it to libpq's PG* variables.

    With ``name`` the string is made fit for a worker: it gets that application name, the client encoding UTF8 and
    timeouts for dead peers, where it does not set them itself. ValueError for what libpq cannot read.
    """
    given = dsn if dsn is not None else os.environ.get("DATABASE_URL", "")
    source = "dsn" if dsn is not None else "DATABASE_URL"
    try:
        known = conninfo_to_dict(given)
    except psycopg.ProgrammingError:  # libpq repeats the text, passwords and all: say it without
        raise ValueError(
            f"{source} is not a connection string: write postgresql://user@host:5432/dbname or host=… dbname=…"
        ) from None
    if name is None:
        return given
    added = {**_DEFAULTS, "application_name": name[:63]}
    for key in list(added):
        if key in known or os.environ.get(_ENVIRONMENT.get(key, "")):
            del added[key]
    return make_conninfo(given, **added, client_encoding="UTF8")


def _may_come_back(exc: psycopg.Error) -> bool:
    """Whether connecting may succeed later; refused passwords and missing databases do while somebody repairs them."""
    return is_passing(exc) or (exc.sqlstate or "").startswith(("28", "3D"))


class Link:
    """One connection of a worker, in autocommit, made anew when it is lost.

    ``setup`` runs on every new connection before it is used.
    """

    def __init__(
        self,
        part: str,
        database: Database,
        *,
        setup: Callable[[psycopg.AsyncConnection[Any]], Awaitable[None]] | None = None,
    ) -> None:
        self.part = part
        self._database = database
        self._setup = setup
        self._conn: psycopg.AsyncConnection[Any] | None = None
        self._failures = 0
        self._worked = 0
        self._connecting = asyncio.Lock()
        self._stopping = asyncio.Event()

    async def connect(self) -> None:
        """Connect for the first time; psycopg's error as it is when that fails.

        A connection that was there and breaks while it is set up is like any other that is lost: it is made anew. One
        to a standby, or to a server that is read-only, is too.
        """
        try:
            self._conn = await self._open()
        except LinkDown as down:
            self._note(LOST if down.unknown else "cannot be made", down)
            await self.connection()

    def stop_trying(self) -> None:
        """From now on a connection that is lost stays lost; what waits for it gets LinkDown."""
        self._stopping.set()

    async def connection(self) -> psycopg.AsyncConnection[Any]:
        """The live connection. Where there is none, one is made, waiting longer after each failure, for ever."""
        while self._conn is None or self._conn.closed:
            if self._stopping.is_set():
                raise LinkDown("not connected", unknown=False)
            async with self._connecting:
                if self._conn is not None and not self._conn.closed:
                    break
                await self._pause()
                if self._stopping.is_set():
                    continue
                try:
                    self._conn = await self._open()
                except (psycopg.Error, OSError, LinkDown) as exc:
                    if isinstance(exc, psycopg.Error) and not _may_come_back(exc):
                        raise
                    self._note("cannot be made", exc)
        return self._conn

    async def fetch(
        self,
        query: str,
        params: Sequence[Any] = (),
        *,
        prepare: bool = True,
        binary: bool = False,
        hasty: bool = False,
    ) -> list[tuple[Any, ...]]:
        """The rows of one statement. LinkDown for what passes; psycopg's error for what repetition will not cure.

        ``hasty``: also psycopg's error when somebody else has locked a row, which is no trouble with the connection.
        """
        conn = await self.connection()
        try:
            cur = psycopg.AsyncCursor(conn, row_factory=tuple_row)
            await cur.execute(query, params, prepare=prepare and not self._database.pooled, binary=binary)
            rows = await cur.fetchall()
        except psycopg.Error as exc:
            if hasty and exc.sqlstate == LOCKED:
                raise
            raise await self.judge(conn, exc) from exc
        self.works()
        return rows

    @contextlib.contextmanager
    def hearing(self, heard: Callable[[], None]) -> Iterator[None]:
        """Inside the block, in which nothing else uses the link, ``heard`` is called when the server says something.

        That is a notification, or that the connection has ended: the next statement finds out.
        """
        conn = self._conn
        if conn is None or conn.closed:
            yield
            return
        loop, fd = asyncio.get_running_loop(), conn.fileno()

        def readable() -> None:
            with contextlib.suppress(psycopg.Error):
                conn.pgconn.consume_input()
                while conn.pgconn.notifies() is not None:
                    pass
            heard()

        if conn.pgconn.notifies() is not None:  # came with the answer to the last statement
            readable()
        loop.add_reader(fd, readable)
        try:
            yield
        finally:
            loop.remove_reader(fd)

    async def judge(self, conn: psycopg.AsyncConnection[Any], exc: psycopg.Error) -> Exception:
        """What to raise for an error of this link's connection: LinkDown for what passes, else the error itself."""
        lost = conn.closed or conn.broken
        if not lost and not is_passing(exc):
            return exc
        if not lost and keeps_connection(exc):
            self._note("works, but its statement failed", exc)
            await self._pause()
            return LinkDown(one_line(exc), unknown=False)
        if self._conn is conn:
            self._conn = None
        self._note(LOST, exc)
        await conn.close()
        return LinkDown(one_line(exc), unknown=lost)

    def works(self) -> None:
        """Note that a statement succeeded: only then does a link that was lost work again."""
        self._worked = self._database.troubles
        if self._failures:
            self._failures = 0
            self._database.works(self.part)

    async def close(self) -> None:
        """Close the connection, if there is one."""
        if self._conn is not None:
            await self._conn.close()

    async def _open(self) -> psycopg.AsyncConnection[Any]:
        conn = await self._database.connect()
        try:
            await _refuse_read_only(conn)
            if self._setup is not None:
                await self._setup(conn)
        except BaseException as exc:
            broke = conn.closed
            await conn.close()
            if broke and isinstance(exc, psycopg.Error):
                raise LinkDown(one_line(exc), unknown=True) from exc
            raise
        return conn

    async def _pause(self) -> None:
        if self._failures:
            longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(self._failures - 1, 10))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(longest * random.uniform(0.5, 1.0)):
                    await self._stopping.wait()

    def _note(self, what: str, exc: Exception) -> None:
        self._failures += 1
        self._database.trouble(self.part, what, exc, worked=self._worked)


async def _refuse_read_only(conn: psycopg.AsyncConnection[Any]) -> None:
    """LinkDown where nothing can be written: presence shown to a standby is seen by nobody, nothing can be claimed."""
    cur = await conn.execute(
        "select pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only')", prepare=False
    )
    standby, read_only = await cur.fetchone() or (False, "off")
    if standby or read_only == "on":
        what = "is a standby" if standby else "is read-only"
        raise LinkDown(f"the server {what}, and cannot be written to", unknown=False)
