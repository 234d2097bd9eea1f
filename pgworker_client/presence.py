"""Presence: registers the worker, shows that it lives, hears what it is to stop, and has the database maintained."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
from psycopg.rows import tuple_row

from pgworker_client import schema
from pgworker_client.connection import Link
from pgworker_client.database import Database
from pgworker_client.errors import INCOMPATIBLE, UNKNOWN_WORKER, LinkDown, NotInstalled, one_line
from pgworker_client.logs import Log
from pgworker_client.loop_watch import LoopWatch
from pgworker_client.reports import PATIENCE, Released
from pgworker_client.settings import Settings

#: The number by which client and schema know whether they understand each other.
PROTOCOL = 1

#: Seconds that the farewell may take.
_LEAVE = 5.0
_HEARTBEAT = "select job_id, notice from pgworker.heartbeat(%s)"
#: Seconds between heartbeats: a job that is cancelled is told so within a second.
_BEAT = 0.5

#: What the server says when there is no schema, no function of that name, or no right to use them.
_ABSENT = ("3F000", "42883", "42501", "42P01")


class Presence:
    """Registers, sends heartbeats and calls `maintain`. Everything here happens in the presence thread."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        log: Log,
        timeouts: dict[str, float],
        *,
        on_worker_id: Callable[[int], None],
        on_notice: Callable[[int, str], None],
        on_unsure: Callable[[], None],
        watch: LoopWatch,
    ) -> None:
        self._settings = settings
        self._log = log
        self._timeouts = json.dumps(timeouts) if timeouts else None
        self._on_worker_id = on_worker_id
        self._on_notice = on_notice
        self._on_unsure = on_unsure
        self._watch = watch
        self.worker_id: int | None = None
        self._link = Link("presence", database, setup=self._arrive)
        # Its own: heartbeats go on while maintain() takes its time.
        self._maintain_link = Link("maintain", database)
        self._leaving = asyncio.Event()
        self._parts: list[asyncio.Task[None]] = []
        self._beat_every = min(_BEAT, settings.lease / 3) if settings.lease else _BEAT

    async def start(self) -> None:
        """Connect and register. NotInstalled if the database is not one that this client can work with."""
        try:
            await self._link.connect()
        except psycopg.Error as exc:
            if exc.sqlstate == INCOMPATIBLE:
                raise NotInstalled(f"{one_line(exc)}. {exc.diag.message_hint or ''}".strip()) from exc
            if exc.sqlstate in _ABSENT:
                raise NotInstalled(
                    f"no pgworker for this role in this database: {one_line(exc)}; run `pgworker install` or CREATE "
                    "EXTENSION pgworker, and select pgworker.grant_worker('role') if this role does not own it"
                ) from exc
            raise

    async def run(self) -> None:
        """Send heartbeats and maintain, until told to leave."""
        self._parts = [asyncio.create_task(self._beat_on()), asyncio.create_task(self._maintain_on())]
        try:
            await asyncio.gather(*self._parts)
        finally:
            for part in self._parts:
                part.cancel()

    async def leave(self) -> None:
        """Unregister: what the worker still holds goes back. Tried once: the database notices its absence anyway."""
        self._leaving.set()
        for link in (self._link, self._maintain_link):
            link.stop_trying()
        if self._parts:  # not cut off: that would cost the connection
            await asyncio.wait(self._parts, timeout=_LEAVE)
        if self.worker_id is None:
            return
        try:
            async with asyncio.timeout(_LEAVE):
                await self._link.fetch("select pgworker.unregister_worker(%s)", (self.worker_id,))
        except (psycopg.Error, LinkDown, TimeoutError) as exc:
            self._log.info("could not unregister (%s); the database will notice", one_line(exc))
        self.worker_id = None

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()
        await self._maintain_link.close()

    async def _beat_on(self) -> None:
        while not self._leaving.is_set():
            began = time.monotonic()
            try:
                await self._beat()
                await self._give_back()
            except LinkDown:
                continue
            await self._sleep(began + self._beat_every - time.monotonic())

    async def _beat(self) -> None:
        """One heartbeat; notices go to their jobs. An unknown worker registers anew."""
        conn = await self._link.connection()
        try:
            rows = await self._link.fetch(_HEARTBEAT, (self.worker_id,))
        except psycopg.Error as exc:
            if exc.sqlstate != UNKNOWN_WORKER:
                raise
            await conn.close()  # the next connection registers anew
            return
        for job_id, notice in rows:
            self._on_notice(job_id, notice)

    async def _give_back(self) -> None:
        """Give back what nobody can start because the worker's event loop is blocked."""
        rows = self._watch.look()
        if rows and self.worker_id is not None:
            released = Released(rows)
            try:
                await self._link.fetch(released.QUERY, (PATIENCE, *released.params(self.worker_id)))
            except LinkDown as down:
                if not down.unknown:
                    raise
                self._on_unsure()
        self._watch.given_back()

    async def _maintain_on(self) -> None:
        while not self._leaving.is_set():
            try:
                ((pause,),) = await self._maintain_link.fetch("select extract(epoch from pgworker.maintain())::float8")
            except LinkDown:
                continue
            await self._sleep(max(0.05, pause))

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, seconds)):
                await self._leaving.wait()

    async def _arrive(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """On every new connection: be present on it."""
        await conn.execute("select pgworker.check_client(%s)", (PROTOCOL,), prepare=False)
        if self.worker_id is None:
            await self._register(conn)
            return
        try:
            cur = psycopg.AsyncCursor(conn, row_factory=tuple_row)
            await cur.execute(_HEARTBEAT, (self.worker_id,), prepare=False)
            for job_id, notice in await cur.fetchall():
                self._on_notice(job_id, notice)
        except psycopg.Error as exc:
            if exc.sqlstate != UNKNOWN_WORKER:
                raise
            await self._register(conn)

    async def _register(self, conn: psycopg.AsyncConnection[Any]) -> None:
        lease = None if self._settings.lease is None else timedelta(seconds=self._settings.lease)
        cur = psycopg.AsyncCursor(conn, row_factory=tuple_row)
        await cur.execute(
            "select pgworker.register_worker(%s::text, %s::interval, %s::text, %s::jsonb)",
            (self._settings.worker_name(), lease, schema.version(), self._timeouts),
            prepare=False,
        )
        ((worker_id,),) = await cur.fetchall()
        if self.worker_id is not None:
            self._log.warning("was gone for too long: registered anew, jobs claimed before are given back")
        self.worker_id = worker_id
        self._on_worker_id(worker_id)
