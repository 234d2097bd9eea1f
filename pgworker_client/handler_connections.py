"""The connections that handlers ask for with ``ctx.connection()``: opened when needed, kept for the next job."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import psycopg
from psycopg.rows import tuple_row

from pgworker_client.database import NOTICE, Database
from pgworker_client.silence import unread

SyncConnection = psycopg.Connection[tuple[Any, ...]]
AsyncConnection = psycopg.AsyncConnection[tuple[Any, ...]]

#: Whatever a handler set, listened to or locked must not reach the next one: DISCARD ALL, but without DEALLOCATE ALL,
#: because psycopg remembers what it has prepared, and without DISCARD PLANS, which would only cost time.
_FORGET = (
    "close all; set session authorization default; reset all; unlisten *; "
    "select pg_advisory_unlock_all(); discard sequences; discard temp; " + NOTICE
)
#: Seconds after which a kept connection is tried before a handler gets it: it may have been lost in silence since. A
#: server that ends sessions says so, which is seen at once.
_FRESH = 1.0


class HandlerConnections:
    """Idle connections of both kinds; at most ``keep`` of each are kept.

    Nobody ever waits for one: a handler that asks while none is idle gets a new one, because two handlers that wait for
    each other's second connection would wait for ever. List operations are atomic, so threads need no lock.
    """

    def __init__(self, database: Database, keep: int) -> None:
        self._database = database
        self._keep = keep
        self._sync: list[tuple[float, SyncConnection]] = []
        self._async: list[tuple[float, AsyncConnection]] = []

    @asynccontextmanager
    async def for_coroutine(self, *, autocommit: bool = False) -> AsyncIterator[AsyncConnection]:
        """A connection for the block: committed at its end, rolled back if it raises, then kept for others."""
        conn = await self._async_connection()
        kept = False
        try:
            await conn.set_autocommit(autocommit)
            conn.row_factory = tuple_row
            yield conn
            await conn.commit()
            with suppress(psycopg.Error):  # what it was asked for is done: only the connection is lost
                await conn.set_autocommit(True)
                if not self._database.pooled:
                    await conn.execute(_FORGET)
                kept = len(self._async) < self._keep
        finally:
            if kept:
                self._async.append((time.monotonic(), conn))
            else:
                await conn.close()  # which rolls back

    @contextmanager
    def for_thread(self, *, autocommit: bool = False) -> Iterator[SyncConnection]:
        """The same for a synchronous handler in its thread."""
        conn = self._sync_connection()
        kept = False
        try:
            conn.autocommit = autocommit
            conn.row_factory = tuple_row
            yield conn
            conn.commit()
            with suppress(psycopg.Error):
                conn.autocommit = True
                if not self._database.pooled:
                    conn.execute(_FORGET)
                kept = len(self._sync) < self._keep
        finally:
            if kept:
                self._sync.append((time.monotonic(), conn))
            else:
                conn.close()

    async def close(self) -> None:
        """Close what is idle."""
        while self._sync:
            self._sync.pop()[1].close()
        while self._async:
            await self._async.pop()[1].close()

    async def _async_connection(self) -> AsyncConnection:
        while self._async:
            since, kept = self._async.pop()
            if _fresh(kept, since):
                return kept
            try:
                await kept.execute("select")
                return kept
            except psycopg.Error:
                await kept.close()
        return await self._database.connect(watched=False)

    def _sync_connection(self) -> SyncConnection:
        while self._sync:
            since, kept = self._sync.pop()
            if _fresh(kept, since):
                return kept
            try:
                kept.execute("select")
                return kept
            except psycopg.Error:
                kept.close()
        return self._database.connect_blocking()


def _fresh(conn: SyncConnection | AsyncConnection, since: float) -> bool:
    return time.monotonic() - since < _FRESH and not unread(conn)
