"""Connections that break: the worker comes back by itself, says so once, and loses nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgworker_client import BlockingContext, Context, NotInstalled, Worker, WorkerFailed, add_job, add_jobs
from pgworker_client.connection import Link
from pgworker_client.database import Database
from pgworker_client.logs import Log
from tests.client.background import Background, running
from tests.connections import Connections
from tests.waiting import until, until_gone, until_row

Db = psycopg.Connection[Any]
Start = Callable[[Worker], Background]

#: The connections of a worker, and what the statement that each ran last looks like.
PARTS = {"claim": "get_jobs|next_run_at", "finish": "finish_jobs", "presence": "heartbeat", "maintain": "maintain"}


def pid_of(db: Db, part: str) -> int:
    """The backend of that connection of the only worker."""
    row = until_row(
        db,
        "select pid from pg_stat_activity where application_name like 'pgworker %%' and datname = current_database()"
        " and query ~* %s",
        PARTS[part],
    )
    return int(row[0])


def kill(db: Db, pid: int) -> None:
    """End that backend, and wait until it is gone."""
    db.execute("select pg_terminate_backend(%s)", [pid])
    until_gone(db, pid)


def echoing(dsn: str, **settings: Any) -> tuple[Worker, list[Any]]:
    """A worker whose task ``t`` keeps the payloads that it saw."""
    seen: list[Any] = []

    async def handler(payload: Any, _ctx: Context) -> Any:
        seen.append(payload)
        return payload

    return Worker(dsn, tasks={"t": handler}, **settings), seen


def database(dsn: str) -> Database:
    return Database(dsn, Log(logging.getLogger("pgworker"), {}), pooled=False)


def completed(db: Db) -> Any:
    row = db.execute("select count(*) from pgworker.jobs where state = 'completed'").fetchone()
    assert row is not None
    return row[0]


@pytest.mark.parametrize("part", list(PARTS))
def test_a_terminated_connection_comes_back_and_is_told_once(
    dsn: str, db: Db, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = echoing(dsn)
    with running(worker):
        add_job(db, "t", 1)
        until(lambda: completed(db) == 1, "the first job")
        kill(db, pid_of(db, part))
        add_jobs(db, [{"identifier": "t", "payload": n} for n in range(20)])
        until(lambda: completed(db) == 21, "the jobs after the interruption")
        until(lambda: "the database works again" in caplog.text, "the good news")
        add_job(db, "t", 2)
        until(lambda: completed(db) == 22, "one more")
    assert caplog.text.count(f"{part} connection lost") == 1
    assert caplog.text.count("connection lost") == 1
    assert db.execute("select count(*) from pgworker.job").fetchone() == (0,)


def test_the_worker_listens_again_after_its_connection_was_lost(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn, poll_interval=600)  # only a notification can wake it
    with running(worker):
        old = pid_of(db, "presence")
        kill(db, old)
        until_row(
            db,
            "select 1 from pg_stat_activity where application_name like 'pgworker %%' and pid <> %s"
            " and query ~ 'heartbeat|maintain'",
            old,
        )
        for n in range(3):
            add_job(db, "t", n)
            until(functools.partial(seen.__contains__, n), "the notified job")


def test_reports_wait_for_the_connection_and_every_job_ends_once(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn, concurrency=4)
    total = 3000
    with running(worker):
        add_jobs(db, [{"identifier": "t", "payload": n} for n in range(total)])
        for _ in range(5):
            kill(db, pid_of(db, "finish"))
        until(lambda: completed(db) == total, "all jobs are completed", timeout=60)
    assert sorted(seen) == list(range(total))  # none run twice: every outcome was kept and sent again
    assert db.execute("select count(*) from pgworker.jobs where attempts <> 1").fetchone() == (0,)


def test_jobs_survive_killing_all_connections_at_random(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn, concurrency=4)
    total = 3000
    with running(worker):
        add_jobs(db, [{"identifier": "t", "payload": n} for n in range(total)])
        for part in list(PARTS) * 3:
            kill(db, pid_of(db, part))
        until(lambda: completed(db) == total, "all jobs are completed", timeout=60)
    assert set(seen) == set(range(total))


def test_what_was_not_begun_when_the_database_is_lost_is_not_begun_before_it_is_back(
    dsn: str, db: Db, role: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgworker_client.claiming._STALE", 60.0)
    monkeypatch.setattr("pgworker_client.pace.Pace.ahead", lambda *_: 10)
    seen: list[int] = []
    stops = {0: threading.Event(), 7: threading.Event()}

    def handler(payload: int, _ctx: BlockingContext) -> int:
        seen.append(payload)
        if payload in stops:
            stops[payload].wait(60)
        return payload

    db.execute(f"select pgworker.grant_worker('{role('hand')}')")
    db.execute("insert into pgworker.setting values ('rescue_grace', '1 minute')")
    add_jobs(db, [{"identifier": "t", "payload": n} for n in range(11)])
    worker = Worker(make_conninfo(dsn, user="hand"), tasks={"t": handler}, concurrency=1)
    with caplog.at_level(logging.INFO, "pgworker"), running(worker):
        until(lambda: seen == [0], "the first job")
        until_row(db, "select 1 from pgworker.job having count(locked_by) >= 10")
        db.execute("alter role hand nologin")
        db.execute("select pg_terminate_backend(pid, 20000) from pg_stat_activity where usename = 'hand'")
        stops[0].set()
        until(lambda: "claimed jobs go back: the database is gone" in caplog.text, "the next claim")
        stops[7].set()
        db.execute("alter role hand login")
        until(lambda: completed(db) == 11, "all jobs are completed")
    assert sorted(seen) == [*range(11)]


def test_a_worker_that_was_given_up_registers_anew_and_drops_what_it_ran(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    worker, cancelled = Worker(dsn, concurrency=2), []

    @worker.task
    def wait(_payload: Any, ctx: BlockingContext) -> str:
        if ctx.job.attempts == 1:
            cancelled.append(ctx.cancelled.wait(20))
            return "first"
        return "second"

    with running(worker):
        job = add_job(db, "wait")
        until_row(db, "select 1 from pgworker.jobs where state = 'running'")
        # What maintain() does with a worker that has vanished.
        with db.transaction():
            db.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
            db.execute("delete from pgworker.worker")
        until_row(db, "select 1 from pgworker.jobs where state = 'completed'")
    assert cancelled == [True]
    assert db.execute("select result, attempts from pgworker.jobs where id = %s", [job.id]).fetchone() == ("second", 2)
    assert "registered anew" in caplog.text


def test_a_restart_of_the_server_is_survived(own_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    dsn = own_server.dsn()
    worker, seen = echoing(dsn, poll_interval=0.1)
    with running(worker):
        with psycopg.connect(dsn, autocommit=True) as db:
            add_job(db, "t", 1)
            until(lambda: completed(db) == 1, "the first job")
        own_server.stop("immediate")
        own_server.start()
        with psycopg.connect(dsn, autocommit=True) as db:
            add_job(db, "t", 2)
            until(lambda: completed(db) == 2, "the job after the restart")
            assert db.execute("select count(*) from pgworker.worker").fetchone() == (1,)  # the same worker
    assert seen == [1, 2]
    # Said once, as one connection or another comes to notice it.
    assert caplog.text.count("connection lost") + caplog.text.count("connection cannot be made") == 1
    assert caplog.text.count("the database works again") == 1


def test_a_worker_without_a_database_can_be_stopped(own_server: Any, start: Start) -> None:
    worker, _ = echoing(own_server.dsn(), grace=0.1)
    background = start(worker)
    with psycopg.connect(own_server.dsn(), autocommit=True) as db:
        pid_of(db, "claim")
    own_server.stop("immediate")
    worker.stop()
    background.join()  # in order, without an error: the database will give back what it held


def test_a_report_that_is_cancelled_in_the_database_is_sent_again_on_the_same_connection(
    dsn: str, db: Db, connect: Connections, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = echoing(dsn)
    blocker = connect()
    with running(worker):
        add_job(db, "t", 1)
        until(lambda: completed(db) == 1, "the first job")
        pid = pid_of(db, "finish")
        with blocker.transaction():
            blocker.execute("lock table pgworker.finished in exclusive mode")
            add_job(db, "t", 2)
            until_row(db, "select 1 from pg_stat_activity where pid = %s and wait_event_type = 'Lock'", pid)
            db.execute("select pg_cancel_backend(%s)", [pid])
            until(lambda: "finish connection works, but its statement failed" in caplog.text, "the failure is told")
        until(lambda: completed(db) == 2, "the job is completed all the same")
        assert pid_of(db, "finish") == pid
        until(lambda: "the database works again" in caplog.text, "the good news")
    assert db.execute("select count(*) from pgworker.jobs where attempts <> 1").fetchone() == (0,)


@pytest.mark.parametrize("fresh", [0.0, 3600.0])
@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_kept_handler_connection_that_died_meanwhile_is_replaced(
    dsn: str, db: Db, kind: str, fresh: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgworker_client.handler_connections._FRESH", fresh)
    pids: list[Any] = []

    async def awaited(_payload: Any, ctx: Context) -> None:
        async with ctx.connection() as conn:
            pids.append(await (await conn.execute("select pg_backend_pid()")).fetchone())

    def blocking(_payload: Any, ctx: BlockingContext) -> None:
        with ctx.connection() as conn:
            pids.append(conn.execute("select pg_backend_pid()").fetchone())

    with running(Worker(dsn, tasks={"t": awaited if kind == "async" else blocking}, concurrency=1)):
        add_job(db, "t")
        until_row(db, "select 1 where not exists (select from pgworker.job)")  # the connection is kept by now
        db.execute("select pg_terminate_backend(%s, 20000)", pids[0])
        add_job(db, "t", max_attempts=1)
        until(lambda: len(pids) == 2, "the second job")
    assert pids[0] != pids[1]


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_handlers_work_is_not_repeated_because_its_connection_died_after_the_commit(
    dsn: str, db: Db, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgworker_client.handler_connections._FORGET", "select pg_terminate_backend(pg_backend_pid())")
    db.execute("create table work (attempt int)")

    async def awaited(_payload: Any, ctx: Context) -> None:
        async with ctx.connection() as conn:
            await conn.execute("insert into work values (%s)", (ctx.job.attempts,))

    def blocking(_payload: Any, ctx: BlockingContext) -> None:
        with ctx.connection() as conn:
            conn.execute("insert into work values (%s)", (ctx.job.attempts,))

    add_jobs(db, [{"identifier": "t"}] * 2)
    Worker(dsn, tasks={"t": awaited if kind == "async" else blocking}).run_once()
    assert db.execute("select attempt from work").fetchall() == [(1,), (1,)]
    assert db.execute("select count(*) from pgworker.job").fetchone() == (0,)


def test_a_server_that_is_read_only_is_connected_to_anew_until_one_is_not(
    dsn: str, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    worker, seen = echoing(dsn, poll_interval=0.05)
    caplog.set_level(logging.DEBUG, "pgworker")
    database_name = db.info.dbname
    with running(worker):
        add_job(db, "t", 1)
        until(lambda: seen == [1], "the first job")
        db.execute(f"alter database {database_name} set default_transaction_read_only = on")
        try:
            kill(db, pid_of(db, "claim"))
            # Another connection each time: behind a list of hosts, or a name, the next may be to another server. Each
            # is closed as soon as it is found out, too soon for pg_stat_activity to be looked at.
            until(lambda: caplog.text.count("the server is read-only, and cannot be written to") >= 3, "three refusals")
        finally:
            db.execute(f"alter database {database_name} reset default_transaction_read_only")
        add_job(db, "t", 2)
        until(lambda: seen == [1, 2], "the job after the failover")
        until(lambda: "the database works again" in caplog.text, "the good news")
    told = [record for record in caplog.records if "connection" in record.message and record.levelno >= logging.WARNING]
    assert len(told) == 1


def test_a_backend_terminated_while_the_worker_starts_is_a_lost_connection_like_any_other(
    dsn: str, db: Db, connect: Connections, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    worker, seen = echoing(dsn)
    blocker = connect()
    with blocker.transaction():
        blocker.execute("lock table pgworker.worker")
        background = start(worker)
        waits = "select pid from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'register_worker'"
        kill(db, until_row(db, waits)[0])
        until(lambda: "presence connection lost: terminating connection" in caplog.text, "it is told")
    add_job(db, "t", 1)
    until(lambda: seen == [1], "the worker works")
    worker.stop()
    background.join()


def test_a_worker_that_is_stopped_while_it_starts_anew_ends_in_order(
    dsn: str, db: Db, connect: Connections, start: Start
) -> None:
    worker, _ = echoing(dsn)
    blocker = connect()
    waits = "select pid from pg_stat_activity where wait_event_type = 'Lock' and query ~ 'register_' and pid <> %s"
    with blocker.transaction():
        blocker.execute("lock table pgworker.worker")
        background = start(worker)
        pid = until_row(db, waits, 0)[0]
        kill(db, pid)
        until_row(db, waits, pid)
        worker.stop()
        background.join()
    assert db.execute("select count(*) from pgworker.worker").fetchone() == (0,)


def test_a_connection_that_breaks_while_it_is_set_up_is_made_anew(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    pids: list[int] = []

    async def setup(conn: psycopg.AsyncConnection[Any]) -> None:
        pids.append(conn.info.backend_pid)
        if len(pids) < 4:
            await conn.execute("select pg_terminate_backend(pg_backend_pid())")

    async def main() -> list[tuple[Any, ...]]:
        link = Link("claim", database(dsn), setup=setup)
        await link.connect()
        try:
            return await link.fetch("select pg_backend_pid()")
        finally:
            await link.close()

    assert asyncio.run(main()) == [(pids[3],)]
    assert caplog.text.count("claim connection lost: terminating connection due to administrator command") == 1
    assert caplog.text.count("the database works again") == 1


def test_a_setup_that_is_refused_is_an_error_at_once(dsn: str) -> None:
    async def setup(conn: psycopg.AsyncConnection[Any]) -> None:
        await conn.execute("select pg_cancel_backend(pg_backend_pid()), pg_sleep(1)")

    link = Link("claim", database(dsn), setup=setup)
    with pytest.raises(psycopg.errors.QueryCanceled):
        asyncio.run(link.connect())


def test_a_database_without_pgworker_is_told_at_once(dsn: str, db: Db) -> None:
    db.execute("drop extension if exists pgworker")
    db.execute("drop schema if exists pgworker cascade")
    with pytest.raises(NotInstalled, match=r"no pgworker for this role in this database: .*pgworker install"):
        Worker(dsn, tasks={"t": print}).run()


def test_a_schema_of_another_protocol_is_told_at_once(dsn: str, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pgworker_client.presence.PROTOCOL", 99)
    with pytest.raises(NotInstalled, match=r"the client speaks protocol 99.*Upgrade"):
        Worker(dsn, tasks={"t": print}).run()
    assert db.execute("select count(*) from pgworker.worker").fetchone() == (0,)


def test_a_server_that_cannot_be_reached_at_the_start_is_an_error() -> None:
    with pytest.raises(psycopg.OperationalError):
        Worker("host=/nowhere", tasks={"t": print}).run()


@pytest.mark.parametrize(
    ("function", "part"), [("get_jobs", "claim"), ("finish_jobs", "finish"), ("maintain", "presence")]
)
def test_a_part_that_dies_ends_the_worker_with_the_reason(
    dsn: str, db: Db, start: Start, function: str, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = echoing(dsn, poll_interval=0.05)
    background = start(worker)
    until_row(db, "select 1 from pgworker.worker")
    db.execute(f"alter function pgworker.{function} set schema public")
    db.execute("select pgworker.add_job('t')")
    until(lambda: background.ended, "the worker ended")
    assert isinstance(background.error, WorkerFailed)
    assert re.match(rf"{part} died: UndefinedFunction: function pgworker\.{function}", str(background.error))
    assert isinstance(background.error.__cause__, psycopg.errors.UndefinedFunction)
    # In order: it said goodbye, and what it held is free again.
    assert db.execute("select count(*) from pgworker.worker").fetchone() == (0,)
    assert db.execute("select count(*) from pgworker.job where locked_by is not null").fetchone() == (0,)
    assert [record.levelno for record in caplog.records if "the worker stops" in record.message] == [logging.ERROR]
