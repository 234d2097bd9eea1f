"""Lease mode, for transaction poolers: nothing depends on the database session."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from pgworker_client import BlockingContext, Context, Worker, add_job, add_jobs
from pgworker_client.connection import Link
from tests.client.background import Background, running, stop
from tests.client.test_connections import echoing
from tests.waiting import until, until_row

Db = psycopg.Connection[Any]
Start = Callable[[Worker], Background]


def test_a_worker_with_a_lease_does_its_work(dsn: str, db: Db) -> None:
    worker, seen = echoing(dsn, lease=timedelta(seconds=30), poll_interval=0.05)
    with running(worker):
        add_jobs(db, [{"identifier": "t", "payload": n} for n in range(50)])
        until(lambda: len(seen) == 50, "the jobs")
    assert sorted(seen) == list(range(50))


def test_nothing_is_left_in_the_session_that_a_pooler_would_pass_on(dsn: str, db: Db) -> None:
    worker = Worker(dsn, lease=30, poll_interval=0.05)
    left: list[Any] = []

    @worker.task
    async def t(_payload: Any, ctx: Context) -> None:
        await ctx.progress(1)
        await ctx.add_job("other")
        async with ctx.connection() as conn:
            left.append(conn.prepare_threshold)
        async with ctx.transaction():
            pass

    fetch = Link.fetch

    async def looking(self: Link, query: str, params: Any = (), **options: Any) -> Any:
        rows = await fetch(self, query, params, **options)
        for what in ("pg_prepared_statements", "pg_listening_channels()"):
            left.extend(await fetch(self, f"select * from {what}"))
        left.extend(await fetch(self, "select 1 from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()"))
        left.extend(await fetch(self, "select 1 where current_setting('synchronous_commit') <> 'on'"))
        return rows

    with pytest.MonkeyPatch.context() as patch, running(worker):
        patch.setattr(Link, "fetch", looking)
        add_job(db, "t")
        until_row(db, "select 1 where not exists (select from pgworker.job where task_identifier = 't')")
    assert left == [None]


def test_the_lease_is_renewed_while_jobs_are_long(dsn: str, db: Db) -> None:
    worker = Worker(dsn, lease=1.5, poll_interval=0.05)

    @worker.task
    def long(_payload: Any, ctx: BlockingContext) -> int:
        for _ in itertools.count():  # well past the first lease, however busy the machine is
            row = db.execute(
                "select now() - registered_at > lease * 1.5, lease_until > now() from pgworker.worker"
            ).fetchone()
            if row is None or row[0] or ctx.cancelled.wait(0.05):
                return ctx.job.attempts
        raise AssertionError

    job = add_job(db, "long")
    with running(worker):
        until_row(db, "select 1 from pgworker.jobs where state = 'completed'")
    row = db.execute("select result, attempts from pgworker.jobs where id = %s", [job.id]).fetchone()
    assert row == (1, 1)


def test_the_lease_is_renewed_while_a_stopped_worker_waits_for_what_it_runs(dsn: str, db: Db, start: Start) -> None:
    worker = Worker(dsn, lease=1.5, grace=600)
    begun, go = threading.Event(), threading.Event()

    @worker.task
    def long(_payload: Any, _ctx: BlockingContext) -> int:
        begun.set()
        assert go.wait(60)
        return 1

    add_job(db, "long")
    background = start(worker)
    assert begun.wait(20)
    stop(worker)
    late = "select pgworker.maintain(), clock_timestamp() > %s + 2 * lease from pgworker.worker"
    stopped = db.execute("select clock_timestamp()").fetchone()
    assert stopped is not None
    while (row := db.execute(late, stopped).fetchone()) is not None and not row[1]:
        assert db.execute("select state from pgworker.jobs").fetchall() == [("running",)]
    go.set()
    background.join()
    assert db.execute("select state, attempts from pgworker.jobs").fetchall() == [("completed", 1)]


def test_jobs_of_one_queue_follow_each_other_though_nobody_notifies(dsn: str, db: Db) -> None:
    worker, seen = Worker(dsn, lease=30, poll_interval=600), []

    @worker.task
    async def t(payload: Any, _ctx: Context) -> None:
        await asyncio.sleep(0.3)  # by then the worker has looked again and lain down
        seen.append(payload)

    for n in range(4):
        add_job(db, "t", n, queue_name="q")
    with running(worker):
        until(lambda: len(seen) == 4, "the queue is worked off")


def test_a_worker_whose_lease_ran_out_registers_anew(dsn: str, db: Db, caplog: pytest.LogCaptureFixture) -> None:
    worker, ends = Worker(dsn, lease=1, poll_interval=0.05), []

    @worker.task
    async def t(_payload: Any, ctx: Context) -> int:
        if ctx.job.attempts == 1:
            try:
                await asyncio.sleep(60)
            finally:
                ends.append(ctx.fate)
        return ctx.job.attempts

    add_job(db, "t")
    with running(worker):
        until_row(db, "select 1 from pgworker.jobs where state = 'running'")
        with db.transaction():  # as maintain() does it
            db.execute("select pgworker.force_unlock_workers(array(select id from pgworker.worker))")
            db.execute("delete from pgworker.worker")
        until_row(db, "select 1 from pgworker.jobs where state = 'completed' and result = '2'")
    assert ends == ["lost"]
    assert "registered anew" in caplog.text
