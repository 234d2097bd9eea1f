"""Peers that fall silent: a statement that gets no answer is not waited for unless the server is at work on it.

A peer that vanished is noticed by the kernel (keepalives, TCP_USER_TIMEOUT), but not one behind a proxy or a firewall
that goes on acknowledging what it does not pass on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import selectors
import socket
import time
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus

from pgworker_client.errors import one_line
from pgworker_client.logs import Log

#: Seconds between two looks at what waits. What waited at two looks for the same answer is asked about.
TICK = 10.0
#: Seconds that this question may take.
_QUESTION = 10.0
#: Behind a pooler the server's sessions cannot be told apart: the worker's own statements get so many seconds there,
#: those of handlers, which may be meant to be long, any number.
_POOLED = 40.0

#: Which of the sessions that we wait for have been at work in the last `TICK` seconds. Sessions whose connection we
#: have lost are ended, if the server has not noticed: what they have locked would stay so. After a failover such a
#: number may be somebody else's: hence the name.
_AT_WORK = """
select a.pid
from pg_catalog.pg_stat_activity a
where a.pid = any (%(waiting)s::int[])
  and (a.state not like 'idle%%' or a.state_change > pg_catalog.clock_timestamp() - %(tick)s * interval '1 second')
union all
select a.pid
from pg_catalog.pg_stat_activity a
where case when a.pid = any (%(lost)s::int[])
             and a.application_name = pg_catalog.current_setting('application_name')
           then not pg_catalog.pg_terminate_backend(a.pid) else false end
"""


class WatchedConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that tells whether it waits for the server, and how often it began to; ``pid`` is its session."""

    waits = 0
    waiting = False
    pid = 0

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's."""
        self.waits += 1
        self.waiting = True
        try:
            return super().wait(*args, **kwargs)
        finally:
            self.waiting = False


class WatchedAsyncConnection(psycopg.AsyncConnection[tuple[Any, ...]]):
    """The same for coroutines."""

    waits = 0
    waiting = False
    pid = 0

    async def wait(self, *args: Any, **kwargs: Any) -> Any:
        """As psycopg's."""
        self.waits += 1
        self.waiting = True
        try:
            return await super().wait(*args, **kwargs)
        finally:
            self.waiting = False


Watched = WatchedConnection | WatchedAsyncConnection


class Silence:
    """Looks at a worker's connections every `TICK` seconds, and cuts off those that wait for nothing."""

    def __init__(self, conninfo: str, log: Log, *, pooled: bool) -> None:
        self._conninfo = conninfo
        self._log = log
        self._pooled = pooled
        self._watched: dict[int, Watched] = {}
        self._lost: set[int] = set()

    def watch(self, conn: Watched) -> None:
        """From now on, until it is closed. May be called from any thread."""
        self._watched[id(conn)] = conn

    async def run(self) -> None:
        """Look, for ever."""
        before: dict[int, tuple[int, float]] = {}
        while True:
            await asyncio.sleep(TICK)
            now: dict[int, tuple[int, float]] = {}
            silent: list[Watched] = []
            for key, conn in list(self._watched.items()):
                if conn.closed:
                    del self._watched[key]
                    if conn.broken and not self._pooled:
                        self._lost.add(conn.pid)
                elif _waiting(conn):
                    waits, since = before.get(key, (-1, 0.0))
                    if waits == conn.waits:
                        silent.append(conn)
                    else:
                        since = time.monotonic()
                    now[key] = (conn.waits, since)
            before = now
            if self._pooled:
                late = time.monotonic() - _POOLED
                self._cut([conn for conn in silent if now[id(conn)][1] <= late], now)
            elif silent or self._lost:
                at_work = await self._at_work([conn.pid for conn in silent])
                self._cut([conn for conn in silent if conn.pid not in at_work], now)

    async def _at_work(self, pids: list[int]) -> set[int]:
        """Those of these sessions that are at work on something, asked on a connection of its own.

        None is if there is no answer; all are if somebody answers but does not let us ask.
        """
        loop = asyncio.get_running_loop()
        lost = self._lost - {conn.pid for conn in list(self._watched.values())}
        unanswered = False

        def give_up(conn: psycopg.AsyncConnection[Any]) -> None:
            nonlocal unanswered
            unanswered = True
            cut(conn)

        try:
            async with await psycopg.AsyncConnection.connect(self._conninfo, autocommit=True) as conn:
                enough = loop.call_later(_QUESTION, give_up, conn)
                try:
                    cur = await conn.execute(_AT_WORK, {"waiting": pids, "lost": [*lost], "tick": TICK}, prepare=False)
                    found = {pid for (pid,) in await cur.fetchall()}
                finally:
                    enough.cancel()
        except (psycopg.Error, OSError) as exc:
            self._log.debug("cannot ask the server what it is doing: %s", one_line(exc))
            return set() if unanswered or isinstance(exc, psycopg.errors.ConnectionTimeout) else set(pids)
        self._lost.clear()
        return found

    def _cut(self, conns: list[Watched], seen: dict[int, tuple[int, float]]) -> None:
        for conn in conns:
            if _waiting(conn) and conn.waits == seen[id(conn)][0]:  # still
                self._log.info("a statement got no answer, and the server is not at work on it: connection cut off")
                cut(conn)


def _waiting(conn: Watched) -> bool:
    return conn.waiting and conn.pgconn.transaction_status == TransactionStatus.ACTIVE and not unread(conn)


def unread(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> bool:
    """Whether something has come that nobody has read yet: for lack of processor time perhaps, or a farewell."""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(conn.fileno(), selectors.EVENT_READ)
            return bool(selector.select(0))
    except (OSError, ValueError, psycopg.Error):  # closed meanwhile
        return True


def cut(conn: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Make whoever waits on this connection get an error at once."""
    with (
        contextlib.suppress(OSError, psycopg.Error),  # closed meanwhile
        socket.socket(fileno=os.dup(conn.fileno())) as its,
    ):
        its.shutdown(socket.SHUT_RDWR)
