"""What the connections of a worker have in common: how they are made, who tells of trouble, who looks after them."""

from __future__ import annotations

import threading
import time
from typing import Any

import psycopg

from pgworker_client.errors import one_line
from pgworker_client.logs import Log
from pgworker_client.silence import Silence, WatchedAsyncConnection, WatchedConnection

#: What a connection is that was there and is no more.
LOST = "lost"
#: For each session: the server notices within half a minute, too, that a worker's host is gone. Till then the worker is
#: present, and what it has locked stays locked; by the kernel's defaults for two hours. Returns the session's number,
#: because what libpq knows may be a pooler's invention.
NOTICE = """
select pg_catalog.pg_backend_pid(), pg_catalog.set_config('tcp_keepalives_idle', '10', false),
       pg_catalog.set_config('tcp_keepalives_interval', '5', false),
       pg_catalog.set_config('tcp_keepalives_count', '3', false),
       pg_catalog.set_config('tcp_user_timeout', '20000', false)
"""


class Database:
    """The database of one worker, as its connections see it; they may be used in several threads and event loops.

    Trouble with it is told once, however many connections notice it and however often, and so is its end.
    """

    def __init__(self, conninfo: str, log: Log, *, pooled: bool) -> None:
        #: Whether a transaction pooler may stand between: the next statement may meet another server session.
        self.pooled = pooled
        #: How often there has been trouble.
        self.troubles = 0
        self._conninfo = conninfo
        self._log = log
        self._lock = threading.Lock()
        self._in_trouble: set[str] = set()
        self._since = 0.0
        self._silence = Silence(conninfo, log, pooled=pooled)

    async def connect(self, *, watched: bool = True) -> psycopg.AsyncConnection[tuple[Any, ...]]:
        """A new connection, in autocommit.

        ``watched``: also behind a pooler, where a long statement cannot be told from silence.
        """
        conn = await WatchedAsyncConnection.connect(self._conninfo, autocommit=True)
        if watched or not self.pooled:
            self._silence.watch(conn)
        if self.pooled:
            conn.prepare_threshold = None
            return conn
        try:
            row = await (await conn.execute(NOTICE, prepare=False)).fetchone()
        except BaseException:
            await conn.close()
            raise
        conn.pid = row[0] if row else 0
        return conn

    def connect_blocking(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A new connection for a thread, in autocommit, not watched behind a pooler."""
        conn = WatchedConnection.connect(self._conninfo, autocommit=True)
        if self.pooled:
            conn.prepare_threshold = None
            return conn
        self._silence.watch(conn)
        try:
            row = conn.execute(NOTICE, prepare=False).fetchone()
        except BaseException:
            conn.close()
            raise
        conn.pid = row[0] if row else 0
        return conn

    async def look_after(self) -> None:
        """Cut off connections whose peer has fallen silent, for ever."""
        await self._silence.run()

    def trouble(self, part: str, what: str, exc: Exception, *, worked: int) -> None:
        """A part of the worker has trouble with its connection.

        ``worked`` is what `troubles` was when it worked last. A connection that is found to be lost, but has not been
        used since the trouble before began, was lost then: that has been told.
        """
        with self._lock:
            before = not self._in_trouble and what == LOST and worked < self.troubles
            new = not self._in_trouble and not before
            if new:
                self.troubles += 1
                self._since = time.monotonic()
            if not before:
                self._in_trouble.add(part)
        say = self._log.warning if new else self._log.debug
        say("%s connection %s: %s; trying again", part, what, one_line(exc))

    def works(self, part: str) -> None:
        """That part has no trouble any more."""
        with self._lock:
            was = bool(self._in_trouble)
            self._in_trouble.discard(part)
            over = was and not self._in_trouble
        self._log.debug("%s connection works again", part)
        if over:
            self._log.warning("the database works again, after %.1f s", time.monotonic() - self._since)
