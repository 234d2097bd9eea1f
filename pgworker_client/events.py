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
from pgworker_client.errors import LinkDown
from pgworker_client.logs import LOGGER, Log

JobState = Literal["waiting", "scheduled", "ready", "running", "completed", "failed", "cancelled"]

#: Seconds after which a connection that is silent is asked whether it still works.
_SILENCE = 30.0


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
        self._link.stop_trying()
        await self._link.close()

    async def __anext__(self) -> StateChange:
        if self._conn is None:
            await self.__aenter__()
        while not self._heard:
            try:
                await self._listen()
            except LinkDown:
                continue
        told = json.loads(self._heard.popleft())
        return StateChange(told["id"], told["task"], told["from"], told["to"])

    async def _listen(self) -> None:
        """Wait until something is heard, at most for a while."""
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
            async for _ in conn.notifies(timeout=_SILENCE, stop_after=1):
                return  # the connection's handler has it
        except psycopg.Error as exc:
            raise await self._link.judge(conn, exc) from exc
        await self._link.fetch("select")


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

    async def listen(conn: psycopg.AsyncConnection[Any]) -> None:
        conn.add_notify_handler(lambda notification: heard.append(notification.payload))
        await conn.execute("listen pgworker_events")

    log = Log(logger or logging.getLogger(LOGGER), {})
    conninfo = connection_string(dsn, name="pgworker events")
    return Subscription(Link("events", conninfo, log, pooled=False, setup=listen), on_gap, heard)
