"""Presence: one connection that registers the worker, shows that it lives, and hears what the database has to say."""

from __future__ import annotations

import asyncio
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
from pgworker_client.settings import Settings

#: The number by which client and schema know whether they understand each other.
PROTOCOL = 1

_CHANNEL = "pgworker"
#: Seconds that the farewell may take.
_LEAVE = 5.0
_HEARTBEAT = "select job_id, notice from pgworker.heartbeat(%s)"
_BEAT = 1.0

#: What the server says when there is no schema, no function of that name, or no right to use them.
_ABSENT = ("3F000", "42883", "42501", "42P01")


class Presence:
    """Registers, listens, sends heartbeats and calls `maintain`."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        log: Log,
        *,
        on_worker_id: Callable[[int], None],
        on_notice: Callable[[int, str], None],
        on_wake: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._log = log
        self._on_worker_id = on_worker_id
        self._on_notice = on_notice
        self._on_wake = on_wake
        self.worker_id: int | None = None
        self.link = Link("presence", database, setup=self._arrive)
        self._beat_every = min(_BEAT, settings.lease / 3) if settings.lease else _BEAT
        self._beat_at = 0.0
        self._maintain_at = 0.0

    async def start(self) -> None:
        """Connect and register. NotInstalled if the database is not one that this client can work with."""
        try:
            await self.link.connect()
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
        """Listen, send heartbeats and maintain, for ever."""
        while True:
            try:
                await self._listen_until(min(self._beat_at, self._maintain_at))
                now = time.monotonic()
                if now >= self._beat_at:
                    await self.beat()
                if now >= self._maintain_at:
                    await self._maintain()
            except LinkDown:
                continue

    async def beat(self) -> None:
        """One heartbeat; notices go to their jobs. An unknown worker registers anew."""
        self._beat_at = time.monotonic() + self._beat_every
        conn = await self.link.connection()
        try:
            rows = await self.link.fetch(_HEARTBEAT, (self.worker_id,))
        except psycopg.Error as exc:
            if exc.sqlstate != UNKNOWN_WORKER:
                raise
            await conn.close()  # the next connection registers anew
            return
        for job_id, notice in rows:
            self._on_notice(job_id, notice)

    async def leave(self) -> None:
        """Unregister: what the worker still holds goes back. Tried once: the database notices its absence anyway."""
        if self.worker_id is None:
            return
        self.link.stop_trying()
        try:
            async with asyncio.timeout(_LEAVE):
                await self.link.fetch("select pgworker.unregister_worker(%s)", (self.worker_id,))
        except (psycopg.Error, LinkDown, TimeoutError) as exc:
            self._log.info("could not unregister (%s); the database will notice", one_line(exc))
        self.worker_id = None

    async def _arrive(self, conn: psycopg.AsyncConnection[Any]) -> None:
        """On every new connection: be present on it, and listen."""
        await conn.execute("select pgworker.check_client(%s)", (PROTOCOL,), prepare=False)
        if self.worker_id is None:
            await self._register(conn)
        else:
            try:
                cur = psycopg.AsyncCursor(conn, row_factory=tuple_row)
                await cur.execute(_HEARTBEAT, (self.worker_id,), prepare=False)
                for job_id, notice in await cur.fetchall():
                    self._on_notice(job_id, notice)
            except psycopg.Error as exc:
                if exc.sqlstate != UNKNOWN_WORKER:
                    raise
                await self._register(conn)
        if not self._settings.pooled:
            await conn.execute(f"listen {_CHANNEL}")
        self._beat_at = time.monotonic() + self._beat_every
        self._on_wake()  # whatever was said while nobody listened

    async def _register(self, conn: psycopg.AsyncConnection[Any]) -> None:
        lease = None if self._settings.lease is None else timedelta(seconds=self._settings.lease)
        cur = psycopg.AsyncCursor(conn, row_factory=tuple_row)
        await cur.execute(
            "select pgworker.register_worker(%s::text, %s::interval, %s::text)",
            (self._settings.worker_name(), lease, schema.version()),
            prepare=False,
        )
        ((worker_id,),) = await cur.fetchall()
        if self.worker_id is not None:
            self._log.warning("was gone for too long: registered anew, jobs claimed before are given back")
        self.worker_id = worker_id
        self._on_worker_id(worker_id)

    async def _listen_until(self, moment: float) -> None:
        left = max(0.0, moment - time.monotonic())
        if self._settings.pooled:
            await asyncio.sleep(left)
            return
        conn = await self.link.connection()
        try:
            async for _ in conn.notifies(timeout=left):
                self._on_wake()
        except psycopg.Error as exc:
            raise await self.link.judge(conn, exc) from exc

    async def _maintain(self) -> None:
        ((pause,),) = await self.link.fetch("select extract(epoch from pgworker.maintain())::float8")
        self._maintain_at = time.monotonic() + max(0.05, pause)
