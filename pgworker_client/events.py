"""Events: what the database tells of every job, whoever runs it, while `pgworker.publish_events` is on."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Literal, Self

import psycopg

from pgworker_client.connection import Link, connection_string
from pgworker_client.database import Database
from pgworker_client.errors import LinkDown
from pgworker_client.logs import LOGGER, Log

JobState = Literal["waiting", "scheduled", "ready", "running", "completed", "failed", "cancelled"]


@dataclasses.dataclass(frozen=True, slots=True)
class StateChange:
    """A job was in one state and is in another: ``before`` is None if it was added, ``after`` if it was removed."""

    id: int
    task: str
    before: JobState | None
    after: JobState | None


class Subscription(AsyncIterator[StateChange]):
    """The changes from when the block is entered (or else the first one is awaited), in the order of their commits."""

    def __init__(self, link: Link, on_gap: Callable[[], Awaitable[None] | None] | None, heard: deque[str]) -> None:
        self._link = link
        self._on_gap = on_gap
        self._heard = heard
        self._conn: psycopg.AsyncConnection[Any] | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        await self._link.connect()
        self._conn = await self._link.connection()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, frames: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._link.stop_trying()
        await self._link.close()

    async def __anext__(self) -> StateChange:
        if self._conn is None and not self._closed:
            await self.__aenter__()
        while not self._heard:
            if self._closed:
                raise StopAsyncIteration
            try:
                await self._listen()
            except LinkDown:
                continue
        told = json.loads(self._heard.popleft())
        return StateChange(told["id"], told["task"], told["from"], told["to"])

    async def _listen(self) -> None:
        """Wait until something is heard, or the connection is another one."""
        conn = await self._link.connection()
        if conn is not self._conn:
            self._conn = conn
            self._link.works()
            if self._on_gap is not None:
                said = self._on_gap()
                if inspect.isawaitable(said):
                    await said
            return
        try:
            async for notification in conn.notifies(stop_after=1):  # and those that came with it
                self._heard.append(notification.payload)
        except psycopg.Error as exc:
            raise await self._link.judge(conn, exc) from exc


def subscribe(
    dsn: str | None = None,
    *,
    on_gap: Callable[[], Awaitable[None] | None] | None = None,
    logger: logging.Logger | None = None,
) -> Subscription:
    """Listen to what becomes of jobs.

    ``async with subscribe(dsn) as changes: async for change in changes: …``. A connection that is lost is made anew for
    as long as it takes; what happened meanwhile is not told later. ``on_gap``, which may be async, is then called,
    before the next change. ``dsn`` is what `Worker` takes. Raises psycopg's error when the database cannot be reached
    at first.
    """
    heard: deque[str] = deque()

    def hear(notification: psycopg.Notify) -> None:
        heard.append(notification.payload)

    async def listen(conn: psycopg.AsyncConnection[Any]) -> None:
        conn.add_notify_handler(hear)  # what comes with the answer; notifies() takes what comes later
        await conn.execute("listen pgworker_events")
        conn.remove_notify_handler(hear)

    log = Log(logger or logging.getLogger(LOGGER), {})
    conninfo = connection_string(dsn, name="pgworker events")
    database = Database(conninfo, log, pooled=False)
    return Subscription(Link("events", database, setup=listen), on_gap, heard)
