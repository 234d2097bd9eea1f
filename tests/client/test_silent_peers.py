"""A way to the server that swallows everything, though the network's own signs of life go on."""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import closing
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import ExecStatus

from pgworker_client import BlockingContext, Context, Worker, add_job, add_jobs, schema
from pgworker_client.embedded import EmbeddedServer
from pgworker_client.logs import Log
from pgworker_client.silence import Silence, WatchedConnection
from tests.client.background import running
from tests.faults.proxy import Proxy
from tests.waiting import until, until_gone, until_row

Db = psycopg.Connection[Any]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgworker_client.silence.TICK", 0.2)
    monkeypatch.setattr("pgworker_client.silence._QUESTION", 0.5)
    monkeypatch.setattr("pgworker_client.silence._POOLED", 0.5)


@pytest.mark.parametrize("lease", [None, 5])
def test_a_worker_whose_connections_fall_silent_makes_new_ones_and_says_so_once(
    server: EmbeddedServer, db: Db, lease: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[Any] = []

    async def handler(payload: Any, _ctx: Context) -> None:
        seen.append(payload)

    with Proxy(server) as proxy:
        dsn = make_conninfo(proxy.dsn(db.info.dbname, server.user), connect_timeout=2)
        with running(Worker(dsn, tasks={"t": handler}, poll_interval=0.05, lease=lease)):
            add_job(db, "t", 1)
            until(lambda: seen == [1], "the first job")
            proxy.swallow(True)
            until(lambda: "trying again" in caplog.text, "the silence is noticed")
            proxy.swallow(False)
            add_job(db, "t", 2)
            until(lambda: 2 in seen, "the job after the silence", timeout=40)
            until(lambda: "the database works again" in caplog.text, "the good news")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [text for text in warnings if "trying again" in text] == warnings[:1]
    assert len([text for text in warnings if "works again" in text]) == 1


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_handler_whose_connection_falls_silent_fails_its_attempt_and_holds_nobody_up(
    server: EmbeddedServer, db: Db, kind: str
) -> None:
    db.execute("create table held (n int primary key)")
    pids: list[int] = []

    async def waiting(_payload: Any, ctx: Context) -> None:
        async with ctx.connection() as conn:
            await conn.execute("insert into held values (1)")
            pids.append(conn.info.backend_pid)
            if ctx.job.attempts == 1:
                proxy.swallow(True)
                await conn.execute("select 1")

    def blocking(_payload: Any, ctx: BlockingContext) -> None:
        with ctx.connection() as conn:
            conn.execute("insert into held values (1)")
            pids.append(conn.info.backend_pid)
            if ctx.job.attempts == 1:
                proxy.swallow(True)
                conn.execute("select 1")

    with Proxy(server) as proxy:
        dsn = proxy.dsn(db.info.dbname, server.user)
        worker = Worker(dsn, tasks={"t": waiting if kind == "async" else blocking}, poll_interval=0.05)
        with running(worker):
            job = add_job(db, "t", 1)
            until(lambda: pids, "the handler runs")
            proxy.swallow(False)
            until_row(db, "select 1 from pgworker.jobs where id = %s and state = 'scheduled'", job.id, timeout=40)
            # Its session is gone, with the row that the next attempt writes.
            until_gone(db, pids[0])
            db.execute("select pgworker.reschedule_jobs(%s, run_at => now())", [[job.id]])
            until_row(db, "select 1 where not exists (select from pgworker.job)")
    assert len(pids) == 2
    assert db.execute("select count(*) from held").fetchone() == (1,)


def test_a_statement_that_the_server_is_at_work_on_is_waited_for(
    dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    at_work = Silence._at_work

    async def asking(self: Silence, pids: list[int]) -> set[int]:
        asked.append(pids)
        return await at_work(self, pids)

    monkeypatch.setattr(Silence, "_at_work", asking)

    async def handler(_payload: Any, ctx: Context) -> int:
        async with ctx.connection() as conn:
            await conn.execute("select pg_advisory_lock(42)")
        return ctx.job.attempts

    db.execute("select pg_advisory_lock(42)")
    with running(Worker(dsn, tasks={"t": handler}, name="patient", poll_interval=600)):
        job = add_job(db, "t")
        until_row(db, "select 1 from pg_locks where locktype = 'advisory' and not granted")
        # It is asked about, again and again, and goes on.
        until(lambda: sum(bool(pids) for pids in asked) >= 3, "three questions")
        db.execute("select pg_advisory_unlock(42)")
        until_row(db, "select 1 from pgworker.jobs where id = %s and state = 'completed' and result = '1'", job.id)


async def test_an_answer_that_nobody_had_time_to_read_is_no_silence(
    dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()

    async def asking(_self: Silence, pids: list[int]) -> set[int]:
        asked.update(pids)
        return set()

    monkeypatch.setattr(Silence, "_at_work", asking)
    db.execute("select pg_advisory_lock(42)")
    silence = Silence(dsn, Log(logging.getLogger("pgworker"), {}), pooled=False)
    with closing(WatchedConnection.connect(dsn)) as answered, closing(WatchedConnection.connect(dsn)) as unanswered:
        for conn, query in (answered, b"select 7"), (unanswered, b"select pg_advisory_lock(42)"):
            conn.pid = conn.info.backend_pid
            conn.waiting = True
            conn.pgconn.send_query(query)
            silence.watch(conn)
        until_row(db, "select 1 from pg_stat_activity where pid = %s and state like 'idle%%'", answered.pid)
        looking = asyncio.create_task(silence.run())
        while not asked:
            await asyncio.sleep(0.01)
        looking.cancel()
        assert asked == {unanswered.pid}
        result = answered.pgconn.get_result()
        assert result is not None
        assert result.status == ExecStatus.TUPLES_OK  # not cut off
        assert answered.pgconn.get_result() is None


def test_the_server_is_told_to_notice_soon_that_a_workers_host_is_gone(server: EmbeddedServer) -> None:
    seen: list[Any] = []

    async def handler(_payload: Any, ctx: Context) -> None:
        async with ctx.connection() as conn:
            names = ("tcp_keepalives_idle", "tcp_keepalives_count", "tcp_user_timeout")
            cur = await conn.execute(
                "select pg_backend_pid(), array(select current_setting(unnest(%s::text[])))", [list(names)]
            )
            seen.append(await cur.fetchone())

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The settings have a meaning on TCP only, and are not shown elsewhere.
    own = EmbeddedServer(server.installation, settings={"listen_addresses": "127.0.0.1", "port": str(port)})
    own.port = port
    with own, psycopg.connect(own.dsn(), autocommit=True) as conn:
        schema.install(conn)
        dsn = make_conninfo(host="127.0.0.1", port=port, user=own.user, dbname="postgres")
        add_jobs(conn, [{"identifier": "t"}] * 2)
        Worker(dsn, tasks={"t": handler}, concurrency=1).run_once()
    assert seen == [(seen[0][0], ["10", "3", "20000"])] * 2  # on one connection, which was cleaned between
